/* W8A8 for all experts of a layer: part of int8.c. */
#ifndef QPLUG_INT8_EXPERTS_H
#define QPLUG_INT8_EXPERTS_H

#include "experts.h"

typedef struct {
    void *y;
    const void *x, *bias;
    const float *act_scales, *scales;
    const int32_t *act_zeros, *sums;
    const int8_t *codes;
    long n, k;
    int kind, bias_kind, symmetric;
    float divisor, low;
} Int8Experts;

static int int8_expert(const void *call, long e, long m0, long m, int threads) {
    const Int8Experts *c = call;
    const long rows = round_up(c->n, TILE);
    return qplug_w8a8((char *)c->y + (size_t)(m0 * c->n) * width(c->kind), (const char *)c->x + (size_t)(m0 * c->k) * width(c->kind),
                      c->act_scales ? c->act_scales + e : NULL, c->act_zeros ? c->act_zeros + e : NULL,
                      c->codes + e * rows * round_up(c->k, DEPTH), c->scales + e * rows, c->sums + e * rows,
                      part(c->bias, (long)((size_t)c->n * width(c->bias_kind)), e), m, c->n, c->k, c->kind, c->bias_kind, c->symmetric,
                      c->divisor, c->low, threads);
}

/* y[t, n] of x[t, k], sorted by expert; all as qplug_w8a8 has it, with [E] in front of act_scales, act_zeros, codes, scales, sums and bias.
 * Rows past the last end are 0. */
EXPORT int qplug_w8a8_experts(void *y, const void *x, const float *act_scales, const int32_t *act_zeros, const int8_t *codes,
                              const float *scales, const int32_t *sums, const void *bias, const int64_t *ends, long experts, long t, long n,
                              long k, int kind, int bias_kind, int symmetric, float divisor, float low, int threads) {
    const Int8Experts call = {y, x, bias, act_scales, scales, act_zeros, sums, codes, n, k, kind, bias_kind, symmetric, divisor, low};
    const long last = experts ? ends[experts - 1] : 0;
    if (last < t) memset((char *)y + (size_t)(last * n) * width(kind), 0, (size_t)((t - last) * n) * width(kind));
    return each_expert(int8_expert, &call, ends, experts, t, threads);
}

#endif
