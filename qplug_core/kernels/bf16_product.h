/* Weight-only products of bfloat16 activations with the dot products of AVX512-BF16: codes become bfloat16 by table, sums are float32.
 *
 * Integers and 8-bit floats are exact in bfloat16, a table of float32 is rounded to it once where it is not. Scales stay outside of the sums,
 * so that the result is that of float32. Only where groups are shorter than FOLD columns and tokens are many, weights are scaled
 * before they are multiplied, and rounded once more: that is exact for FP4 and FP8 whose scales are E8M0 or e4m3, and what serving engines do
 * with all others. Neither rounding is taken where the result is float32, as it is of quantized activations.
 *
 * xs: few tokens [rows/R][KP/2][R][2] in blocks of R rows, many tokens [rows][columns] for each chunk of columns; columns of a unit in the
 * order of `pair_of`.
 */
#ifndef QPLUG_BF16_PRODUCT_H
#define QPLUG_BF16_PRODUCT_H

#include "product.h"

enum { MR16 = 6, CHUNK16 = 256, BLOCK16 = MR16 * 86, WIDE = 2, FOLD = 64 };

typedef __m512bh vb;
INLINE vb both(const uint16_t *x) { int32_t two; memcpy(&two, x, 4); return (vb)_mm512_set1_epi32(two); }

/* The place in x of each of 32 packed columns, which are whole units. */
INLINE __m512i column_order(int type) {
    uint16_t order[32];
    const int unit = unit_of(type);
    for (int i = 0; i < 32; i++) order[i] = (uint16_t)(i / unit * unit + pair_of(type, i % unit / 2, i % 2));
    return _mm512_loadu_si512(order);
}

/* Columns first .. first + count of row `row` to `to`, and the sums of segments s0 .. s1, which they are. */
static void prepare16(int type, const Product *p, long row, long s0, long s1, uint16_t *to) {
    const int unit = unit_of(type);
    const long first = (long)p->segments[4 * s0] * unit, count = (long)p->segments[4 * s1 - 3] * unit - first;
    const __m512i order = column_order(type);
    const uint16_t *x = (const uint16_t *)p->x + row * p->k;
    if (row >= p->m) memset(to, 0, (size_t)count * 2);
    else if (!p->order) {
        for (long k = 0; k < count; k += 32) {
            const __mmask32 some = count - k < 32 ? (1u << (count - k)) - 1 : ~0u;
            _mm512_mask_storeu_epi16(to + k, some, _mm512_permutexvar_epi16(order, _mm512_maskz_loadu_epi16(some, x + first + k)));
        }
    } else {
        int place[32];
        for (int i = 0; i < unit; i++) place[i] = pair_of(type, i / 2, i % 2);
        for (long k = 0; k < count; k += unit)
            for (int i = 0; i < unit; i++) {
                const int32_t from = p->order[first + k + place[i]];
                to[k + i] = from >= 0 ? x[from] : 0;
            }
    }
    if (!p->sums) return;
    const vb ones = (vb)_mm512_set1_epi16(0x3f80);
    for (long s = s0; s < s1; s++) {
        const int32_t *seg = p->segments + 4 * s;
        const long columns = (long)(seg[1] - seg[0]) * unit;
        const uint16_t *from = to + (long)seg[0] * unit - first;
        vf sum = splat(0.0f);
        for (long k = 0; k < columns; k += 32) {
            const __mmask32 some = columns - k < 32 ? (1u << (columns - k)) - 1 : ~0u;
            sum = _mm512_dpbf16_ps(sum, (vb)_mm512_maskz_loadu_epi16(some, from + k), ones);
        }
        p->sums[row * p->count + s] = _mm512_reduce_add_ps(sum) * (p->x_groups > 1 ? x_scale(p, row, seg[3]) : 1.0f);
    }
}

