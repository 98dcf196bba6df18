/* Weight-only products in float32, for every instruction set.
 *
 * Few tokens: the codes are streamed once and multiplied from registers. A field of a word is not shifted down: it is masked and
 * converted where it lies, and x carries the power of two. Zero points are taken off the sum: s * sum(x u) - s z * sum(x).
 * Many tokens: a panel of 64 rows is dequantized to a buffer, chunk by chunk, then multiplied.
 *
 * xs: [rows/R][KP][R] float32, in blocks of R rows, the last filled with zeros.
 */
#ifndef QPLUG_FLOAT_PRODUCT_H
#define QPLUG_FLOAT_PRODUCT_H

#include "product.h"

enum { CHUNK = 256 };
#if defined(__AVX512F__)
enum { MR = 12, NR = 2 * VL };
#else
enum { MR = 6, NR = 2 * VL };
#endif
enum { BLOCK = 16 * 12 }; /* tokens that one task multiplies with a panel */

/* Row `row` of x to its block of R rows in p->xs, segment by segment. With sums: each value scaled for its place, and the sums. */
static void prepare(int type, const Product *p, int R, long row) {
    const int unit = unit_of(type);
    float *to = (float *)p->xs + row / R * R * p->kp + row % R;
    float factor[32];
    for (int j = 0; j < unit; j++) factor[j] = p->sums ? 1.0f / (float)(1 << place_of(type, j)) : 1.0f;
    for (long s = 0; s < p->count; s++) {
        const int32_t *seg = p->segments + 4 * s;
        const long first = (long)seg[0] * unit, columns = (long)seg[1] * unit - first;
        _Alignas(64) float values[SEGMENT];
        gather(p, row, first, columns, values);
        const float by = p->x_groups > 1 ? x_scale(p, row, seg[3]) : 1.0f;
        if (by != 1.0f) for (long k = 0; k < columns; k++) values[k] *= by;
        if (p->sums) {
            vf sum = splat(0.0f);
            for (long k = columns; k < SEGMENT && k % VL; k++) values[k] = 0.0f;
            for (long k = 0; k < columns; k += VL) sum += load(values + k);
            float total = 0.0f;
            for (int l = 0; l < VL; l++) total += sum[l];
            p->sums[row * p->count + s] = total;
        }
        for (long k = 0; k < columns; k += unit)
            for (int l = 0; l < unit; l++) to[(first + k + l) * R] = values[k + l] * factor[l];
    }
}

/* One tile of 16 rows for tokens m0 .. m0+MT, H of its vectors at a time, in NA partial sums. */
INLINE void stream(const int type, const int MT, const int H, const int NA, const Product *p, long tile, long m0) {
    const int unit = unit_of(type), words = words_of(type) * TILE;
    const uint32_t *codes = codes_of(type, p, tile);
    const float *xs = (const float *)p->xs + m0 * p->kp; /* [KP][MT] */
    vf total[8][NV];
    UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < NV; h++) total[m][h] = splat(0.0f);
    for (long s = 0; s < p->count; s++) {
        const int32_t *seg = p->segments + 4 * s;
        const long grid = (tile * p->groups + seg[2]) * TILE;
        for (int h0 = 0; h0 < NV; h0 += H) {
            vf acc[8][2][8];
            UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < H; h++)
                UNROLL for (int a = 0; a < NA; a++) acc[m][h][a] = splat(0.0f);
            const uint32_t *w = codes + (long)seg[0] * words + h0 * (bits_of(type) == 8 ? VL / 4 : VL);
            const float *x = xs + (long)seg[0] * unit * MT;
            for (long u = seg[0]; u < seg[1]; u++, w += words, x += unit * MT) {
                const Mask *masks = masks_of(type);
                if (h0 == 0) UNROLL for (int i = 0; i < words; i += 16) prefetch((const char *)(w + i) + AHEAD);
                UNROLL for (int j = 0; j < unit; j++) {
                    vf v[2];
                    UNROLL for (int h = 0; h < H; h++) v[h] = field(type, masks, p->table, w, j, h);
                    UNROLL for (int m = 0; m < MT; m++) {
                        vf xk = splat(x[j * MT + m]);
                        UNROLL for (int h = 0; h < H; h++) acc[m][h][j % NA] += xk * v[h];
                    }
                }
            }
            UNROLL for (int h = 0; h < H; h++) {
                vf scale = load_scale(p->scale_kind, p->scales, grid + (h0 + h) * VL);
                vf offset = offset_of(type, 0, p, grid + (h0 + h) * VL, scale);
                UNROLL for (int m = 0; m < MT; m++) {
                    vf sum = acc[m][h][0];
                    UNROLL for (int a = 1; a < NA; a++) sum += acc[m][h][a];
                    total[m][h0 + h] += scale * sum;
                    if (type <= INT8) total[m][h0 + h] -= offset * splat(p->sums[(m0 + m) * p->count + s]);
                }
            }
        }
    }
    for (int m = 0; m < MT && m0 + m < p->m; m++)
        for (int h = 0; h < NV; h++) finish(p, m0 + m, tile * TILE + h * VL, total[m][h] * splat(rescale_of(type)));
}

