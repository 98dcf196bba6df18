/* Attention of one new token over keys and values as a cache holds them: out = softmax(scaling * q K^T) V, in float32.
 *
 * out   [B][H][DV] float32, bfloat16 or float16
 * q     [B][H][DK], like out
 * k, v  rows of one token and head, at any distance; head h / (H / heads) of the cache serves head h of q. A row is DK (DV) numbers of
 *       q's kind, or codes as kv_cache.h describes them
 * k_scale, v_scale  float32 [1] or [heads], of codes without scales of their own; NULL otherwise
 * mask  bytes, at any distance: 0 hides a token; NULL: all are seen. What hides all of them gives zeros.
 *
 * Tokens come in blocks whose largest score so far is kept, so that no array of scores grows with the context.
 * DK and DV are multiples of 16.
 */
#include "kv_cache.h"

enum { BLOCK = 64, CHUNK = 16 }; /* tokens that share a largest score; tokens whose scores are summed at once */

typedef struct {
    void *out;
    const char *q, *k, *v;
    const uint8_t *mask;
    const float *k_scale, *v_scale;
    long batch, heads, group, tokens, dk, dv;
    long k_batch, k_head, k_row, v_batch, v_head, v_row, m_batch, m_head, m_row; /* distances in bytes */
    long k_stride, v_stride; /* of stored scales: 0 where one serves all heads */
    int kind, held, follows; /* of q and out; of k and v; whether a scale follows the codes of each row */
    float scaling;
} Attention;

INLINE float sum_of(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(x);
#else
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
#endif
}

/* exp(x) for x <= 0: 2^n times a polynomial of the rest (Taylor's, to 1e-7 within ln(2)/2); 0 below the normal numbers; NaN stays. */
INLINE vf exp_of(vf x) {
    const vi none = x < splat(-87.0f);
    vf z = vmax(splat(-87.0f), x);
    vi n = round_i(z * splat(1.44269504f));
    vf r = z - to_float(n) * splat(0.693359375f) + to_float(n) * splat(2.12194440e-4f); /* ln 2 in two parts */
    vf y = splat(1.0f / 720);
    y = y * r + splat(1.0f / 120);
    y = y * r + splat(1.0f / 24);
    y = y * r + splat(1.0f / 6);
    y = y * r + splat(0.5f);
    y = y * r + splat(1.0f);
    y = y * r + splat(1.0f);
    return (vf)((vi)(y * (vf)((n + 127) << 23)) & ~none);
}

/* to[i] = sum of vector i, of CHUNK at v. */
INLINE void sums_of(const float *v, float *to) {
#if defined(__AVX512F__)
    __m512 x[CHUNK];
    UNROLL for (int i = 0; i < CHUNK; i++) x[i] = (__m512)load(v + i * VL);
    UNROLL for (int i = 0; i < 8; i++) x[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    UNROLL for (int i = 0; i < 4; i++) {
        const __m512d a = (__m512d)x[2 * i], b = (__m512d)x[2 * i + 1];
        x[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
    }
    /* Four sums in every quarter: quarters are what is left to add. */
    UNROLL for (int n = 2; n; n /= 2)
        UNROLL for (int i = 0; i < n; i++)
            x[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0x88), _mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0xdd));
    store(to, (vf)x[0]);
#else
    for (int i = 0; i < CHUNK; i++) to[i] = sum_of(load(v + i * VL));
#endif
}

/* Products of one row with `heads` heads of q, as vectors that are still to be summed: CHUNK of them apart for each head. */
INLINE void multiply_row(int held, const int heads, const float *q, const char *q16, const char *row, long depth, float *to) {
    vf sum[4];
    long i = 0;
    UNROLL for (int g = 0; g < heads; g++) sum[g] = splat(0.0f);
#if defined(__AVX512BF16__)
    if (held == BF16)
        for (; i + 32 <= depth; i += 32) {
            const __m512bh y = (__m512bh)_mm512_loadu_si512(row + 2 * i);
            UNROLL for (int g = 0; g < heads; g++) sum[g] = _mm512_dpbf16_ps(sum[g], (__m512bh)_mm512_loadu_si512(q16 + 2 * (g * depth + i)), y);
        }
#endif
    (void)q16;
    for (; i < depth; i += VL) {
        const vf y = held_at(held, row, i);
        UNROLL for (int g = 0; g < heads; g++) sum[g] += load(q + g * depth + i) * y;
    }
    UNROLL for (int g = 0; g < heads; g++) store(to + g * CHUNK * VL, sum[g]);
}

