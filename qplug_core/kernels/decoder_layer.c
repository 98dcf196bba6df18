/* One token through one decoder layer: a norm, attention with rotated queries and keys over a cache, a norm, and gate, up and down, each half
 * added to what came in.
 *
 * x, y, cos, sin, weights of norms and the cache are of one kind. What is computed between two products is rounded to it where torch
 * rounds: after the rotation's two products and their sum, after SiLU and its product, after each sum.
 * Heads and widths are multiples of 16, the turned part of a head of 32 channels.
 */
#include "attention.c"
#include "rms_norm.c"

/* What multiplies x[K] with `count` packed weights: y[i][N] of `kind`. Returns 0, or 1 where there was no memory. */
typedef int (*Multiply)(const void *const *weights, void *const *y, long count, const void *x, int kind, int threads);
enum { Q, K, V, O, GATE, UP, DOWN, LINEARS };
enum { BEFORE_ATTENTION, BEFORE_MLP, OF_QUERIES, OF_KEYS, NORMS };

typedef struct {
    Multiply multiply;
    const void *weights[LINEARS];
    const void *norms[NORMS]; /* [wide], [wide], [depth], [depth]; the last two or NULL */
    float eps[NORMS];
    float scaling;
    int kind;
    long wide, inner, heads, kv_heads, depth;
} Layer;

INLINE vf rounded(int kind, vf v) {
    if (kind == F32) return v;
    _Alignas(64) uint16_t half[VL];
    store_any(kind, half, 0, v, VL);
    return load_any(kind, half, 0);
}

/* The first `turned` channels of each head of x: half by half, x * cos + (-x2, x1) * sin. */
INLINE void rotate(int kind, void *x, const void *cos, const void *sin, long heads, long depth, long turned) {
    const long half = turned / 2;
    for (long h = 0; h < heads; h++)
        for (long i = 0; i < half; i += VL) {
            const long at = h * depth + i;
            const vf low = load_any(kind, x, at), high = load_any(kind, x, at + half);
            const vf a = rounded(kind, low * load_any(kind, cos, i)), b = rounded(kind, high * load_any(kind, sin, i));
            const vf c = rounded(kind, high * load_any(kind, cos, i + half)), d = rounded(kind, low * load_any(kind, sin, i + half));
            store_any(kind, x, at, a - b, VL);
            store_any(kind, x, at + half, c + d, VL);
        }
}

/* gate = silu(gate) * up */
INLINE void activate(int kind, void *gate, const void *up, long n) {
    for (long i = 0; i < n; i += VL) {
        const vf x = load_any(kind, gate, i), e = exp_of(vmin(x, -x)), one = splat(1.0f);
        const vi below = x < splat(0.0f);
        const vf top = (vf)(((vi)e & below) | ((vi)one & ~below));
        store_any(kind, gate, i, rounded(kind, x * (top / (one + e))) * load_any(kind, up, i), VL);
    }
}

INLINE void add(int kind, void *y, const void *a, const void *b, long n) {
    for (long i = 0; i < n; i += VL) store_any(kind, y, i, load_any(kind, a, i) + load_any(kind, b, i), VL);
}

INLINE int forward(int kind, const Layer *l, void *y, const void *x, const void *cos, const void *sin, long turned, char *k, char *v,
                   long head, long row, long tokens, char *work, int threads) {
    const size_t size = width(kind);
    const long queries = l->heads * l->depth, keys = l->kv_heads * l->depth;
    char *normed = work, *sum = normed + l->wide * size, *q = sum + l->wide * size, *new_k = q + queries * size, *new_v = new_k + keys * size;
    char *seen = new_v + keys * size, *gate = seen + queries * size, *up = gate + l->inner * size;
    void *const projected[] = {q, new_k, new_v}, *const opened[] = {gate, up}, *const result = normed;
    norm_row(kind, normed, x, l->norms[BEFORE_ATTENTION], l->wide, l->eps[BEFORE_ATTENTION]);
    if (l->multiply(l->weights + Q, projected, 3, normed, kind, threads)) return 1;
    for (long h = 0; l->norms[OF_QUERIES] && h < l->heads; h++) {
        char *at = q + h * l->depth * size;
        norm_row(kind, at, at, l->norms[OF_QUERIES], l->depth, l->eps[OF_QUERIES]);
    }
    for (long h = 0; l->norms[OF_KEYS] && h < l->kv_heads; h++) {
        char *at = new_k + h * l->depth * size;
        norm_row(kind, at, at, l->norms[OF_KEYS], l->depth, l->eps[OF_KEYS]);
    }
    rotate(kind, q, cos, sin, l->heads, l->depth, turned);
    rotate(kind, new_k, cos, sin, l->kv_heads, l->depth, turned);
    for (long h = 0; h < l->kv_heads; h++) {
        memcpy(k + h * head + (tokens - 1) * row, new_k + h * l->depth * size, l->depth * size);
        memcpy(v + h * head + (tokens - 1) * row, new_v + h * l->depth * size, l->depth * size);
    }
    if (qplug_attention(seen, q, k, v, NULL, NULL, NULL, 1, l->kv_heads, l->heads / l->kv_heads, tokens, l->depth, l->depth, 0, head, row,
                        0, head, row, 0, 0, 0, 0, 0, kind, kind, 0, l->scaling, threads)) return 1;
    if (l->multiply(l->weights + O, &result, 1, seen, kind, threads)) return 1;
    add(kind, sum, x, normed, l->wide);
    norm_row(kind, normed, sum, l->norms[BEFORE_MLP], l->wide, l->eps[BEFORE_MLP]);
    if (l->multiply(l->weights + GATE, opened, 2, normed, kind, threads)) return 1;
    activate(kind, gate, up, l->inner);
    if (l->multiply(l->weights + DOWN, &result, 1, gate, kind, threads)) return 1;
    add(kind, y, sum, normed, l->wide);
    return 0;
}

/* y[wide] of x[wide]; cos, sin [turned]; k and v: the first token of the cache's first head, `head` and `row` bytes from the next ones. The last
 * of `tokens` is this one, and written here. Returns 0, or 1 where there was no memory. */
EXPORT int qplug_decoder_layer(const Layer *l, void *y, const void *x, const void *cos, const void *sin, long turned, void *k, void *v,
                               long head, long row, long tokens, int threads) {
    const long values = 2 * (l->wide + l->heads * l->depth + l->kv_heads * l->depth + l->inner);
    char *work = scratch((size_t)values * width(l->kind));
    if (!work) return 1;
    int failed;
    if (l->kind == BF16) failed = forward(BF16, l, y, x, cos, sin, turned, k, v, head, row, tokens, work, threads);
    else if (l->kind == F16) failed = forward(F16, l, y, x, cos, sin, turned, k, v, head, row, tokens, work, threads);
    else failed = forward(F32, l, y, x, cos, sin, turned, k, v, head, row, tokens, work, threads);
    free(work);
    return failed;
}
