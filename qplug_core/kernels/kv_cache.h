/* Rows of a quantized KV cache: one token of one head, `depth` codes and, where scales are dynamic, one float32 behind them.
 *
 * HELD_INT8 two's complement; HELD_INT4 two's complement, two in a byte, the first in the low half; HELD_FP8 e4m3 as bytes.
 */
#ifndef QPLUG_KV_CACHE_H
#define QPLUG_KV_CACHE_H

#include "vec.h"

enum held { HELD_INT8 = 5, HELD_INT4 = 6, HELD_FP8 = 7 }; /* beside `enum kind`: numbers that are no codes */

INLINE long code_bytes(int held, long depth) {
    return held == HELD_INT4 ? (depth + 1) / 2 : held >= HELD_INT8 ? depth : depth * (long)width(held);
}

/* By how much `held_at` returns values too small. */
INLINE float scale_up(int held) { return held == HELD_FP8 ? 256.0f : 1.0f; }

/* VL numbers of a row from column i on. held is a constant; i is a multiple of VL. */
INLINE vf held_at(int held, const char *row, long i) {
    if (held == HELD_INT8) return load_s8((const int8_t *)row + i);
    if (held == HELD_FP8) {
        const uint8_t *p = (const uint8_t *)row + i;
        return (vf)((vi)load_e4m3(p) | ((load_u8(p) & 0x7f) == 0x7f)); /* all bits set are a NaN */
    }
    if (held == HELD_INT4) {
        __m128i b = _mm_setzero_si128(), low = _mm_set1_epi8(15), sign = _mm_set1_epi8(8);
        memcpy(&b, row + i / 2, VL / 2);
        b = _mm_unpacklo_epi8(_mm_and_si128(b, low), _mm_and_si128(_mm_srli_epi16(b, 4), low));
        b = _mm_sub_epi8(_mm_xor_si128(b, sign), sign);
#if defined(__AVX512F__)
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b));
#else
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b));
#endif
    }
    return load_any(held, row, i);
}

INLINE float scale_behind(const char *row, long codes) {
    float scale;
    memcpy(&scale, row + codes, 4);
    return scale;
}

#endif
