/* WINT2 (arXiv:2507.07145) as it is stored: y[M, N] = x[M, K] * W[N, K]^T + bias, one byte for four columns.
 *
 * A byte u is the code c = floor(u * slope + offset + 0.5), in float32 with every operation rounded; weight j of its four is
 * (local * super) * ((c >> (9 - 3j) & 63) - 32). Codes are 0 .. 32767, which decoding has checked.
 *
 * codes  [N/16][K/4][16] uint8, a byte for each of 16 rows; K is a multiple of 64
 * maps   [N/16][3][16] float32: slope, offset, super of each row
 * locals [N/16][K/64][16] uint8, 0 .. 15
 *
 * Few tokens: codes are decoded in registers and multiplied there, as bfloat16 with AVX512-BF16 and bfloat16 activations, else as float32.
 * Many tokens: qplug_wint2_bytes makes int8 of them (the layout of codes.h), and the product of 8 bits takes those.
 */
#include "experts.h"

enum { GROUP = 64, BYTES = GROUP / 4, AHEAD = 4096 };

typedef struct {
    void *y;
    const void *x, *bias;
    const uint8_t *codes, *locals;
    const float *maps, *xs; /* xs: x in float32 [M][K], or NULL where x is taken as it is */
    long m, n, k;
    int kind, bias_kind;
} Product;

/* The compiler would fuse the operations, which rounds once instead of twice. */
#if defined(__AVX512F__)
#define ROUNDED(x) __asm__("" : "+v"(x))
#else
#define ROUNDED(x) __asm__("" : "+x"(x))
#endif

/* Codes of VL bytes. */
INLINE vi code_of(const uint8_t *bytes, vf slope, vf offset) {
    vf y = to_float(load_u8(bytes)) * slope;
    ROUNDED(y);
    y += offset;
    ROUNDED(y);
    y += splat(0.5f);
    return __builtin_convertvector(y, vi); /* towards zero, which is down: codes are not negative */
}

INLINE void finish(const Product *p, long m, long n, vf sum) {
    const long count = p->n - n;
    if (p->bias) {
        if (count >= VL) sum += load_any(p->bias_kind, p->bias, n);
        else for (long i = 0; i < count; i++) sum[i] += load_one(p->bias_kind, p->bias, n + i);
    }
    store_any(p->kind, p->y, m * p->n + n, sum, count);
}

INLINE vf super_scale(const uint8_t *locals, const float *map) { return to_float(load_u8(locals)) * load(map + 2 * TILE); }

/* One tile of 16 rows for tokens m0 .. m0+MT. */
INLINE void stream(const int MT, const Product *p, long tile, long m0) {
    const float *map = p->maps + tile * 3 * TILE;
    for (int h = 0; h < NV; h++, map += VL) {
        const uint8_t *bytes = p->codes + tile * (p->k / 4) * TILE + h * VL, *locals = p->locals + tile * (p->k / GROUP) * TILE + h * VL;
        const vf slope = load(map), offset = load(map + TILE);
        vf total[8];
        UNROLL for (int m = 0; m < MT; m++) total[m] = splat(0.0f);
        for (long k = 0; k < p->k; k += GROUP, locals += TILE) {
            const float *x = p->xs + m0 * p->k + k;
            vf sum[8];
            UNROLL for (int m = 0; m < MT; m++) sum[m] = splat(0.0f);
            for (int i = 0; i < BYTES; i++, bytes += TILE, x += 4) {
                const vi code = code_of(bytes, slope, offset);
                if (i % 4 == 0) prefetch(bytes + AHEAD);
                UNROLL for (int j = 0; j < 4; j++) {
                    const vf value = to_float((code >> (9 - 3 * j) & 63) - 32);
                    UNROLL for (int m = 0; m < MT; m++) sum[m] += splat(x[m * p->k + j]) * value;
                }
            }
            const vf scale = super_scale(locals, map);
            UNROLL for (int m = 0; m < MT; m++) total[m] += scale * sum[m];
        }
        for (int m = 0; m < MT && m0 + m < p->m; m++) finish(p, m0 + m, tile * TILE + h * VL, total[m]);
    }
}

