/* Activations to codes: x[M, K] quantized as reference/activation.py defines it, in float32 with division.
 *
 * Codes are written as bfloat16 values, which hold every one of them exactly: integers of up to 8 bits less their zero point, 8-bit and
 * 4-bit floats. Scales that are powers of two, or e4m3 beside e2m1 codes, are multiplied in, exactly too. What remains is
 * y = scales * (codes * W^T), a weight-only product of these codes.
 *
 * codes  [M][K] bfloat16
 * scales [M][G] float32, G = ceil(K / block), or 1 by token, by tensor, and for the other kinds of scales
 *
 * A NaN stays one; an infinite value makes a dynamic float32 scale infinite, and what it is a scale of NaN.
 */
#include "vec.h"

enum number { INTEGER = 0, FLOAT = 1 };
enum scales { STATIC = 0, DYNAMIC = 1, POWER = 2, TWO_LEVELS = 3 };
enum rule { FLOOR = 0, QUARTER = 1, SIXTEENTH = 2, UP = 3, CEIL = 4 };

typedef struct {
    int number, scales, rule, symmetric, whole; /* whole: one dynamic scale for all of x */
    int places, least;  /* of a float: places of its mantissa, exponent of its smallest normal number */
    float low, high;    /* smallest and largest code */
    float divisor;      /* dynamic scale = extreme value / divisor */
    float bound;        /* extreme values are taken as at most this */
    float scale, zero;  /* stored; for TWO_LEVELS the outer scale */
    int divide;         /* the outer scale is a divisor */
    long block;         /* columns of a scale, 0 for all */
} Rules;

/* Nearest value with `places` places after the point of its mantissa, ties to even: the sum with 1.5 * 2^e has no room for more. */
INLINE vf round_places(vf v, int places, int least) {
    const vi exponent = (vi)v & 0x7f800000, lowest = (vi){0} + ((least + 127) << 23);
    const vi above = exponent > lowest, e = ((exponent & above) | (lowest & ~above)) + ((23 - places) << 23);
    const vf magic = (vf)e * splat(1.5f);
    return (v + magic) - magic;
}

INLINE float largest_of(vf v) {
    float most = v[0];
    for (int i = 1; i < VL; i++) most = v[i] > most ? v[i] : most;
    return most;
}

/* Largest and least of 0 and count values; NaN is passed over. */
static void extremes(const float *v, long count, float *high, float *low) {
    vf top = splat(0.0f), bottom = splat(0.0f);
    long i = 0;
    for (; i + VL <= count; i += VL) {
        top = vmax(load(v + i), top);
        bottom = vmax(-load(v + i), bottom);
    }
    *high = largest_of(top);
    *low = -largest_of(bottom);
    for (; i < count; i++) {
        *high = v[i] > *high ? v[i] : *high;
        *low = v[i] < *low ? v[i] : *low;
    }
}

INLINE int exponent_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (int)(bits >> 23 & 255) - 127; /* floor(log2 x); -127 for what is smaller than 2^-126 */
}

/* floor(log2 x), and one more where x is no power of two. */
INLINE int exponent_above(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return exponent_of(x) + ((bits & 0x7fffff) != 0);
}

static float power_of(const Rules *r, float amax) {
    const int emax = r->places == 1 ? 2 : r->places == 3 ? 8 : 15;
    int exponent;
    if (amax == 0.0f) exponent = -127;
    else if (r->rule == CEIL) exponent = exponent_above(amax / r->high);
    else if (r->rule == UP) exponent = exponent_above(amax) - emax;
    else {
        exponent = exponent_of(amax);
        const float leading = __builtin_ldexpf(1.0f, exponent);
        if (r->rule != FLOOR) exponent = exponent_of(amax + (r->rule == SIXTEENTH ? 0.0625f : 0.25f) * leading);
        exponent -= emax;
    }
    exponent = exponent < -127 ? -127 : exponent > 127 ? 127 : exponent;
    return __builtin_ldexpf(1.0f, exponent);
}

/* `count` values of one scale, in place, to codes times `factor`. */
static void to_codes(const Rules *r, float *v, long count, float by, float zero, float factor) {
    for (long i = 0; i < count; i += VL) {
        const long have = count - i < VL ? count - i : VL;
        float part[VL] = {0};
        memcpy(part, v + i, (size_t)have * 4);
        vf x = load(part) / splat(by) + splat(zero);
        /* In this order of arguments NaN is what comes out. */
        x = vmin(splat(r->high), vmax(splat(r->low), x));
        x = r->number == INTEGER ? (x + splat(12582912.0f)) - splat(12582912.0f) : round_places(x, r->places, r->least);
        store(part, (x - splat(zero)) * splat(factor));
        memcpy(v + i, part, (size_t)have * 4);
    }
}