/* H tiles of 16 rows for tokens m0 .. m0+MT, in NA partial sums. */
INLINE void stream16(const int type, const int MT, const int H, const int NA, const Product *p, long tile, long m0) {
    const int unit = unit_of(type), words = words_of(type) * TILE;
    const long apart = p->kp / unit * words; /* from tile to tile */
    const uint32_t *codes = codes_of(type, p, tile);
    const uint16_t *xs = (const uint16_t *)p->xs + m0 * p->kp;
    const Tables tables = *(const Tables *)p->tables;
    const int plain = p->x_groups <= 1 && !p->sums;
    vf total[8][2];
    UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < H; h++) total[m][h] = splat(0.0f);
    for (long s = 0; s < p->count; s++) {
        const int32_t *seg = p->segments + 4 * s;
        vf acc[8][2][4];
        UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < H; h++)
            UNROLL for (int a = 0; a < NA; a++) acc[m][h][a] = splat(0.0f);
        const uint32_t *w = codes + (long)seg[0] * words;
        const uint16_t *x = xs + (long)seg[0] * unit * MT;
        /* Past its end, a tile is followed by one that is being read already. */
        const long ahead = AHEAD + (H == 2 && (codes + apart - w) * 4 < AHEAD ? apart * 4 : 0);
        for (long u = seg[0]; u < seg[1]; u++, w += words, x += unit * MT) {
            __m512i v[2][16];
            UNROLL for (int h = 0; h < H; h++) {
                UNROLL for (int i = 0; i < words; i += 16) prefetch((const char *)(w + h * apart + i) + ahead);
                pairs(type, &tables, w + h * apart, NULL, v[h]);
            }
            UNROLL for (int i = 0; i < unit / 2; i++)
                UNROLL for (int m = 0; m < MT; m++) {
                    const vb two = both(x + (i * MT + m) * 2);
                    UNROLL for (int h = 0; h < H; h++) acc[m][h][i % NA] = _mm512_dpbf16_ps(acc[m][h][i % NA], (vb)v[h][i], two);
                }
        }
        UNROLL for (int h = 0; h < H; h++) {
            const long grid = ((tile + h) * p->groups + seg[2]) * TILE;
            const vf scale = load_scale(p->scale_kind, p->scales, grid);
            UNROLL for (int m = 0; m < MT; m++) UNROLL for (int a = 1; a < NA; a++) acc[m][h][0] += acc[m][h][a];
            if (plain) {
                UNROLL for (int m = 0; m < MT; m++) total[m][h] += scale * acc[m][h][0];
                continue;
            }
            const vf offset = offset_of(type, 1, p, grid, scale);
            UNROLL for (int m = 0; m < MT; m++) {
                total[m][h] += scale * acc[m][h][0] * splat(p->x_groups > 1 ? x_scale(p, m0 + m, seg[3]) : 1.0f);
                if (p->sums) total[m][h] -= offset * splat(p->sums[(m0 + m) * p->count + s]);
            }
        }
    }
    for (int m = 0; m < MT && m0 + m < p->m; m++)
        UNROLL for (int h = 0; h < H; h++) finish(p, m0 + m, (tile + h) * TILE, total[m][h]);
}

/* Tile `tile` and, where `two`, the next one, which share what is loaded of x. Measured: worth it from five tokens on, not for 3 bits. */
INLINE void stream_tokens16(const int type, const Product *p, long tile, int two) {
    if (p->m == 1) stream16(type, 1, 1, 4, p, tile, 0);
    else if (p->m == 2) stream16(type, 2, 1, 4, p, tile, 0);
    else if (p->m <= 4) stream16(type, 4, 1, 2, p, tile, 0);
    else
        for (long m = 0; m < p->m; m += 8)
            if (two) stream16(type, 8, 2, 1, p, tile, m);
            else stream16(type, 8, 1, 2, p, tile, m);
}

/* What is done with sums of products besides their scale: nothing, or a factor for each token and an offset. */
typedef struct { const float *offset, *sum, *by; } Rest;