/* acc[g][i .. i + count * VL) += sum over tokens of p[g][t] * row t. */
INLINE void add_rows(int held, const int heads, const int count, const Attention *a, const float *p, const char *v, long tokens, long i, float *acc) {
    vf sums[4][8];
    UNROLL for (int g = 0; g < heads; g++) UNROLL for (int j = 0; j < count; j++) sums[g][j] = load(acc + g * a->dv + i + j * VL);
    for (long t = 0; t < tokens; t++, v += a->v_row)
        UNROLL for (int j = 0; j < count; j++) {
            const vf y = held_at(held, v, i + j * VL);
            UNROLL for (int g = 0; g < heads; g++) sums[g][j] += splat(p[g * BLOCK + t]) * y;
        }
    UNROLL for (int g = 0; g < heads; g++) UNROLL for (int j = 0; j < count; j++) store(acc + g * a->dv + i + j * VL, sums[g][j]);
}

/* As many columns at once as sums fit into registers. */
INLINE void add_block(int held, const int heads, const Attention *a, const float *p, const char *v, long tokens, float *acc) {
    const int count = VL == 16 && heads < 4 ? 8 : VL == 16 ? 4 : 8 / heads;
    long i = 0;
    for (; i + count * VL <= a->dv; i += count * VL) add_rows(held, heads, count, a, p, v, tokens, i, acc);
    for (; i < a->dv; i += VL) add_rows(held, heads, 1, a, p, v, tokens, i, acc);
}

/* Softmax of the scores of one block, in place, with the sums so far brought to the same largest score. */
INLINE void soften(float *scores, long tokens, float *most, float *sum, float *acc, long depth) {
    for (long t = tokens; t < round_up(tokens, VL); t++) scores[t] = -__builtin_inff();
    vf highest = splat(*most);
    for (long t = 0; t < tokens; t += VL) highest = vmax(load(scores + t), highest); /* passes NaN over: it comes out of exp */
    float top = highest[0];
    for (int j = 1; j < VL; j++) top = highest[j] > top ? highest[j] : top;
    const float base = top == -__builtin_inff() ? 0.0f : top;
    if (top > *most) {
        const vf less = exp_of(splat(*most - base));
        *sum *= less[0];
        for (long i = 0; i < depth; i += VL) store(acc + i, load(acc + i) * less);
    }
    *most = top;
    vf total = splat(0.0f);
    for (long t = 0; t < tokens; t += VL) {
        vf p = exp_of(load(scores + t) - splat(base));
        store(scores + t, p);
        total += p;
    }
    *sum += sum_of(total);
}

/* By 4, 2 and 1 of `count` heads: numbers of the cache are read from memory and made floats once for those. */
#define EACH_HEADS(count, call) \
    do { \
        long g = 0; \
        for (; g + 4 <= (count); g += 4) call(4); \
        for (; g + 2 <= (count); g += 2) call(2); \
        for (; g < (count); g++) call(1); \
    } while (0)