INLINE void stream_tokens(const int type, const Product *p, long tile) {
    /* Measured with AVX2: more vectors or sums at once make GCC spill; both are enough to hide the latency of the sums. */
    const int heavy = type == INT3 || (type == LUT4 && NV > 1);
    if (p->m == 1) stream(type, 1, heavy ? 1 : NV, NV == 1 ? 8 : heavy ? 4 : 2, p, tile, 0);
    else if (p->m == 2) stream(type, 2, 1, 4, p, tile, 0);
    else if (p->m <= 4) stream(type, 4, 1, 2, p, tile, 0);
    else for (long m = 0; m < p->m; m += 8) stream(type, 8, 1, 1, p, tile, m);
}

/* Weights of `tiles` tiles and segments s0 .. s1 to float32 [tile * 16 / NR][columns][NR]. */
INLINE void dequantize(const int type, const Product *p, long tile0, long tiles, long s0, long s1, long columns, float *to) {
    const int unit = unit_of(type), words = words_of(type) * TILE;
    const long first = p->segments[4 * s0];
    for (long t = 0; t < tiles; t++) {
        const uint32_t *codes = codes_of(type, p, tile0 + t);
        for (long s = s0; s < s1; s++) {
            const int32_t *seg = p->segments + 4 * s;
            UNROLL for (int h = 0; h < NV; h++) {
                const long grid = ((tile0 + t) * p->groups + seg[2]) * TILE + h * VL;
                const vf scale = load_scale(p->scale_kind, p->scales, grid) * splat(rescale_of(type));
                const vf offset = offset_of(type, 0, p, grid, scale);
                const long lane = t * TILE + h * VL;
                float *at = to + lane / NR * columns * NR + lane % NR + (seg[0] - first) * unit * NR;
                const uint32_t *w = codes + (long)seg[0] * words;
                const Mask *masks = masks_of(type);
                for (long u = seg[0]; u < seg[1]; u++, w += words)
                    UNROLL for (int j = 0; j < unit; j++, at += NR) {
                        vf value = field(type, masks, p->table, w, j, h) * splat(1.0f / (float)(1 << place_of(type, j)));
                        store(at, value * scale - offset);
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
INLINE void panel(const int type, const Product *p, long index, long m0, long m1) {
    _Alignas(64) float weights[PANEL * CHUNK], sums[BLOCK * PANEL];
    const long tile0 = index * (PANEL / TILE), all = round_up(p->n, TILE) / TILE;
    const long tiles = all - tile0 < PANEL / TILE ? all - tile0 : PANEL / TILE;
    const long lanes = round_up(tiles * TILE, NR);
    if (tiles * TILE < lanes) memset(weights, 0, sizeof weights);
    if (p->count == 0) memset(sums, 0, sizeof sums);
    for (long s0 = 0, s1; s0 < p->count; s0 = s1) {
        s1 = chunk_end(type, p, s0, CHUNK);
        const long first = (long)p->segments[4 * s0] * unit_of(type), columns = (long)p->segments[4 * s1 - 3] * unit_of(type) - first;
        dequantize(type, p, tile0, tiles, s0, s1, columns, weights);
        for (long m = m0; m < m1; m += MR)
            for (long j = 0; j < lanes; j += NR)
                multiply((const float *)p->xs + m * p->kp + first * MR, weights + j * columns, sums + (m - m0) * PANEL + j, columns, s0 == 0);
    }
    for (long m = m0; m < m1 && m < p->m; m++)
        for (long j = 0; j < tiles * TILE; j += VL) finish(p, m, index * PANEL + j, load(sums + (m - m0) * PANEL + j));
}

#endif