#if defined(__AVX512BF16__)
/* As above, for x in bfloat16. */
INLINE void stream16(const int MT, const Product *p, long tile, long m0) {
    uint16_t table[64];
    for (int i = 0; i < 64; i++) {
        const float value = (float)(i - 32);
        uint32_t bits;
        memcpy(&bits, &value, 4);
        table[i] = (uint16_t)(bits >> 16); /* small integers are exact */
    }
    const __m512i low = _mm512_loadu_si512(table), high = _mm512_loadu_si512(table + 32);
    const __m512i first = _mm512_set1_epi32(6 << 16 | 9), second = _mm512_set1_epi32(0 << 16 | 3);
    const float *map = p->maps + tile * 3 * TILE;
    const uint8_t *bytes = p->codes + tile * (p->k / 4) * TILE, *locals = p->locals + tile * (p->k / GROUP) * TILE;
    const vf slope = load(map), offset = load(map + TILE);
    vf total[8];
    UNROLL for (int m = 0; m < MT; m++) total[m] = splat(0.0f);
    for (long k = 0; k < p->k; k += GROUP, locals += TILE) {
        const uint16_t *x = (const uint16_t *)p->x + m0 * p->k + k;
        vf sum[8][2];
        UNROLL for (int m = 0; m < MT; m++) sum[m][0] = sum[m][1] = splat(0.0f);
        for (int i = 0; i < BYTES; i++, bytes += TILE, x += 4) {
            const __m512i code = (__m512i)code_of(bytes, slope, offset), both = _mm512_or_si512(code, _mm512_slli_epi32(code, 16));
            if (i % 4 == 0) prefetch(bytes + AHEAD);
            /* The table is looked up by the six lowest bits of each half. */
            const __m512i w01 = _mm512_permutex2var_epi16(low, _mm512_srlv_epi16(both, first), high);
            const __m512i w23 = _mm512_permutex2var_epi16(low, _mm512_srlv_epi16(both, second), high);
            UNROLL for (int m = 0; m < MT; m++) {
                int32_t x01, x23;
                memcpy(&x01, x + m * p->k, 4);
                memcpy(&x23, x + m * p->k + 2, 4);
                sum[m][0] = _mm512_dpbf16_ps(sum[m][0], (__m512bh)w01, (__m512bh)_mm512_set1_epi32(x01));
                sum[m][1] = _mm512_dpbf16_ps(sum[m][1], (__m512bh)w23, (__m512bh)_mm512_set1_epi32(x23));
            }
        }
        const vf scale = super_scale(locals, map);
        UNROLL for (int m = 0; m < MT; m++) total[m] += scale * (sum[m][0] + sum[m][1]);
    }
    for (int m = 0; m < MT && m0 + m < p->m; m++) finish(p, m0 + m, tile * TILE, total[m]);
}
#endif

#define TOKENS(MT) static __attribute__((noinline)) void tokens_##MT(const Product *p, long tile, long m0) { stream(MT, p, tile, m0); }
TOKENS(1) TOKENS(2) TOKENS(4) TOKENS(8)
#if defined(__AVX512BF16__)
#define TOKENS16(MT) static __attribute__((noinline)) void tokens16_##MT(const Product *p, long tile, long m0) { stream16(MT, p, tile, m0); }
TOKENS16(1) TOKENS16(2) TOKENS16(4) TOKENS16(8)
#endif

/* All tokens, 8, 4, 2 or 1 at a time. */
static void multiply(const Product *p, long tile) {
    for (long m = 0, some; m < p->m; m += some) {
        const long left = p->m - m;
        some = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
#if defined(__AVX512BF16__)
        if (!p->xs) {
            (some == 8 ? tokens16_8 : some == 4 ? tokens16_4 : some == 2 ? tokens16_2 : tokens16_1)(p, tile, m);
            continue;
        }
#endif
        (some == 8 ? tokens_8 : some == 4 ? tokens_4 : some == 2 ? tokens_2 : tokens_1)(p, tile, m);
    }
}

