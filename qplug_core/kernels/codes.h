/* Codes of weights, and what they are in registers.
 *
 * codes [N/16][KP/unit][words][16] uint32, a word for each of 16 rows, in units of 16, 32, 8 columns for 2, 3, 4 bits; the fields of a
 * word from the lowest bit up. 3 bits: five codes in each half of three words; the highest bits of the halves make code 30 (low
 * halves) and code 31. 8 bits: [N/16][KP][16] bytes, unit 4.
 *
 * INT2, INT3, INT4: unsigned. INT8: two's complement. LUT4: index of a table of 16 float32. E4M3, E5M2: floats, none of them NaN.
 */
#ifndef QPLUG_CODES_H
#define QPLUG_CODES_H

#include "vec.h"

enum type { INT2 = 0, INT3 = 1, INT4 = 2, INT8 = 3, LUT4 = 4, FP8_E4M3 = 5, FP8_E5M2 = 6, TYPES = 7 };

INLINE int bits_of(int type) { return type == INT2 ? 2 : type == INT3 ? 3 : type == INT4 || type == LUT4 ? 4 : 8; }
INLINE int unit_of(int type) { return type == INT2 ? 16 : type == INT3 ? 32 : type == INT4 || type == LUT4 ? 8 : 4; }
INLINE int words_of(int type) { return type == INT3 ? 3 : 1; }

/* What is subtracted from unsigned codes where there are no zero points. */
INLINE float middle_of(int type) { return type == INT2 ? 2.0f : type == INT3 ? 4.0f : type == INT4 ? 8.0f : 0.0f; }

/* The power of two by which `field` returns column j of a unit too large: its place in a half word. e4m3 comes 256 times too small. */
INLINE int place_of(int type, int j) {
    if (type == INT3) return j < 30 ? j % 5 * 3 : 0;
    return type == INT2 || type == INT4 ? j * bits_of(type) % 16 : 0;
}
INLINE float rescale_of(int type) { return type == FP8_E4M3 ? 256.0f : 1.0f; }

/* Masks of fields by place. Kernels hold them behind a pointer that the compiler cannot see through: it would keep all of them in
 * registers, and spill sums in their place. */
#define ALL(x) {x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}
#define MASKS(m) {ALL((m)), ALL((m) << 1), ALL((m) << 2), ALL((m) << 3), ALL((m) << 4), ALL((m) << 5), ALL((m) << 6), ALL((m) << 7), \
                  ALL((m) << 8), ALL((m) << 9), ALL((m) << 10), ALL((m) << 11), ALL((m) << 12), ALL((m) << 13), ALL((m) << 14)}
typedef int32_t Mask[TILE];
static const _Alignas(64) Mask masks_2[] = MASKS(3), masks_3[] = MASKS(7), masks_4[] = MASKS(15);

INLINE const Mask *masks_of(int type) {
    const Mask *masks = type == INT2 ? masks_2 : type == INT3 ? masks_3 : masks_4;
    __asm__("" : "+r"(masks));
    return masks;
}

/* table[index % 16], table of float32. */
INLINE vf lookup(const float *table, vu index) {
#if defined(__AVX512F__)
    return _mm512_permutexvar_ps((__m512i)index, load(table));
#else
    __m256 low = _mm256_permutevar8x32_ps(load(table), (__m256i)index), high = _mm256_permutevar8x32_ps(load(table + 8), (__m256i)index);
    return _mm256_blendv_ps(low, high, (__m256)(index << 28));
#endif
}

/* Column j of the unit at w, of rows h*VL and on, as float32 times 2^place. type, j and h are constants. */
INLINE vf field(int type, const Mask *masks, const float *table, const uint32_t *w, int j, int h) {
    const uint8_t *bytes = (const uint8_t *)w + j * TILE + h * VL;
    if (type == INT8) return load_s8((const int8_t *)bytes);
    if (type == FP8_E4M3) return load_e4m3(bytes);
    if (type == FP8_E5M2) return load_e5m2(bytes);
    const uint32_t *p = w + h * VL;
    if (type == LUT4) return lookup(table, (vu)load_i(p) >> (4 * j));
    if (type == INT3) {
        if (j >= 30) {
            vu a = (vu)load_i(p), b = (vu)load_i(p + TILE), c = (vu)load_i(p + 2 * TILE);
            const int shift = j == 30 ? 15 : 31;
            return to_float((vi)((a >> shift & 1) | (b >> shift & 1) << 1 | (c >> shift & 1) << 2));
        }
        vu v = (vu)load_i(p + j / 10 * TILE);
        return to_float((vi)(j % 10 < 5 ? v : v >> 16) & load_i(masks[place_of(type, j)]));
    }
    vu v = (vu)load_i(p);
    return to_float((vi)(j * bits_of(type) < 16 ? v : v >> 16) & load_i(masks[place_of(type, j)]));
}

#if defined(__AVX512BF16__)
/* Tables of bfloat16 for codes. Up to 4 bits: `words` by the five lowest bits of a half word, so that nothing need be masked,
 * and `less` by a code less its zero point, which is -16 to 15.
 * 8 bits: the halves of the magnitude by the seven low bits; the sign is that of the code. Codes of INT8 take the table by their absolute
 * value: -128 has index 0, and code 0 is sorted out. */
typedef struct {
    __m512i words, less, high[2], low[2], order; /* order: of 64 bytes [4 columns][16 rows], to columns side by side */
} Tables;