/* c[MR16][PANEL] (+)= scale[n] * x[m][2 * count] * w[count][PANEL][2]; with rest: times by[m], less offset[n] * sum[m] */
INLINE void multiply16(const uint16_t *x, long stride, const __m512i *w, float *c, long count, const float *scale, const Rest *rest, int first) {
    vf acc[MR16][4];
    const __mmask16 old = first ? 0 : 0xffff;
    UNROLL for (int m = 0; m < MR16; m++) UNROLL for (int j = 0; j < 4; j++) acc[m][j] = splat(0.0f);
    _Pragma("GCC unroll 8")
    for (long k = 0; k < count; k++, w += 4, x += 2) {
        const vb w0 = (vb)w[0], w1 = (vb)w[1], w2 = (vb)w[2], w3 = (vb)w[3];
        UNROLL for (int m = 0; m < MR16; m++) {
            const vb v = both(x + m * stride);
            acc[m][0] = _mm512_dpbf16_ps(acc[m][0], v, w0);
            acc[m][1] = _mm512_dpbf16_ps(acc[m][1], v, w1);
            acc[m][2] = _mm512_dpbf16_ps(acc[m][2], v, w2);
            acc[m][3] = _mm512_dpbf16_ps(acc[m][3], v, w3);
        }
    }
    UNROLL for (int m = 0; m < MR16; m++, c += PANEL)
        UNROLL for (int j = 0; j < 4; j++) {
            vf y = (vf)_mm512_maskz_loadu_ps(old, c + j * VL);
            if (rest) y -= load(rest->offset + j * VL) * splat(rest->sum[m]);
            store(c + j * VL, y + (rest ? acc[m][j] * splat(rest->by[m]) : acc[m][j]) * load(scale + j * VL));
        }
}

/* No parts of their caller, whose constants would take registers from them. */
static __attribute__((noinline)) void scaled16(const uint16_t *x, long stride, const __m512i *w, float *c, long count, const float *scale,
                                               int first) {
    multiply16(x, stride, w, c, count, scale, NULL, first);
}
static __attribute__((noinline)) void corrected16(const uint16_t *x, long stride, const __m512i *w, float *c, long count, const float *scale,
                                                  const Rest *rest, int first) {
    multiply16(x, stride, w, c, count, scale, rest, first);
}

/* Pairs v times scale, less offset, rounded again. */
INLINE __m512i scaled(__m512i v, vf scale, vf offset) {
    const vf low = (vf)_mm512_slli_epi32(v, 16) * scale - offset;
    const vf high = (vf)_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)) * scale - offset;
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    const __m512i order = (__m512i)((vu)_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0) * 0x10001 + 0x100000);
    return _mm512_permutexvar_epi16(order, halves);
}

/* Zero points of 16 rows, which are integers, beside themselves: as half words of pairs. */
INLINE __m512i zero_pairs(const Product *p, long at) {
    return (__m512i)((vu)round_i(load_any(p->scale_kind, p->zeros, at)) * 0x10001);
}

/* Codes of `tiles` tiles and segments s0 .. s1 to bfloat16 [columns / 2][PANEL][2], scaled where `fold`. */
INLINE void dequantize16(const int type, const Product *p, int fold, long tile0, long tiles, long s0, long s1, __m512i *to) {
    const int unit = unit_of(type), words = words_of(type) * TILE;
    const Tables tables = *(const Tables *)p->tables;
    for (long t = 0; t < tiles; t++) {
        const uint32_t *w = codes_of(type, p, tile0 + t) + (long)p->segments[4 * s0] * words;
        __m512i *at = to + t;
        for (long s = s0; s < s1; s++) {
            const int32_t *seg = p->segments + 4 * s;
            const long grid = ((tile0 + t) * p->groups + seg[2]) * TILE;
            __m512i v[16];
            if (type <= INT4 && p->integers) {
                const __m512i zero = zero_pairs(p, grid);
                for (long u = seg[0]; u < seg[1]; u++, w += words) {
                    pairs(type, &tables, w, &zero, v);
                    UNROLL for (int i = 0; i < unit / 2; i++, at += 4) *at = v[i];
                }
                continue;
            }
            const vf scale = load_scale(p->scale_kind, p->scales, grid), offset = offset_of(type, 1, p, grid, scale);
            for (long u = seg[0]; u < seg[1]; u++, w += words) {
                pairs(type, &tables, w, NULL, v);
                UNROLL for (int i = 0; i < unit / 2; i++, at += 4) *at = fold ? scaled(v[i], scale, offset) : v[i];
            }
        }
    }
}

