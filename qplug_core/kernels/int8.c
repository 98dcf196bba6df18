/* W8A8: y[M, N] = s_x[M] * s_w[N] * (q[M, K] - z[M]) * W[N, K]^T + bias, int8 codes, summed exactly in int32.
 *
 * codes  [N/16][KP/DEPTH][16][DEPTH] int8, KP = K rounded up to DEPTH, padding 0. DEPTH is how many columns of one row one lane of
 *        the dot product takes: 4 with VNNI, else 2. qplug_int8_depth() tells it.
 * scales [16 * ceil(N/16)] float32, one for each row
 * sums   [16 * ceil(N/16)] int32, sum of the codes of each row: takes off the zero point of the activations
 *
 * Without VNNI, both codes are widened to 16 bits and multiplied by vpmaddwd: vpmaddubsw would saturate. With VNNI, activations are
 * shifted by 128 to be unsigned, and 128 * sums is taken off. |sum| <= 255 * 128 * K < 2^31 for K <= 65536, which the caller checks.
 */
#include "kept.h"
#include "walk.h"

enum { PANEL = 64, MR = 6, BLOCK = MR * 86, CHUNK = 512, AHEAD = 8192, SMALL = 16 };
#if defined(__AVX512F__)
enum { FEW = 8, PAIR = 2, AT_ONCE = 4 }; /* tokens and tiles of a product with few tokens, tiles of one with many: what registers hold */
#else
enum { FEW = 4, PAIR = 1, AT_ONCE = 1 };
#endif

#if defined(__AVX512VNNI__)
enum { DEPTH = 4, OFFSET = 128 };
typedef uint8_t code; /* of an activation, as the dot product takes it */
INLINE vi weights_at(const int8_t *w) { return load_i(w); }
INLINE vi dot(vi sum, vi w, vi x) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w); }
#elif defined(__AVX512F__)
enum { DEPTH = 2, OFFSET = 0 };
typedef int16_t code;
INLINE vi weights_at(const int8_t *w) { return (vi)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)w)); }
INLINE vi dot(vi sum, vi w, vi x) { return sum + (vi)_mm512_madd_epi16((__m512i)x, (__m512i)w); }
#else
enum { DEPTH = 2, OFFSET = 0 };
typedef int16_t code;
INLINE vi weights_at(const int8_t *w) { return (vi)_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)w)); }
INLINE vi dot(vi sum, vi w, vi x) { return sum + (vi)_mm256_madd_epi16((__m256i)x, (__m256i)w); }
#endif

INLINE vi splat_i(int32_t x) { return (vi){0} + x; }
INLINE vi codes_at(const code *x) { int32_t four; memcpy(&four, x, 4); return splat_i(four); }

typedef struct {
    const code *x; /* [rows/R][KP/DEPTH][R][DEPTH], blocks of R rows */
    const float *x_scales;
    const int32_t *x_zeros; /* [M], or NULL */
    const int8_t *codes;
    const float *scales;
    const int32_t *sums;
    const void *bias;
    void *y;
    long m, n, kp;
    int kind, bias_kind;
} Product;

/* sum[m][h] = dot products of MT tokens with H vectors of rows, in NA partial sums; vectors past the first tile are in the next. */
INLINE void multiply(const int MT, const int H, const int NA, const code *x, const int8_t *w, long kp, int ahead, vi sum[FEW][2]) {
    vi acc[FEW][2][8];
    UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < H; h++) UNROLL for (int a = 0; a < NA; a++) acc[m][h][a] = splat_i(0);
#define STEP(a) { \
        vi v[2]; \
        UNROLL for (int h = 0; h < H; h++) v[h] = weights_at(w + h / NV * TILE * kp + h % NV * VL * DEPTH); \
        UNROLL for (int m = 0; m < MT; m++) { \
            vi xk = codes_at(x + m * DEPTH); \
            UNROLL for (int h = 0; h < H; h++) acc[m][h][a] = dot(acc[m][h][a], v[h], xk); \
        } \
        w += TILE * DEPTH; \
        x += MT * DEPTH; \
    }
    long k = 0;
    for (; k + NA * DEPTH <= kp; k += NA * DEPTH) {
        if (ahead) UNROLL for (int i = 0; i < NA * DEPTH * TILE; i += 64) prefetch(w + ahead + i);
        UNROLL for (int a = 0; a < NA; a++) STEP(a)
    }
    for (; k < kp; k += DEPTH) STEP(0)