/* One scale of a block with these extremes; codes are made by dividing by `by`, and multiplied by `factor`. */
static float scale_of(const Rules *r, float high, float low, float *by, float *zero, float *factor) {
    float amax = high > -low ? high : -low, scale;
    *zero = 0.0f;
    *factor = 1.0f;
    if (r->scales == POWER) {
        *by = *factor = power_of(r, amax);
        return 1.0f;
    }
    if (r->scales == TWO_LEVELS) {
        float inner = amax / r->high;
        inner = r->divide ? inner * r->scale : inner / r->scale;
        inner = inner < 0x1p-9f ? 0x1p-9f : inner > 448.0f ? 448.0f : inner;
        *factor = round_places(splat(inner), 3, -6)[0];
        *by = r->divide ? *factor / r->scale : *factor * r->scale;
        return r->divide ? 1.0f / r->scale : r->scale;
    }
    if (r->scales == STATIC) {
        *zero = r->zero;
        *by = scale = r->divide ? 1.0f / r->scale : r->scale;
        if (r->number == INTEGER && scale == 0.0f) *by = 1.0f;
        return scale;
    }
    if (r->symmetric) scale = (amax > r->bound ? r->bound : amax) / r->divisor;
    else {
        scale = (high - low) / (r->high - r->low);
        *zero = __builtin_rintf(r->low - low / (scale == 0.0f ? 1.0f : scale));
        *zero = *zero < r->low ? r->low : *zero > r->high ? r->high : *zero;
    }
    *by = scale == 0.0f ? 1.0f : scale;
    return scale;
}

INLINE void read_row(int kind, const void *x, long row, long k, float *to) {
    long i = 0;
    for (; i + VL <= k; i += VL) store(to + i, load_any(kind, x, row * k + i));
    for (; i < k; i++) to[i] = load_one(kind, x, row * k + i);
}

static void quantize_row(const Rules *r, int kind, const void *x, long row, long k, float high, float low, float *values, uint16_t *codes, float *scales) {
    const long block = r->block ? r->block : k, groups = r->scales == DYNAMIC && r->block ? (k + block - 1) / block : 1;
    read_row(kind, x, row, k, values);
    for (long first = 0, g = 0; first < k; first += block, g++) {
        const long count = k - first < block ? k - first : block;
        float by, zero, factor;
        if (!r->whole && r->scales != STATIC) extremes(values + first, count, &high, &low);
        const float scale = scale_of(r, high, low, &by, &zero, &factor);
        if (g < groups) scales[row * groups + g] = scale;
        to_codes(r, values + first, count, by, zero, factor);
    }
    for (long i = 0; i < k; i += VL) {
        vf v = splat(0.0f);
        if (i + VL <= k) v = load(values + i);
        else for (long l = 0; i + l < k; l++) v[l] = values[i + l];
        store_any(BF16, codes, row * k + i, v, k - i);
    }
}

/* See the top. `scale` and `zero` [1] are the stored ones or NULL. Returns 0, or 1 where there was no memory. */
EXPORT int qplug_quantize(void *codes, float *scales, const void *x, const float *scale, const float *zero, long m, long k, long block, int kind,
                          int number, int places, int least, float low, float high, float divisor, float bound, int mode, int rule,
                          int symmetric, int whole, int divide, int threads) {
    const Rules r = {number, mode, rule, symmetric, whole && mode == DYNAMIC, places, least, low, high, divisor, bound,
                     scale ? *scale : 1.0f, zero ? *zero : 0.0f, divide, block};
    const long stride = round_up(k, VL);
    if (m * k < 1 << 14) threads = 1; /* waking threads costs more */
    float *values = scratch((size_t)(threads * stride) * 4);
    if (!values) return 1;
    float high_all = 0.0f, low_all = 0.0f;
    int missing = 0;
    if (r.whole)
        for (long row = 0; row < m; row++) {
            float top, bottom;
            read_row(kind, x, row, k, values);
            extremes(values, k, &top, &bottom);
            high_all = top > high_all ? top : high_all;
            low_all = bottom < low_all ? bottom : low_all;
            for (long i = 0; i < k; i++) missing |= values[i] != values[i];
        }
    /* One scale for all tokens: where one has a NaN, nothing is known of any. */
    if (missing) high_all = low_all = __builtin_nanf("");
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long t = 0; t < threads; t++)
        for (long row = t * m / threads; row < (t + 1) * m / threads; row++)
            quantize_row(&r, kind, x, row, k, high_all, low_all, values + t * stride, codes, scales);
    free(values);
    return 0;
}
