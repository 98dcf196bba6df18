/* Vectors of the x86 instruction sets that one source is compiled for: AVX2 (8 lanes) and AVX-512 (16 lanes).
 *
 * A tile is TILE = 16 rows of a weight in every instruction set, so that packed layouts do not depend on it: NV vectors
 * of VL lanes cover it. Activations come and go as float32, bfloat16 or float16, named by `enum kind`.
 */
#ifndef QPLUG_VEC_H
#define QPLUG_VEC_H

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#define EXPORT __attribute__((visibility("default")))

enum { TILE = 16 };
enum kind { F32 = 0, BF16 = 1, F16 = 2, E4M3 = 3, E8M0 = 4 }; /* the last two are of scales */

#if defined(__AVX512F__)
enum { VL = 16 };
typedef float vf __attribute__((vector_size(64)));
INLINE vf splat(float x) { return _mm512_set1_ps(x); }
INLINE vf load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
INLINE void store_f16(uint16_t *p, vf x) { _mm256_storeu_si256((void *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
INLINE __m512i widen_u16(const uint16_t *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)); }
INLINE vf load_s8(const int8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p))); }
INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
#else
enum { VL = 8 };
typedef float vf __attribute__((vector_size(32)));
INLINE vf splat(float x) { return _mm256_set1_ps(x); }
INLINE vf load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
INLINE void store_f16(uint16_t *p, vf x) { _mm_storeu_si128((void *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
INLINE __m256i widen_u16(const uint16_t *p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)); }
INLINE vf load_s8(const int8_t *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p))); }
INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
#endif

enum { NV = TILE / VL };
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));

#if defined(__AVX512F__)
INLINE vi round_i(vf x) { return (vi)_mm512_cvtps_epi32(x); }
INLINE void store_s8(int8_t *p, vi x) { _mm_storeu_si128((void *)p, _mm512_cvtsepi32_epi8((__m512i)x)); }
#else
INLINE vi round_i(vf x) { return (vi)_mm256_cvtps_epi32(x); }
INLINE void store_s8(int8_t *p, vi x) {
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    _mm_storel_epi64((void *)p, _mm_packs_epi16(words, words));
}
#endif
INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
INLINE vf load(const float *p) { vf x; memcpy(&x, p, sizeof x); return x; }
INLINE void store(float *p, vf x) { memcpy(p, &x, sizeof x); }
INLINE vi load_i(const void *p) { vi x; memcpy(&x, p, sizeof x); return x; }
INLINE void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }

/* Lines that are about to be written: read and owned while there is something else to do. */
INLINE void own_lines(const char *to, long bytes) {
    for (long i = 0; i < bytes; i += 64) __asm__ volatile("prefetchw %0" : : "m"(to[i]));
}

/* VL bytes as integers. */
INLINE vi load_u8(const uint8_t *p) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p));
#else
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p));
#endif
}

/* VL bytes e5m2: the upper halves of float16. */
INLINE vf load_e5m2(const uint8_t *p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)p)), 8));
#else
    return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const void *)p)), 8));
#endif
}

/* VL bytes e4m3, divided by 256: one place more of exponent makes them float16, whose exponents start 8 lower. The code of NaN reads as 480. */
INLINE vf load_e4m3(const uint8_t *p) {
#if defined(__AVX512F__)
    __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)p));
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(b, 7), _mm256_set1_epi16((short)0xbf80)));
#else
    __m128i b = _mm_cvtepi8_epi16(_mm_loadl_epi64((const void *)p));
    return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(b, 7), _mm_set1_epi16((short)0xbf80)));
#endif
}

INLINE size_t width(int kind) { return kind == F32 ? 4 : kind >= E4M3 ? 1 : 2; }

/* VL values at index i of an array of any kind. */
INLINE vf load_any(int kind, const void *p, long i) {
    if (kind == F32) return load((const float *)p + i);
    const uint16_t *h = (const uint16_t *)p + i;
    return kind == F16 ? load_f16(h) : (vf)((vu)widen_u16(h) << 16);
}

/* VL scales at index i of an array of any kind. E8M0: the exponent of a float32, and 2**-127 for byte 0; byte 255 is not looked for. */
INLINE vf load_scale(int kind, const void *p, long i) {
    if (kind == E4M3) return load_e4m3((const uint8_t *)p + i) * splat(256.0f);
    if (kind == E8M0) {
        vi bits = load_u8((const uint8_t *)p + i) << 23, least = (vi){0} + 0x400000;
        vi below = bits < least;
        return (vf)((bits & ~below) | (least & below));
    }
    return load_any(kind, p, i);
}

INLINE float load_one(int kind, const void *p, long i) {
    if (kind == F32) return ((const float *)p)[i];
    uint16_t h = ((const uint16_t *)p)[i];
    if (kind == F16) return _cvtsh_ss(h);
    uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE void store_bf16(uint16_t *p, vf x) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((void *)p, (__m256i)_mm512_cvtneps_pbh(x));
#else
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu isnan = (vu)((vi)(x != x));
    vu y = (isnan & 0x7fc0) | (~isnan & rounded);
    UNROLL for (int i = 0; i < VL; i++) p[i] = (uint16_t)y[i];
#endif
}

/* The first `count` of VL values to index i of an array of any kind; 16-bit kinds round to nearest even. */
INLINE void store_any(int kind, void *p, long i, vf x, long count) {
    _Alignas(64) char whole[4 * VL];
    char *to = (char *)p + (size_t)i * width(kind);
    char *at = count >= VL ? to : whole;
    if (kind == F32) store((float *)at, x);
    else if (kind == F16) store_f16((uint16_t *)at, x);
    else store_bf16((uint16_t *)at, x);
    if (count < VL) memcpy(to, whole, (size_t)(count > 0 ? count : 0) * width(kind));
}

/* Rows of a scratch array that kernels read in blocks: whole blocks, zero filled by the caller. */
INLINE long round_up(long x, long unit) { return (x + unit - 1) / unit * unit; }

INLINE void *scratch(size_t bytes) {
    /* Room of one line, so that an empty array has an address too. */
    return aligned_alloc(64, (size_t)round_up((long)bytes, 64) + 64);
}

#endif
