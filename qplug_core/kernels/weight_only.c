/* Weight-only integer products: y[M, N] = x[M, K] * W[N, K]^T + bias, W of 2, 3, 4 or 8 bits, computed in float32.
 *
 * A row of W has K codes in groups that share a scale s and a zero point z: w = (u - z) * s. Packing sorts the columns by
 * group and pads each group to whole units, so K grows to KP; `order` says where each column was.
 *
 * codes    [N/16][KP/unit][unit * bits / 32][16] uint32, a word for each of 16 rows; unit 16, 32, 8 columns for 2, 3, 4 bits,
 *          in the words from the lowest bit up. 3 bits: ten codes in each of three words; the bits left over make codes
 *          30 and 31 (low two bits in the first and the second word, high bits in the third).
 *          8 bits: [N/16][KP][16] int8, signed, unit 4.
 * scales   [N/16][G][16] float32, bfloat16 or float16
 * zeros    like scales, or NULL: then 2^(bits-1), the middle of the unsigned codes; with 8 bits 0
 * segments [S][3] int32: first unit, end unit, group. At most 128 columns each, in order, so that sums stay short.
 * order    [KP] int32: column of x for each packed column, -1 for padding (x is 0 there); NULL where it is the identity
 *
 * Few tokens (M <= SMALL): the codes are streamed once and multiplied from registers. A field of a word is not shifted down: it is
 * masked and converted where it lies, and x carries the power of two. Zero points are taken off the sum: s * (sum(x u) - z * sum(x)).
 * Many tokens: a panel of 64 rows is dequantized to a buffer, segment by segment, then multiplied as float32.
 */
#include "vec.h"

enum { SMALL = 16, PANEL = 64, CHUNK = 256, SEGMENT = 128, AHEAD = 8192 };
#if defined(__AVX512F__)
enum { MR = 12, NR = 2 * VL };
#else
enum { MR = 6, NR = 2 * VL };
#endif
enum { BLOCK = 16 * 12 }; /* tokens that one task multiplies with a panel */

typedef struct {
    const void *x;
    const uint32_t *codes;
    const void *scales, *zeros, *bias;
    const int32_t *segments, *order;
    void *y;
    long m, n, k, kp, groups, count; /* count of segments */
    int kind, scale_kind, bias_kind;
    float *xs;   /* [rows/R][KP][R] float32: x in packed order, in blocks of R rows, the last filled with zeros */
    float *sums; /* [rows, S] sums of x over each segment */
} Product;

INLINE int unit_of(int bits) { return bits == 2 ? 16 : bits == 3 ? 32 : bits == 4 ? 8 : 4; }
INLINE int words_of(int bits) { return bits == 3 ? 3 : 1; }

/* The power of two by which field j of a unit lies too high: its place in a half word (in 15 bits, for 3 bits). */
INLINE int place_of(int bits, int j) {
    if (bits == 8) return 0;
    if (bits == 3) return j < 30 ? j % 5 * 3 : 0;
    return j * bits % 16;
}

/* Masks of fields by place. Kernels hold them behind a pointer that the compiler cannot see through: it would keep all of them in
 * registers, and spill sums in their place. */
#define ALL(x) {x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}
#define MASKS(m) {ALL((m)), ALL((m) << 1), ALL((m) << 2), ALL((m) << 3), ALL((m) << 4), ALL((m) << 5), ALL((m) << 6), ALL((m) << 7), \
                  ALL((m) << 8), ALL((m) << 9), ALL((m) << 10), ALL((m) << 11), ALL((m) << 12), ALL((m) << 13), ALL((m) << 14)}
typedef int32_t Mask[TILE];
static const _Alignas(64) Mask masks_2[] = MASKS(3), masks_3[] = MASKS(7), masks_4[] = MASKS(15);

INLINE const Mask *masks_of(int bits) {
    const Mask *masks = bits == 2 ? masks_2 : bits == 3 ? masks_3 : masks_4;
    __asm__("" : "+r"(masks));
    return masks;
}