#undef STEP
    UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < H; h++) {
        sum[m][h] = acc[m][h][0];
        UNROLL for (int a = 1; a < NA; a++) sum[m][h] += acc[m][h][a];
    }
}

INLINE void finish(const Product *p, long m, long n, vi sum) {
    const long count = p->n - n;
    const int32_t zero = OFFSET + (p->x_zeros ? p->x_zeros[m] : 0);
    if (zero) sum -= load_i(p->sums + n) * zero;
    vf y = to_float(sum) * (load(p->scales + n) * splat(p->x_scales[m]));
    if (p->bias) {
        if (count >= VL) y += load_any(p->bias_kind, p->bias, n);
        else for (long i = 0; i < count; i++) y[i] += load_one(p->bias_kind, p->bias, n + i);
    }
    store_any(p->kind, p->y, m * p->n + n, y, count);
}

/* MT tokens from m0 with H vectors of rows from `tile`. */
#define TOKENS(name, MT, H, NA) \
    static __attribute__((noinline)) void name(const Product *p, long tile, long m0) { \
        vi sum[FEW][2]; \
        multiply(MT, H, NA, p->x + m0 * p->kp, p->codes + tile * TILE * p->kp, p->kp, AHEAD, sum); \
        for (int m = 0; m < MT && m0 + m < p->m; m++) \
            for (int h = 0; h < H; h++) finish(p, m0 + m, tile * TILE + h * VL, sum[m][h]); \
    }
TOKENS(one, 1, NV, 8 / NV)
TOKENS(two, 2, NV, 4 / NV)
TOKENS(four, 4, NV, 2 / NV)
TOKENS(few, FEW, PAIR * NV, 1)
TOKENS(few_last, FEW, NV, 1) /* of an odd count of tiles */

/* c[MR][PANEL] (+)= dot products of MR tokens with T tiles, which are `apart` bytes from each other, over `steps` times DEPTH columns. */
INLINE void multiply_many(const int T, const code *x, const int8_t *w, long apart, int32_t *c, long steps, int first) {
    vi acc[MR][AT_ONCE * NV];
    UNROLL for (int m = 0; m < MR; m++) UNROLL for (int h = 0; h < T * NV; h++) acc[m][h] = splat_i(0);
    for (long k = 0; k < steps; k++, w += TILE * DEPTH, x += MR * DEPTH) {
        vi v[AT_ONCE * NV];
        UNROLL for (int h = 0; h < T * NV; h++) v[h] = weights_at(w + h / NV * apart + h % NV * VL * DEPTH);
        UNROLL for (int m = 0; m < MR; m++) {
            const vi xk = codes_at(x + m * DEPTH);
            UNROLL for (int h = 0; h < T * NV; h++) acc[m][h] = dot(acc[m][h], v[h], xk);
        }
    }
    UNROLL for (int m = 0; m < MR; m++, c += PANEL)
        UNROLL for (int h = 0; h < T * NV; h++) {
            const vi sum = first ? acc[m][h] : load_i(c + h * VL) + acc[m][h];
            memcpy(c + h * VL, &sum, sizeof sum);
        }
}
#define MANY(name, T) \
    static __attribute__((noinline)) void name(const code *x, const int8_t *w, long apart, int32_t *c, long steps, int first) { \
        multiply_many(T, x, w, apart, c, steps, first); \
    }
MANY(many, AT_ONCE)
MANY(many_last, 1)

/* The part from `part` to `end` of `parts` of columns k0 .. k1 of a panel, which are multiplied next, is brought near. */
INLINE void fetch(const Product *p, long t0, long t1, long k0, long k1, long part, long end, long parts) {
    const long lines = (k1 - k0) * TILE / 64;
    for (long t = t0; t < t1; t++) {
        const int8_t *w = p->codes + t * TILE * p->kp + k0 * TILE;
        for (long i = lines * part / parts; i < lines * end / parts; i++) _mm_prefetch((const char *)w + 64 * i, _MM_HINT_T1);
    }
}

