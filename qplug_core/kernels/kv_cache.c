/* Keys and values to the rows of a quantized cache and back, as reference/kv_cache.py defines both: to the bit.
 *
 * x     [B][H][T][D] float32, bfloat16 or float16; rows at any distance, in bytes
 * rows  [B][H][T], see kv_cache.h; at any distance, in bytes
 * scale float32 [1] or [H]: stored ones, rounded to the kind of x; NULL: dynamic, largest magnitude / divisor
 *
 * Static scales compute in the kind of x, dynamic ones in float32. D is a multiple of 16.
 */
#include "kv_cache.h"

typedef struct {
    char *rows, *x;
    const float *scale;
    long heads, tokens, depth, r_batch, r_head, r_row, x_batch, x_head, x_row, per_head;
    int kind, held;
    float divisor;
} Rows;

/* x as a number of this kind. */
INLINE vf round_to(int kind, vf x) {
    if (kind == F32) return x;
    _Alignas(64) uint16_t half[VL];
    store_any(kind, half, 0, x, VL);
    return load_any(kind, half, 0);
}

INLINE vf within(vf x, float low, float high) { return vmin(splat(high), vmax(splat(low), x)); }

/* Codes e4m3 of x in -448 .. 448: the bits of float32 with another bias, and multiples of 2^-9 below 2^-6. */
INLINE vi e4m3_of(vf x) {
    const vi bits = (vi)x, sign = (bits >> 24) & 0x80, magnitude = bits & 0x7fffffff;
    const vi nearest = (magnitude + 0x7ffff + ((magnitude >> 20) & 1)) >> 20; /* ties to even */
    const vi small = magnitude < (121 << 23), nan = magnitude > 0x7f800000;
    const vi normal = nearest - (120 << 3), fine = round_i((vf)magnitude * splat(512.0f));
    return sign | (nan & 0x7f) | (~nan & ((small & fine) | (~small & normal)));
}

INLINE void put_codes(int held, char *row, long i, vi codes) {
    int32_t whole[VL];
    memcpy(whole, &codes, sizeof whole);
    if (held == HELD_INT4)
        for (int j = 0; j < VL; j += 2) row[(i + j) / 2] = (char)((whole[j] & 15) | (whole[j + 1] & 15) << 4);
    else
        for (int j = 0; j < VL; j++) row[i + j] = (char)whole[j];
}

INLINE void encode_row(int held, const Rows *r, char *row, const char *x, long head) {
    const float top = held == HELD_INT8 ? 127.0f : held == HELD_INT4 ? 7.0f : 448.0f;
    const float low = r->scale && held != HELD_FP8 ? -top - 1.0f : -top;
    const int kind = r->scale ? r->kind : F32;
    float scale = r->scale ? r->scale[head * r->per_head] : 0.0f;
    if (!r->scale) {
        vf most = splat(0.0f);
        vi nan = {0};
        for (long i = 0; i < r->depth; i += VL) {
            const vf v = load_any(r->kind, x, i);
            most = vmax((vf)((vi)v & 0x7fffffff), most);
            nan |= v != v;
        }
        for (int j = 0; j < VL; j++) scale = nan[j] ? __builtin_nanf("") : most[j] > scale ? most[j] : scale;
        scale /= r->divisor;
        memcpy(row + code_bytes(held, r->depth), &scale, 4);
    }
    const vf by = splat(scale == 0.0f ? 1.0f : scale);
    for (long i = 0; i < r->depth; i += VL) {
        const vf v = within(round_to(kind, load_any(r->kind, x, i) / by), low, top);
        put_codes(held, row, i, held == HELD_FP8 ? e4m3_of(v) : round_i(v) & (v == v));
    }
}

INLINE void decode_row(int held, const Rows *r, char *row, char *x, long head) {
    const float scale = r->scale ? r->scale[head * r->per_head] : scale_behind(row, code_bytes(held, r->depth));
    for (long i = 0; i < r->depth; i += VL) store_any(r->kind, x, i, held_at(held, row, i) * splat(scale_up(held)) * splat(scale), VL);
}

typedef void (*EachRow)(const Rows *, char *, char *, long);
#define BOTH(held) \
    static void encode_##held(const Rows *r, char *row, char *x, long head) { encode_row(held, r, row, x, head); } \
    static void decode_##held(const Rows *r, char *row, char *x, long head) { decode_row(held, r, row, x, head); }
BOTH(HELD_INT8)
BOTH(HELD_INT4)
BOTH(HELD_FP8)
static const EachRow each[][2] = {{encode_HELD_INT8, decode_HELD_INT8}, {encode_HELD_INT4, decode_HELD_INT4}, {encode_HELD_FP8, decode_HELD_FP8}};

/* See the top. `back`: from rows to x. `scales`: how many are stored. */
EXPORT void qplug_kv_rows(void *rows, void *x, const float *scale, long batch, long heads, long tokens, long depth, long r_batch, long r_head,
                          long r_row, long x_batch, long x_head, long x_row, long scales, int kind, int held, float divisor, int back,
                          int threads) {
    const Rows r = {rows, x, scale, heads, tokens, depth, r_batch, r_head, r_row, x_batch, x_head, x_row, scales > 1, kind, held, divisor};
    const EachRow run = each[held - HELD_INT8][back];
    const long all = batch * heads * tokens;
    if (all * depth < 1 << 14) threads = 1; /* waking threads costs more */
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < all; i++) {
        const long b = i / (heads * tokens), h = i / tokens % heads, t = i % tokens;
        run(&r, r.rows + b * r_batch + h * r_head + t * r_row, r.x + b * x_batch + h * x_head + t * x_row, h);
    }
}