/* Field j of the unit at w, of rows h*VL and on, as float32 times 2^place. bits, j and h are constants. */
INLINE vf field(int bits, const Mask *masks, const uint32_t *w, int j, int h) {
    if (bits == 8) return load_s8((const int8_t *)w + j * TILE + h * VL);
    const uint32_t *p = w + h * VL;
    if (bits == 3) {
        vu last = (vu)load_i(p + 2 * TILE);
        if (j == 30) return to_float((vi)(((vu)load_i(p) >> 30) | ((last >> 30 & 1) << 2)));
        if (j == 31) return to_float((vi)(((vu)load_i(p + TILE) >> 30) | (last >> 31 << 2)));
        vu v = (vu)load_i(p + j / 10 * TILE);
        return to_float((vi)(j % 10 < 5 ? v : v >> 15) & load_i(masks[place_of(bits, j)]));
    }
    vu v = (vu)load_i(p);
    return to_float((vi)(j * bits < 16 ? v : v >> 16) & load_i(masks[place_of(bits, j)]));
}

INLINE vf zero_of(int bits, const Product *p, long at) {
    if (p->zeros) {
        vf z = load_any(p->scale_kind, p->zeros, at);
        return bits == 8 ? z - 128.0f : z;
    }
    return splat(bits == 8 ? 0.0f : (float)(1 << (bits - 1)));
}

INLINE vf bias_of(const Product *p, long n, long count) {
    if (!p->bias) return splat(0.0f);
    if (count >= VL) return load_any(p->bias_kind, p->bias, n);
    float b[VL] = {0};
    for (long i = 0; i < count; i++) b[i] = load_one(p->bias_kind, p->bias, n + i);
    return load(b);
}

/* Row `row` of x to its block of R rows in p->xs, segment by segment. With sums: each value scaled for its place, and the sums. */
static void prepare(int bits, const Product *p, int R, long row) {
    const int unit = unit_of(bits);
    const char *x = (const char *)p->x + (size_t)row * (size_t)p->k * width(p->kind);
    float *to = p->xs + row / R * R * p->kp + row % R;
    float factor[32];
    for (int j = 0; j < unit; j++) factor[j] = p->sums ? 1.0f / (float)(1 << place_of(bits, j)) : 1.0f;
    for (long s = 0; s < p->count; s++) {
        const long first = (long)p->segments[3 * s] * unit, columns = (long)p->segments[3 * s + 1] * unit - first;
        float values[SEGMENT] = {0};
        if (row < p->m) {
            long k = 0;
            if (!p->order)
                for (; k + VL <= columns; k += VL) store(values + k, load_any(p->kind, x, first + k));
            for (; k < columns; k++) {
                const long from = p->order ? p->order[first + k] : first + k;
                if (from >= 0) values[k] = load_one(p->kind, x, from);
            }
        }
        if (p->sums) {
            vf sum = splat(0.0f);
            for (long k = 0; k < SEGMENT; k += VL) sum += load(values + k);
            float total = 0.0f;
            for (int l = 0; l < VL; l++) total += sum[l];
            p->sums[row * p->count + s] = total;
        }
        for (long k = 0; k < columns; k += unit)
            for (int l = 0; l < unit; l++) to[(first + k + l) * R] = values[k + l] * factor[l];
    }
}

/* One tile of 16 rows for tokens m0 .. m0+MT, H of its vectors at a time, in NA partial sums. */
INLINE void stream(const int bits, const int MT, const int H, const int NA, const Product *p, long tile, long m0) {
    const int unit = unit_of(bits), words = words_of(bits) * TILE;
    const uint32_t *codes = p->codes + tile * (p->kp / unit) * words;
    const float *xs = p->xs + m0 * p->kp; /* [KP][MT] */
    vf total[8][NV];
    UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < NV; h++) total[m][h] = splat(0.0f);
    for (long s = 0; s < p->count; s++) {
        const int32_t *seg = p->segments + 3 * s;
        const long grid = (tile * p->groups + seg[2]) * TILE;
        for (int h0 = 0; h0 < NV; h0 += H) {
            vf acc[8][2][8];
            UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < H; h++)
                UNROLL for (int a = 0; a < NA; a++) acc[m][h][a] = splat(0.0f);
            const uint32_t *w = codes + (long)seg[0] * words + h0 * (bits == 8 ? VL / 4 : VL);
            const float *x = xs + (long)seg[0] * unit * MT;
            for (long u = seg[0]; u < seg[1]; u++, w += words, x += unit * MT) {
                const Mask *masks = masks_of(bits);
                if (h0 == 0) UNROLL for (int i = 0; i < words; i += 16) prefetch((const char *)(w + i) + AHEAD);
                UNROLL for (int j = 0; j < unit; j++) {
                    vf v[2];
                    UNROLL for (int h = 0; h < H; h++) v[h] = field(bits, masks, w, j, h);
                    UNROLL for (int m = 0; m < MT; m++) {
                        vf xk = splat(x[j * MT + m]);
                        UNROLL for (int h = 0; h < H; h++) acc[m][h][j % NA] += xk * v[h];
                    }
                }
            }
            UNROLL for (int h = 0; h < H; h++) {
                vf scale = load_any(p->scale_kind, p->scales, grid + (h0 + h) * VL);
                vf zero = zero_of(bits, p, grid + (h0 + h) * VL);
                UNROLL for (int m = 0; m < MT; m++) {
                    vf sum = acc[m][h][0];
                    UNROLL for (int a = 1; a < NA; a++) sum += acc[m][h][a];
                    total[m][h0 + h] += scale * (sum - zero * splat(p->sums[(m0 + m) * p->count + s]));
                }
            }
        }
    }
    for (int m = 0; m < MT && m0 + m < p->m; m++)
        for (int h = 0; h < NV; h++) {
            long n = tile * TILE + h * VL;
            store_any(p->kind, p->y, (m0 + m) * p->n + n, total[m][h] + bias_of(p, n, p->n - n), p->n - n);
        }
}