/* Tokens m0 .. m1, in whole blocks of MR, times the rows of tiles t0 .. t1, a panel. */
static void panel(const Product *p, long t0, long t1, long m0, long m1) {
    _Alignas(64) int32_t sums[BLOCK * PANEL];
    const long apart = TILE * p->kp;
    if (!p->kp) memset(sums, 0, sizeof sums);
    for (long k0 = 0, k1; k0 < p->kp; k0 = k1) {
        k1 = k0 + CHUNK < p->kp ? k0 + CHUNK : p->kp;
        const long k2 = k1 + CHUNK < p->kp ? k1 + CHUNK : p->kp, steps = (k1 - k0) / DEPTH;
        for (long m = m0; m < m1; m += MR) {
            const code *x = p->x + m * p->kp + k0 * MR;
            fetch(p, t0, t1, k1, k2, m - m0, m + MR - m0, m1 - m0);
            if (k1 == p->kp)
                for (long i = m; i < m + MR && i < p->m; i++)
                    own_lines((char *)p->y + (size_t)(i * p->n + t0 * TILE) * width(p->kind), (t1 - t0) * TILE * (long)width(p->kind));
            long t = t0;
            for (; t + AT_ONCE <= t1; t += AT_ONCE)
                many(x, p->codes + t * apart + k0 * TILE, apart, sums + (m - m0) * PANEL + (t - t0) * TILE, steps, !k0);
            for (; t < t1; t++) many_last(x, p->codes + t * apart + k0 * TILE, apart, sums + (m - m0) * PANEL + (t - t0) * TILE, steps, !k0);
        }
    }
    for (long m = m0; m < m1 && m < p->m; m++)
        for (long j = 0; j < (t1 - t0) * TILE; j += VL) finish(p, m, t0 * TILE + j, load_i(sums + (m - m0) * PANEL + j));
}

/* Codes as the dot product takes them, in blocks of R rows; rows past M are there for whole blocks, and are no result. */
static void widen(const int8_t *q, long row, const Product *p, int R, long k, code *to) {
    to += row / R * R * p->kp + row % R * DEPTH;
    if (row < p->m) {
        q += row * k;
        long i = 0;
        if (R == 1)
            for (; i < k; i++) to[i] = (code)(q[i] + OFFSET);
        else if (DEPTH == 4)
            for (; i + 4 <= k; i += 4) {
                uint32_t four;
                memcpy(&four, q + i, 4);
                four ^= 0x80808080; /* adds 128 to each */
                memcpy(to + i * R, &four, 4);
            }
        for (; i < k; i++) to[i / DEPTH * R * DEPTH + i % DEPTH] = (code)(q[i] + OFFSET);
    }
    for (long i = row < p->m ? k : 0; i < p->kp; i++) to[i / DEPTH * R * DEPTH + i % DEPTH] = 0; /* weights are 0 past K */
}

EXPORT int qplug_int8_depth(void) { return DEPTH; }

/* y[m, n] of codes q[m, k]; see the top. Returns 0, or 1 where there was no memory. */
EXPORT int qplug_int8_product(void *y, const int8_t *q, const float *x_scales, const int32_t *x_zeros, const int8_t *codes,
                              const float *scales, const int32_t *sums, const void *bias, long m, long n, long k,
                              int kind, int bias_kind, int threads) {
    const long kp = round_up(k, DEPTH), tiles = round_up(n, TILE) / TILE;
    const long R = m <= 1 ? 1 : m <= 2 ? 2 : m <= 4 ? 4 : m <= SMALL ? FEW : MR, rows = round_up(m, R);
    code *x = borrow((size_t)(rows * kp) * sizeof(code));
    if (!x) return 1;
    Product p = {x, x_scales, x_zeros, codes, scales, sums, bias, y, m, n, kp, kind, bias_kind};
    if (n * kp < 1 << 16) threads = 1; /* waking threads costs more */
    if (m <= SMALL) {
        for (long i = 0; i < rows; i++) widen(q, i, &p, (int)R, k, x);
        const long at_once = R > 4 ? PAIR : 1, tasks = (tiles + at_once - 1) / at_once;
        Part parts[threads];
        divide(parts, threads, tasks);
#pragma omp parallel num_threads(threads)
        for (long turn = 0; turn < threads; turn++)
            for (Range r; take(parts, threads, tasks, turn, at_once * TILE * kp, &r);)
                for (long t = r.first; t < r.end; t++)
                    for (long j = 0; j < rows; j += R)
                        (R == 1 ? one : R == 2 ? two : R == 4 ? four : at_once * (t + 1) <= tiles ? few : few_last)(&p, at_once * t, j);
    } else {
        const long blocks = (rows + BLOCK - 1) / BLOCK, each = round_up((rows + blocks - 1) / blocks, MR), panels = (n + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (long i = 0; i < rows; i++) widen(q, i, &p, (int)R, k, x);
#pragma omp for schedule(dynamic, 1)
            for (long i = 0; i < panels * blocks; i++) {
                const long t0 = i % panels * (PANEL / TILE), t1 = t0 + PANEL / TILE < tiles ? t0 + PANEL / TILE : tiles;
                const long m0 = i / panels * each, m1 = m0 + each < rows ? m0 + each : rows;
                panel(&p, t0, t1, m0, m1);
            }
        }
    }
    give_back(x);
    return 0;
}