/* y[m, n]; see the top. `kind`: of x and y. Returns 0, or 1 where there was no memory. */
EXPORT int qplug_wint2(void *y, const void *x, const uint8_t *codes, const float *maps, const uint8_t *locals, const void *bias, long m, long n,
                       long k, int kind, int bias_kind, int threads) {
    Product p = {y, x, bias, codes, locals, maps, NULL, m, n, k, kind, bias_kind};
    float *xs = NULL;
#if defined(__AVX512BF16__)
    const int as_it_is = kind == BF16;
#else
    const int as_it_is = 0;
#endif
    if (!as_it_is) {
        xs = scratch((size_t)(m * k) * 4);
        if (!xs) return 1;
        for (long i = 0; i < m * k; i += VL) store(xs + i, load_any(kind, x, i)); /* K is a multiple of VL */
        p.xs = xs;
    }
    const long tiles = round_up(n, TILE) / TILE, share = tiles / (threads * 8) + 1;
    if (n * k < 1 << 16) threads = 1; /* waking threads costs more */
#pragma omp parallel for schedule(dynamic, share) num_threads(threads)
    for (long t = 0; t < tiles; t++) multiply(&p, t);
    free(xs);
    return 0;
}

static int wint2_expert(const void *call, long e, long m0, long m, int threads) {
    const Product *p = call;
    const long tiles = round_up(p->n, TILE) / TILE, values = tiles * TILE;
    return qplug_wint2((char *)p->y + (size_t)(m0 * p->n) * width(p->kind), (const char *)p->x + (size_t)(m0 * p->k) * width(p->kind),
                       p->codes + e * values * (p->k / 4), p->maps + e * values * 3, p->locals + e * values * (p->k / GROUP),
                       part(p->bias, (long)((size_t)p->n * width(p->bias_kind)), e), m, p->n, p->k, p->kind, p->bias_kind, threads);
}

/* y[t, n] of x[t, k], sorted by expert; [E] in front of codes, maps, locals and bias. Rows past the last end are 0. */
EXPORT int qplug_wint2_experts(void *y, const void *x, const uint8_t *codes, const float *maps, const uint8_t *locals, const void *bias,
                               const int64_t *ends, long experts, long t, long n, long k, int kind, int bias_kind, int threads) {
    const Product p = {y, x, bias, codes, locals, maps, NULL, t, n, k, kind, bias_kind};
    const long last = experts ? ends[experts - 1] : 0;
    if (last < t) memset((char *)y + (size_t)(last * n) * width(kind), 0, (size_t)((t - last) * n) * width(kind));
    return each_expert(wint2_expert, &p, ends, experts, t, threads);
}

/* values [N/16][K][16] int8 and scales [N/16][K/64][16] float32 of a whole weight. */
EXPORT void qplug_wint2_bytes(int8_t *values, float *scales, const uint8_t *codes, const float *maps, const uint8_t *locals, long n, long k,
                              int threads) {
    const long tiles = round_up(n, TILE) / TILE;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (long t = 0; t < tiles; t++)
        for (int h = 0; h < NV; h++) {
            const float *map = maps + t * 3 * TILE + h * VL;
            const vf slope = load(map), offset = load(map + TILE);
            for (long i = 0; i < k / 4; i++) {
                const vi code = code_of(codes + (t * (k / 4) + i) * TILE + h * VL, slope, offset);
                for (int j = 0; j < 4; j++) store_s8(values + (t * k + 4 * i + j) * TILE + h * VL, (code >> (9 - 3 * j) & 63) - 32);
            }
            for (long g = 0; g < k / GROUP; g++) {
                const long at = (t * (k / GROUP) + g) * TILE + h * VL;
                store(scales + at, super_scale(locals + at, map));
            }
        }
}