/* Rows of x in one block of xs, for the path with few tokens. */
static int tokens_at_once(long m) { return m <= 1 ? 1 : m <= 2 ? 2 : m <= 4 ? 4 : 8; }

INLINE void stream_tokens(const int bits, const Product *p, long tile) {
    /* Measured with AVX2: more vectors or sums at once make GCC spill; both are enough to hide the latency of the sums. */
    if (p->m == 1) stream(bits, 1, bits == 3 ? 1 : NV, NV == 1 ? 8 : bits == 3 ? 4 : 2, p, tile, 0);
    else if (p->m == 2) stream(bits, 2, 1, 4, p, tile, 0);
    else if (p->m <= 4) stream(bits, 4, 1, 2, p, tile, 0);
    else for (long m = 0; m < p->m; m += 8) stream(bits, 8, 1, 1, p, tile, m);
}

/* Weights of `tiles` tiles and segments s0 .. s1 to float32 [tile * 16 / NR][columns][NR]. */
INLINE void dequantize(const int bits, const Product *p, long tile0, long tiles, long s0, long s1, long columns, float *to) {
    const int unit = unit_of(bits), words = words_of(bits) * TILE;
    const long first = p->segments[3 * s0];
    for (long t = 0; t < tiles; t++) {
        const uint32_t *codes = p->codes + (tile0 + t) * (p->kp / unit) * words;
        for (long s = s0; s < s1; s++) {
            const int32_t *seg = p->segments + 3 * s;
            UNROLL for (int h = 0; h < NV; h++) {
                const long grid = ((tile0 + t) * p->groups + seg[2]) * TILE + h * VL;
                const vf scale = load_any(p->scale_kind, p->scales, grid), zero = zero_of(bits, p, grid);
                const long lane = t * TILE + h * VL;
                float *at = to + lane / NR * columns * NR + lane % NR + (seg[0] - first) * unit * NR;
                const uint32_t *w = codes + (long)seg[0] * words;
                const Mask *masks = masks_of(bits);
                for (long u = seg[0]; u < seg[1]; u++, w += words)
                    UNROLL for (int j = 0; j < unit; j++, at += NR) {
                        vf value = field(bits, masks, w, j, h) * splat(1.0f / (float)(1 << place_of(bits, j)));
                        store(at, (value - zero) * scale);
                    }
            }
        }
    }
}

/* c[MR][NR of PANEL] (+)= x[columns][MR] * w[columns][NR]. No part of its callers, whose constants would take registers from it. */
static __attribute__((noinline)) void multiply(const float *x, const float *w, float *c, long columns, int first) {
    vf acc[MR][2];
    UNROLL for (int m = 0; m < MR; m++) acc[m][0] = acc[m][1] = splat(0.0f);
    for (long k = 0; k < columns; k++, w += NR, x += MR) {
        vf w0 = load(w), w1 = load(w + VL);
        UNROLL for (int m = 0; m < MR; m++) {
            acc[m][0] += splat(x[m]) * w0;
            acc[m][1] += splat(x[m]) * w1;
        }
    }
    UNROLL for (int m = 0; m < MR; m++, c += PANEL) {
        store(c, first ? acc[m][0] : load(c) + acc[m][0]);
        store(c + VL, first ? acc[m][1] : load(c + VL) + acc[m][1]);
    }
}