/* Values of codes up to 4 bits, which are the lowest bits of half words; centred, or less `zero`, half words too, where that is given. */
INLINE __m512i values_of(int type, const Tables *t, const __m512i *zero, __m512i codes) {
    if (!zero) return _mm512_permutexvar_epi16(codes, t->words);
    const __m512i mask = _mm512_set1_epi16((short)((1 << bits_of(type)) - 1));
    return _mm512_permutexvar_epi16(_mm512_sub_epi16(_mm512_and_si512(codes, mask), *zero), t->less);
}

/* The unit at w as unit/2 vectors of bfloat16, each with two columns of every row side by side: columns pair_of(i, 0) and pair_of(i, 1). */
INLINE void pairs(int type, const Tables *t, const uint32_t *w, const __m512i *zero, __m512i *out) {
    if (type == INT3) {
        const __m512i a = _mm512_loadu_si512(w), b = _mm512_loadu_si512(w + 16), c = _mm512_loadu_si512(w + 32);
        const __m512i unit = _mm512_set1_epi16(1), two = _mm512_set1_epi16(2);
        UNROLL for (int j = 0; j < 5; j++) {
            out[j] = values_of(type, t, zero, _mm512_srli_epi16(a, 3 * j));
            out[5 + j] = values_of(type, t, zero, _mm512_srli_epi16(b, 3 * j));
            out[10 + j] = values_of(type, t, zero, _mm512_srli_epi16(c, 3 * j));
        }
        __m512i last = _mm512_ternarylogic_epi32(_mm512_srli_epi16(a, 15), _mm512_srli_epi16(b, 14), two, 0xf8); /* a | (b & two) */
        last = _mm512_or_si512(last, _mm512_slli_epi16(_mm512_and_si512(_mm512_srli_epi16(c, 15), unit), 2));
        out[15] = values_of(type, t, zero, last);
        return;
    }
    const __m512i q = _mm512_loadu_si512(w);
    if (bits_of(type) < 8) {
        UNROLL for (int j = 0; j < unit_of(type) / 2; j++) out[j] = values_of(type, t, zero, _mm512_srli_epi16(q, bits_of(type) * j));
        return;
    }
    const __m512i bytes = _mm512_permutexvar_epi8(t->order, q), index = type == INT8 ? _mm512_abs_epi8(bytes) : bytes;
    const __mmask64 some = type == INT8 ? _mm512_test_epi8_mask(bytes, bytes) : ~0ull;
    __m512i high = _mm512_maskz_permutex2var_epi8(some, t->high[0], index, t->high[1]);
    const __m512i low = _mm512_permutex2var_epi8(t->low[0], index, t->low[1]);
    high = _mm512_ternarylogic_epi32(high, bytes, _mm512_set1_epi8(-128), 0xf8); /* high | (bytes & sign) */
    out[0] = _mm512_unpacklo_epi8(low, high);
    out[1] = _mm512_unpackhi_epi8(low, high);
}

INLINE int pair_of(int type, int i, int side) {
    if (type == INT3) return i == 15 ? 30 + side : i / 5 * 10 + i % 5 + 5 * side;
    return bits_of(type) == 8 ? 2 * i + side : i + unit_of(type) / 2 * side;
}

INLINE uint16_t bf16_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Magnitude of an 8-bit code. */
INLINE float magnitude(int type, int code) {
    if (type == INT8) return code ? (float)code : 128.0f;
    const int places = type == FP8_E4M3 ? 3 : 2, bias = type == FP8_E4M3 ? 7 : 15;
    const int exponent = code >> places, fraction = code & ((1 << places) - 1);
    if (type == FP8_E5M2 && exponent == 31) return __builtin_inff();
    const float mantissa = (float)(exponent ? fraction + (1 << places) : fraction);
    return __builtin_ldexpf(mantissa, (exponent ? exponent : 1) - bias - places);
}

/* Tables of a type; integers up to 4 bits are centred. `table` as for LUT4. */
static void make_tables(int type, const float *table, Tables *to) {
    const int count = 1 << bits_of(type);
    uint16_t words[32], less[32];
    for (int i = 0; i < 32; i++) words[i] = bf16_of(count > 16 ? 0.0f : type == LUT4 ? table[i % count] : (float)(i % count) - middle_of(type));
    for (int i = 0; i < 32; i++) less[i] = bf16_of((float)(i < 16 ? i : i - 32));
    to->words = _mm512_loadu_si512(words);
    to->less = _mm512_loadu_si512(less);
    uint8_t high[128], low[128];
    for (int i = 0; i < 128; i++) {
        const uint16_t value = count > 16 ? bf16_of(magnitude(type, i)) : 0;
        high[i] = (uint8_t)(value >> 8);
        low[i] = (uint8_t)value;
    }
    for (int i = 0; i < 2; i++) {
        to->high[i] = _mm512_loadu_si512(high + 64 * i);
        to->low[i] = _mm512_loadu_si512(low + 64 * i);
    }
    /* In lane l rows 4l .. 4l+3 of columns 0 and 1, then of columns 2 and 3: unpacking the halves of values does the rest. */
    uint8_t order[64];
    for (int i = 0; i < 64; i++) order[i] = (uint8_t)((i / 8 % 2 * 2 + i % 2) * 16 + i / 16 * 4 + i % 8 / 2);
    to->order = _mm512_loadu_si512(order);
}
#endif

#endif