/* Segments s0 .. s1 of one panel, which are multiplied next: brought near in `parts` parts, of which this is number `part`. */
INLINE void fetch16(const int type, const Product *p, long tile0, long s0, long s1, long part, long parts) {
    const long words = words_of(type) * TILE, all = round_up(p->n, TILE) / TILE;
    const int32_t *seg = p->segments + 4 * s0;
    const long bytes = (p->segments[4 * s1 - 3] - seg[0]) * words * 4, from = bytes / 64 * part / parts, to = bytes / 64 * (part + 1) / parts;
    for (long t = tile0; t < tile0 + PANEL / TILE && t < all; t++) {
        const char *codes = (const char *)(codes_of(type, p, t) + seg[0] * words);
        for (long line = from; line < to; line++) _mm_prefetch(codes + 64 * line, _MM_HINT_T1);
        if (part) continue;
        const size_t grid = (size_t)((t * p->groups + seg[2]) * TILE) * width(p->scale_kind);
        _mm_prefetch((const char *)p->scales + grid, _MM_HINT_T1);
        if (p->zeros) _mm_prefetch((const char *)p->zeros + grid, _MM_HINT_T1);
        if (p->shifts) _mm_prefetch((const char *)(p->shifts + (t * p->groups + seg[2]) * TILE), _MM_HINT_T1);
    }
}

/* Segments s0 .. s1 of one chunk that share their scales: pairs of columns from, and how many. */
typedef struct { _Alignas(64) float scale[PANEL], offset[PANEL]; long s0, s1, from, count; } Run;

/* The runs of segments s0 .. s1 for the rows of `tiles` tiles; returns how many. */
INLINE long runs16(const int type, const Product *p, long tile0, long tiles, long s0, long s1, Run *runs) {
    const int unit = unit_of(type);
    Run *run = runs;
    for (long a = s0, b; a < s1; a = b, run++) {
        const int32_t *seg = p->segments + 4 * a;
        for (b = a + 1; b < s1 && (p->fold || p->segments[4 * b + 2] == seg[2]) && (p->x_groups <= 1 || p->segments[4 * b + 3] == seg[3]);) b++;
        run->s0 = a;
        run->s1 = b;
        run->from = (long)(seg[0] - p->segments[4 * s0]) * unit / 2;
        run->count = (long)(p->segments[4 * b - 3] - seg[0]) * unit / 2;
        for (long t = 0; t < PANEL / TILE; t++) {
            vf scale = splat(1.0f), offset = splat(0.0f);
            if (!p->fold && t < tiles) {
                const long grid = ((tile0 + t) * p->groups + seg[2]) * TILE;
                scale = load_scale(p->scale_kind, p->scales, grid);
                if (p->sums) offset = offset_of(type, 1, p, grid, scale);
            }
            store(run->scale + t * TILE, scale);
            store(run->offset + t * TILE, offset);
        }
    }
    return run - runs;
}