/* Tokens m0 .. m1 times the rows of one panel. */
INLINE void panel(const int bits, const Product *p, long index, long m0, long m1) {
    _Alignas(64) float weights[PANEL * CHUNK], sums[BLOCK * PANEL];
    const int unit = unit_of(bits);
    const long tile0 = index * (PANEL / TILE), all = round_up(p->n, TILE) / TILE;
    const long tiles = all - tile0 < PANEL / TILE ? all - tile0 : PANEL / TILE;
    const long lanes = round_up(tiles * TILE, NR);
    if (tiles * TILE < lanes) memset(weights, 0, sizeof weights);
    if (p->count == 0) memset(sums, 0, sizeof sums);
    for (long s0 = 0, s1; s0 < p->count; s0 = s1) {
        const long first = p->segments[3 * s0];
        for (s1 = s0 + 1; s1 < p->count && (p->segments[3 * s1 + 1] - first) * unit <= CHUNK;) s1++;
        const long columns = (p->segments[3 * s1 - 2] - first) * unit;
        dequantize(bits, p, tile0, tiles, s0, s1, columns, weights);
        for (long m = m0; m < m1; m += MR)
            for (long j = 0; j < lanes; j += NR)
                multiply(p->xs + m * p->kp + first * unit * MR, weights + j * columns, sums + (m - m0) * PANEL + j, columns, s0 == 0);
    }
    for (long m = m0; m < m1 && m < p->m; m++)
        for (long j = 0; j < tiles * TILE; j += VL) {
            long n = index * PANEL + j;
            store_any(p->kind, p->y, m * p->n + n, load(sums + (m - m0) * PANEL + j) + bias_of(p, n, p->n - n), p->n - n);
        }
}

/* The kernels of one width: OpenMP would outline loops before a constant width reached them. */
typedef struct {
    int bits;
    void (*stream)(const Product *p, long tile);
    void (*panel)(const Product *p, long index, long m0, long m1);
} Variant;

#define VARIANT(bits) \
    static void stream_##bits(const Product *p, long tile) { stream_tokens(bits, p, tile); } \
    static void panel_##bits(const Product *p, long index, long m0, long m1) { panel(bits, p, index, m0, m1); }
VARIANT(2)
VARIANT(3)
VARIANT(4)
VARIANT(8)
static const Variant variants[] = {{2, stream_2, panel_2}, {3, stream_3, panel_3}, {4, stream_4, panel_4}, {8, stream_8, panel_8}};

static void run(const Variant *variant, const Product *p, int threads) {
    const long tiles = round_up(p->n, TILE) / TILE;
    if (p->m <= SMALL) {
        const int R = tokens_at_once(p->m);
        for (long m = 0; m < round_up(p->m, R); m++) prepare(variant->bits, p, R, m);
        const long share = tiles / (threads * 8) + 1;
#pragma omp parallel for schedule(dynamic, share) num_threads(threads)
        for (long t = 0; t < tiles; t++) variant->stream(p, t);
        return;
    }
    const long rows = round_up(p->m, MR), blocks = (rows + BLOCK - 1) / BLOCK, panels = (p->n + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long m = 0; m < rows; m++) prepare(variant->bits, p, MR, m);
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < panels * blocks; i++) {
            long m0 = i / panels * BLOCK;
            variant->panel(p, i % panels, m0, m0 + BLOCK < rows ? m0 + BLOCK : rows);
        }
    }
}

/* y[m, n]; see the top for the arrays. `kind` is of x and y. Returns 0, or 1 where there was no memory. */
EXPORT int qplug_weight_only(void *y, const void *x, const void *codes, const void *scales, const void *zeros, const void *segments,
                             const void *order, const void *bias, long m, long n, long k, long kp, long groups, long count,
                             int bits, int kind, int scale_kind, int bias_kind, int threads) {
    Product p = {x, codes, scales, zeros, bias, segments, order, y, m, n, k, kp, groups, count, kind, scale_kind, bias_kind, 0, 0};
    const int small = m <= SMALL;
    const long rows = round_up(m, small ? 8 : MR);
    p.xs = scratch((size_t)(rows * kp) * 4);
    p.sums = small ? scratch((size_t)(rows * count) * 4) : NULL;
    if (!p.xs || (small && !p.sums)) {
        free(p.xs);
        free(p.sums);
        return 1;
    }
    if (n * kp < 1 << 16) threads = 1; /* waking threads costs more */
    run(&variants[bits == 8 ? 3 : bits - 2], &p, threads);
    free(p.xs);
    free(p.sums);
    return 0;
}
