/* The weight-only product for all experts of a layer: part of weight_only.c. */
#ifndef QPLUG_WEIGHT_ONLY_EXPERTS_H
#define QPLUG_WEIGHT_ONLY_EXPERTS_H

#include "experts.h"

enum { CODES, TABLE, SCALES, ZEROS, SHIFTS, ROW_SCALES, SEGMENTS, ORDER, BIAS, STACKS };

typedef struct {
    void *y;
    const void *x, *const *stacks;
    const long *bytes;
    const float *x_scales;
    long n, k, kp, groups, count, x_groups;
    int type, kind, y_kind, scale_kind, bias_kind;
} WeightOnlyExperts;

static int weight_only_expert(const void *call, long e, long m0, long m, int threads) {
    const WeightOnlyExperts *c = call;
    const void *at[STACKS];
    for (int i = 0; i < STACKS; i++) at[i] = part(c->stacks[i], c->bytes[i], e);
    return qplug_weight_only((char *)c->y + (size_t)(m0 * c->n) * width(c->y_kind), (const char *)c->x + (size_t)(m0 * c->k) * width(c->kind),
                             at[CODES], at[TABLE], at[SCALES], at[ZEROS], at[SHIFTS], at[ROW_SCALES], at[SEGMENTS], at[ORDER],
                             c->x_scales ? c->x_scales + m0 * c->x_groups : NULL, at[BIAS], m, c->n, c->k, c->kp, c->groups, c->count,
                             c->x_groups, c->type, c->kind, c->y_kind, c->scale_kind, c->bias_kind, threads);
}

/* y[t, n] of x[t, k], sorted by expert. `stacks`, and the `bytes` of one expert in each: codes, table, scales, zeros, shifts, row_scales, segments,
 * order, bias, as qplug_weight_only takes them. Rows past the last end are 0. */
EXPORT int qplug_weight_only_experts(void *y, const void *x, const void *const *stacks, const long *bytes, const void *x_scales, const int64_t *ends,
                                     long experts, long t, long n, long k, long kp, long groups, long count, long x_groups, int type, int kind,
                                     int y_kind, int scale_kind, int bias_kind, int threads) {
    const WeightOnlyExperts call = {y, x, stacks, bytes, x_scales, n, k, kp, groups, count, x_groups, type, kind, y_kind, scale_kind, bias_kind};
    const long last = experts ? ends[experts - 1] : 0;
    if (last < t) memset((char *)y + (size_t)(last * n) * width(y_kind), 0, (size_t)((t - last) * n) * width(y_kind));
    return each_expert(weight_only_expert, &call, ends, experts, t, threads);
}

#endif
