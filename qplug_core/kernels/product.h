/* What a weight-only product is given, and its two ends: the values of x in packed order, and the results. */
#ifndef QPLUG_PRODUCT_H
#define QPLUG_PRODUCT_H

#include "codes.h"

enum { PANEL = 64, SEGMENT = 128, AHEAD = 8192 };

typedef struct {
    const void *x, *codes, *scales, *zeros, *bias;
    const float *shifts, *table, *row_scales, *x_scales;
    const int32_t *segments, *order;
    void *y;
    long m, n, k, kp, groups, count, x_groups; /* count of segments; groups of activations that have a scale */
    int kind, y_kind, scale_kind, bias_kind, fold, integers; /* the last two: see bf16_product.h */
    const void *tables; /* of bfloat16, see codes.h */
    void *xs;    /* x in packed order, as the arithmetic takes it */
    float *sums; /* [rows, S] sums of x over each segment */
} Product;

INLINE const uint32_t *codes_of(int type, const Product *p, long tile) {
    return (const uint32_t *)p->codes + tile * (p->kp / unit_of(type)) * (words_of(type) * TILE);
}

/* What is subtracted from codes times `scale`, codes as `field` (centred: as `pairs`) has them. */
INLINE vf offset_of(int type, int centred, const Product *p, long at, vf scale) {
    const float middle = middle_of(type);
    if (p->zeros) return (load_any(p->scale_kind, p->zeros, at) - splat(type == INT8 ? 128.0f : centred ? middle : 0.0f)) * scale;
    const vf offset = splat(centred ? 0.0f : middle) * scale;
    return p->shifts ? offset + load(p->shifts + at) : offset;
}

/* The first unit past the segments from s0 on that together have at most `most` columns, as an index of segments. */
INLINE long chunk_end(int type, const Product *p, long s0, long most) {
    long s1 = s0 + 1;
    while (s1 < p->count && (long)(p->segments[4 * s1 + 1] - p->segments[4 * s0]) * unit_of(type) <= most) s1++;
    return s1;
}

/* Columns first .. first + count of x in packed order as float32: row `row`, zeros where there is none. */
INLINE void gather(const Product *p, long row, long first, long count, float *to) {
    long k = 0;
    if (row < p->m) {
        const char *x = (const char *)p->x + (size_t)row * (size_t)p->k * width(p->kind);
        if (!p->order)
            for (; k + VL <= count; k += VL) store(to + k, load_any(p->kind, x, first + k));
        for (; k < count; k++) {
            const long from = p->order ? p->order[first + k] : first + k;
            to[k] = from >= 0 ? load_one(p->kind, x, from) : 0.0f;
        }
    }
    for (; k < count; k++) to[k] = 0.0f;
}

INLINE float x_scale(const Product *p, long row, int group) {
    return p->x_scales && row < p->m ? p->x_scales[row * p->x_groups + group] : 1.0f;
}

/* VL sums of products of row `m`, of weight rows n and on, to y. */
INLINE void finish(const Product *p, long m, long n, vf sum) {
    const long count = p->n - n;
    if (p->row_scales) sum *= load(p->row_scales + n);
    if (p->x_groups == 1) sum *= splat(p->x_scales[m]);
    if (p->bias) {
        if (count >= VL) sum += load_any(p->bias_kind, p->bias, n);
        else for (long i = 0; i < count; i++) sum[i] += load_one(p->bias_kind, p->bias, n + i);
    }
    store_any(p->y_kind, p->y, m * p->n + n, sum, count);
}

#endif