/* Segments s0 .. s1, a chunk, of one panel for tokens m0 .. m1, added to c[m1 - m0][PANEL]; next: the first tile and segments of what follows. */
INLINE void chunk16(const int type, const Product *p, long tile0, long s0, long s1, long m0, long m1, long rows, float *c, const long next[3]) {
    __m512i weights[CHUNK16 / 2 * 4];
    Run runs[CHUNK16 / 4];
    const int unit = unit_of(type);
    const long all = round_up(p->n, TILE) / TILE, tiles = all - tile0 < PANEL / TILE ? all - tile0 : PANEL / TILE;
    const long first = (long)p->segments[4 * s0] * unit, columns = (long)p->segments[4 * s1 - 3] * unit - first;
    const uint16_t *x = (const uint16_t *)p->xs + first * rows + m0 * columns;
    if (tiles < PANEL / TILE) memset(weights, 0, sizeof weights);
    dequantize16(type, p, p->fold, tile0, tiles, s0, s1, weights);
    const long count = runs16(type, p, tile0, tiles, s0, s1, runs);
    for (long m = m0; m < m1; m += MR16, x += MR16 * columns, c += MR16 * PANEL) {
        if (next[1] < next[2]) fetch16(type, p, next[0], next[1], next[2], (m - m0) / MR16, (m1 - m0) / MR16);
        if (s1 == p->count)
            for (long i = m; i < m + MR16 && i < p->m; i++)
                own_lines((char *)p->y + (size_t)(i * p->n + tile0 * TILE) * width(p->y_kind), tiles * TILE * (long)width(p->y_kind));
        for (const Run *r = runs; r < runs + count; r++) {
            const __m512i *w = weights + r->from * 4;
            if (p->x_groups <= 1 && !p->sums) {
                scaled16(x + 2 * r->from, columns, w, c, r->count, r->scale, r->s0 == 0);
                continue;
            }
            float sum[MR16] = {0}, by[MR16];
            for (int i = 0; i < MR16; i++) {
                by[i] = p->x_groups > 1 ? x_scale(p, m + i, p->segments[4 * r->s0 + 3]) : 1.0f;
                for (long s = r->s0; p->sums && s < r->s1; s++) sum[i] += p->sums[(m + i) * p->count + s];
            }
            const Rest rest = {r->offset, sum, by};
            corrected16(x + 2 * r->from, columns, w, c, r->count, r->scale, &rest, r->s0 == 0);
        }
    }
}

/* Whether the dot products keep what y can hold of a product. In a small one, rounded tables would show, and float32 costs nothing. */
static int exact_enough(int type, const Product *p) {
    if (type == LUT4 && (p->y_kind == F32 || p->n * p->kp < 1 << 16))
        for (int i = 0; i < 16; i++) {
            uint32_t bits;
            memcpy(&bits, p->table + i, 4);
            if (bits & 0xffff) return 0;
        }
    return 1;
}

static int folds(int type, const Product *p) {
    const int exact = p->scale_kind == E8M0 || (p->scale_kind == E4M3 && type == LUT4);
    return p->kp < p->count * FOLD && (exact || p->y_kind != F32);
}

/* Whether all zero points are integers that codes less them are in a table: such are taken off codes, others off sums. */
static int integers(int type, const Product *p) {
    if (!p->zeros || type > INT4 || p->fold) return 0;
    const vf most = splat((float)(1 << bits_of(type)));
    vi other = {0};
    for (long i = 0; i < round_up(p->n, TILE) * p->groups; i += VL) {
        const vf zero = load_any(p->scale_kind, p->zeros, i), whole = to_float(round_i(zero));
        other |= (vi)((zero != whole) | (zero < splat(0.0f)) | (zero > most));
    }
    int any = 0;
    for (int i = 0; i < VL; i++) any |= other[i];
    return !any;
}

/* Tokens m0 .. m1 of `rows` times the rows of panels n0 .. n1, which share a chunk of x while it is in the cache. */
INLINE void panels16(const int type, const Product *p, long n0, long n1, long m0, long m1, long rows) {
    _Alignas(64) float sums[WIDE][BLOCK16 * PANEL];
    if (p->count == 0) memset(sums, 0, sizeof sums);
    for (long s0 = 0, s1; s0 < p->count; s0 = s1) {
        s1 = chunk_end(type, p, s0, CHUNK16);
        for (long n = n0; n < n1; n++) {
            const int last = n + 1 == n1;
            const long end = last && s1 < p->count ? chunk_end(type, p, s1, CHUNK16) : s1;
            const long next[3] = {(last ? n0 : n + 1) * (PANEL / TILE), last ? s1 : s0, end};
            chunk16(type, p, n * (PANEL / TILE), s0, s1, m0, m1, rows, sums[n - n0], next);
        }
    }
    for (long m = m0; m < m1 && m < p->m; m++)
        for (long n = n0; n < n1; n++)
            for (long j = n * PANEL; j < (n + 1) * PANEL && j < p->n; j += VL) finish(p, m, j, load(sums[n - n0] + (m - m0) * PANEL + j - n * PANEL));
}

#endif