/* Heads g0 .. g1 of those that share head h of the cache. work: q, sums of values, scores, products, and two numbers, of each head. */
INLINE void attend(int held, const Attention *a, long b, long h, long g0, long g1, float *work) {
    const long count = g1 - g0, first = (b * a->heads + h) * a->group + g0;
    float *q = work, *acc = q + count * a->dk, *scores = acc + count * a->dv, *products = scores + count * BLOCK;
    float *most = products + count * CHUNK * VL, *sum = most + count;
    const char *q16 = a->q + (size_t)(first * a->dk) * width(a->kind), *k = a->k + b * a->k_batch + h * a->k_head;
    const char *v = a->v + b * a->v_batch + h * a->v_head;
    const uint8_t *mask = a->mask ? a->mask + b * a->m_batch : NULL;
    const float k_scale = (a->k_scale ? a->k_scale[h * a->k_stride] : 1.0f) * scale_up(held) * a->scaling;
    const float v_scale = (a->v_scale ? a->v_scale[h * a->v_stride] : 1.0f) * scale_up(held);
    const long k_codes = code_bytes(held, a->dk), v_codes = code_bytes(held, a->dv);
    _Alignas(64) float by[BLOCK];
    for (long i = 0; i < BLOCK; i++) by[i] = k_scale;
    for (long i = 0; i < count * a->dk; i += VL) store(q + i, load_any(a->kind, q16, i));
    memset(acc, 0, (size_t)(products + count * CHUNK * VL - acc) * 4);
    for (long g = 0; g < count; g++) {
        most[g] = -__builtin_inff();
        sum[g] = 0.0f;
    }
    for (long t0 = 0; t0 < a->tokens; t0 += BLOCK, k += BLOCK * a->k_row, v += BLOCK * a->v_row) {
        const long tokens = a->tokens - t0 < BLOCK ? a->tokens - t0 : BLOCK;
        if (a->follows)
            for (long t = 0; t < tokens; t++) by[t] = k_scale * scale_behind(k + t * a->k_row, k_codes);
        for (long c = 0; c < tokens; c += CHUNK) {
            for (long t = c; t < c + CHUNK && t < tokens; t++) {
#define MULTIPLY(heads) \
    multiply_row(held, heads, q + g * a->dk, q16 + 2 * g * a->dk, k + t * a->k_row, a->dk, products + (g * CHUNK + t - c) * VL)
                EACH_HEADS(count, MULTIPLY);
            }
            for (long g = 0; g < count; g++) {
                float *to = scores + g * BLOCK + c;
                sums_of(products + g * CHUNK * VL, to);
                for (int i = 0; i < CHUNK; i += VL) store(to + i, load(to + i) * load(by + c + i));
            }
        }
        for (long g = 0; g < count; g++) {
            float *p = scores + g * BLOCK;
            if (mask) {
                const uint8_t *seen = mask + (h * a->group + g0 + g) * a->m_head + t0 * a->m_row;
                for (long t = 0; t < tokens; t++) p[t] = seen[t * a->m_row] ? p[t] : -__builtin_inff();
            }
            soften(p, tokens, most + g, sum + g, acc + g * a->dv, a->dv);
            if (a->follows)
                for (long t = 0; t < tokens; t++) p[t] *= scale_behind(v + t * a->v_row, v_codes);
        }
#define ADD(heads) add_block(held, heads, a, scores + g * BLOCK, v, tokens, acc + g * a->dv)
        EACH_HEADS(count, ADD);
    }
    for (long g = 0; g < count; g++) {
        const vf inverse = splat(sum[g] == 0.0f ? 0.0f : v_scale / sum[g]);
        for (long i = 0; i < a->dv; i += VL) store_any(a->kind, a->out, (first + g) * a->dv + i, load(acc + g * a->dv + i) * inverse, VL);
    }
}

#define ATTEND(held) \
    static void attend_##held(const Attention *a, long b, long h, long g0, long g1, float *work) { attend(held, a, b, h, g0, g1, work); }
ATTEND(F32)
ATTEND(BF16)
ATTEND(F16)
ATTEND(HELD_INT8)
ATTEND(HELD_INT4)
ATTEND(HELD_FP8)
typedef void (*Attend)(const Attention *, long, long, long, long, float *);
static const Attend attends[] = {
    [F32] = attend_F32, [BF16] = attend_BF16, [F16] = attend_F16,
    [HELD_INT8] = attend_HELD_INT8, [HELD_INT4] = attend_HELD_INT4, [HELD_FP8] = attend_HELD_FP8};

/* See the top. Returns 0, or 1 where there was no memory. */
EXPORT int qplug_attention(void *out, const void *q, const void *k, const void *v, const void *mask, const float *k_scale, const float *v_scale,
                           long batch, long heads, long group, long tokens, long dk, long dv, long k_batch, long k_head, long k_row,
                           long v_batch, long v_head, long v_row, long m_batch, long m_head, long m_row, long k_scales, long v_scales,
                           int kind, int held, int follows, float scaling, int threads) {
    const Attention a = {out, q, k, v, mask, k_scale, v_scale, batch, heads, group, tokens, dk, dv, k_batch, k_head, k_row, v_batch, v_head,
                         v_row, m_batch, m_head, m_row, k_scales > 1, v_scales > 1, kind, held, follows, scaling};
    const Attend run = attends[held];
    if (batch * heads * group * tokens * (dk + dv) < 1 << 16) threads = 1; /* waking threads costs more */
    /* Where few heads are held, the heads that share one are divided too. */
    const long pairs = batch * heads, wanted = pairs >= threads ? 1 : (threads + pairs - 1) / pairs, parts = wanted < group ? wanted : group;
    const long room = round_up(group * (dk + dv + BLOCK + CHUNK * VL + 2), 16);
    float *work = scratch((size_t)(threads * room) * 4);
    if (!work) return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long s = 0; s < threads; s++)
        for (long task = s * pairs * parts / threads; task < (s + 1) * pairs * parts / threads; task++) {
            const long part = task % parts, pair = task / parts;
            run(&a, pair / heads, pair % heads, part * group / parts, (part + 1) * group / parts, work + s * room);
        }
    free(work);
    return 0;
}