/* One row of x to codes. All in float32 with division, as the definition says; halves round to even.
 * A NaN makes the scale NaN, and so the whole row of the product; an infinite value makes a dynamic scale infinite, and the row NaN. */
static void quantize_row(int kind, const void *x, long row, long k, const float *scale, const int32_t *zero, int symmetric,
                         float divisor, float low, int8_t *q, float *out_scale, int32_t *out_zero) {
    const char *from = (const char *)x + (size_t)row * (size_t)k * width(kind);
    vf high = splat(0.0f), bottom = splat(0.0f);
    vi bad = splat_i(0);
    long i = 0;
    for (; i + VL <= k; i += VL) {
        vf v = load_any(kind, from, i);
        bad |= (vi)(v != v);
        high = vmax(v, high);
        bottom = vmin(v, bottom);
    }
    float top = 0.0f, least = 0.0f;
    int isnan = 0;
    for (int l = 0; l < VL; l++) {
        top = high[l] > top ? high[l] : top;
        least = bottom[l] < least ? bottom[l] : least;
        isnan |= bad[l];
    }
    for (; i < k; i++) {
        float v = load_one(kind, from, i);
        isnan |= v != v;
        top = v > top ? v : top;
        least = v < least ? v : least;
    }
    float s, z = 0.0f;
    if (scale) {
        s = *scale;
        z = zero ? (float)*zero : 0.0f;
    } else if (symmetric) {
        s = (top > -least ? top : -least) / divisor;
    } else {
        s = (top - least) / 255.0f;
        z = __builtin_rintf(-128.0f - least / (s == 0.0f ? 1.0f : s));
        z = z < -128.0f ? -128.0f : z > 127.0f ? 127.0f : z == z ? z : 0.0f;
    }
    const float by = s == 0.0f ? 1.0f : s;
    for (i = 0; i < k; i += VL) {
        vf v;
        const long count = k - i < VL ? k - i : VL;
        if (count == VL) v = load_any(kind, from, i);
        else {
            v = splat(0.0f);
            for (long l = 0; l < count; l++) v[l] = load_one(kind, from, i + l);
        }
        v = v / splat(by) + splat(z);
        v = (vf)((vi)v & (vi)(v == v)); /* NaN has code 0 */
        v = vmin(vmax(v, splat(low)), splat(127.0f));
        int8_t codes[VL];
        store_s8(count == VL ? q + row * k + i : codes, round_i(v));
        if (count < VL) memcpy(q + row * k + i, codes, (size_t)count);
    }
    out_scale[row] = isnan ? __builtin_nanf("") : s;
    out_zero[row] = (int32_t)z;
}

/* Codes q[m, k], scales[m] and zeros[m] (0 where symmetric) of x. `scale` and `zero` are the stored ones, or NULL: dynamic. */
EXPORT void qplug_int8_quantize(int8_t *q, float *scales, int32_t *zeros, const void *x, const float *scale, const int32_t *zero,
                                long m, long k, int kind, int symmetric, float divisor, float low, int threads) {
    if (m * k < 1 << 14) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < m; i++) quantize_row(kind, x, i, k, scale, zero, symmetric, divisor, low, q, scales, zeros);
}

/* Both in one call. */
EXPORT int qplug_w8a8(void *y, const void *x, const float *scale, const int32_t *zero, const int8_t *codes, const float *scales,
                      const int32_t *sums, const void *bias, long m, long n, long k, int kind, int bias_kind, int symmetric,
                      float divisor, float low, int threads) {
    int8_t *q = borrow((size_t)(m * k));
    float *x_scales = scratch((size_t)m * 4);
    int32_t *x_zeros = scratch((size_t)m * 4);
    int failed = !q || !x_scales || !x_zeros;
    if (!failed) {
        qplug_int8_quantize(q, x_scales, x_zeros, x, scale, zero, m, k, kind, symmetric, divisor, low, threads);
        failed = qplug_int8_product(y, q, x_scales, symmetric ? NULL : x_zeros, codes, scales, sums, bias, m, n, k, kind, bias_kind, threads);
    }
    give_back(q);
    free(x_scales);
    free(x_zeros);
    return failed;
}

#include "int8_experts.h"
