/* Codes on their way from files to kernels: dense bit streams and AWQ's words to one byte each, bytes to the layout of codes.h.
 *
 * A stream of `bits`-wide fields has the first in its lowest bits. Fields are spread to bytes, and gathered from them, eight at a time (BMI2).
 */
#include <immintrin.h>
#undef __AVX512BF16__ /* nothing is multiplied here, and tables for that would be left over */
#include "codes.h"

enum { WIDTH = 64, SHARE = 4 }; /* columns that are worked on at once: a whole line of each row is written; blocks of rows that a thread takes */

INLINE uint64_t each_byte(int x) { return 0x0101010101010101u * (uint64_t)x; }

/* Eight bytes below 128, less `minus` each, or all less 128. */
INLINE uint64_t less(uint64_t x, int minus) {
    const uint64_t high = each_byte(128);
    return minus == 128 ? x ^ high : ((x | high) - each_byte(minus)) ^ high;
}

/* `count` fields of a stream, at most WIDTH, to bytes. What lies behind the stream is read as far as 8 bytes. */
INLINE void spread(uint8_t *to, const uint8_t *stream, long count, int bits, int minus) {
    const uint64_t mask = each_byte((1 << bits) - 1);
    uint64_t bytes[WIDTH / 8];
    for (long i = 0; i < (count + 7) / 8; i++) {
        uint64_t fields;
        memcpy(&fields, stream + i * bits, 8);
        fields = _pdep_u64(fields, mask);
        bytes[i] = minus ? less(fields, minus) : fields;
    }
    memcpy(to, bytes, (size_t)count);
}

/* codes[n][k] of streams along K. Word i of row r is words[i * step + r * apart]; (k * bits) % 32 == 0. */
EXPORT void qplug_unpack(uint8_t *codes, const uint32_t *words, long n, long k, long step, long apart, int bits, int minus, int threads) {
    const long count = k * bits / 32, rows = step == 1 ? 1 : 16; /* where words of neighbouring rows lie side by side, they are read together */
    const int most = WIDTH * bits / 32;
    if (n * k < 1 << 16) threads = 1;
#pragma omp parallel for schedule(dynamic, SHARE) num_threads(threads)
    for (long r0 = 0; r0 < n; r0 += rows)
        for (long i = 0; i < count; i += most) {
            const long some = count - i < most ? count - i : most;
            for (long r = r0; r < r0 + rows && r < n; r++) {
                uint32_t stream[WIDTH / 4 + 2] = {0};
                for (long j = 0; j < some; j++) stream[j] = words[(i + j) * step + r * apart];
                spread(codes + r * k + i * 32 / bits, (const uint8_t *)stream, some * 32 / bits, bits, minus);
            }
        }
}

/* Bytes [8][8] transposed. */
INLINE void transpose8(const uint64_t *from, uint8_t *to, long stride) {
    __m128i r[8], t[4], u[4], v[4];
    UNROLL for (int i = 0; i < 8; i++) r[i] = _mm_cvtsi64_si128((long long)from[i]);
    UNROLL for (int i = 0; i < 4; i++) t[i] = _mm_unpacklo_epi8(r[2 * i], r[2 * i + 1]);
    UNROLL for (int i = 0; i < 2; i++) {
        u[2 * i] = _mm_unpacklo_epi16(t[2 * i], t[2 * i + 1]);
        u[2 * i + 1] = _mm_unpackhi_epi16(t[2 * i], t[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 2; i++) {
        v[2 * i] = _mm_unpacklo_epi32(u[i], u[2 + i]);
        v[2 * i + 1] = _mm_unpackhi_epi32(u[i], u[2 + i]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        _mm_storel_epi64((void *)(to + 2 * i * stride), v[i]);
        _mm_storeh_pd((void *)(to + (2 * i + 1) * stride), _mm_castsi128_pd(v[i]));
    }
}

/* codes[8 * count][k] of words[k][count] of eight 4-bit fields; field f is code order[f] of the eight. */
EXPORT void qplug_unpack_awq(uint8_t *codes, const uint32_t *words, const int32_t *order, long count, long k, int threads) {
    enum { SOME = 16 }; /* words of a line */
    if (count * k < 1 << 13) threads = 1;
#pragma omp parallel for schedule(dynamic, SHARE) num_threads(threads)
    for (long w0 = 0; w0 < count; w0 += SOME)
        for (long k0 = 0; k0 < k; k0 += WIDTH) {
            const long columns = k - k0 < WIDTH ? k - k0 : WIDTH;
            for (long w = w0; w < w0 + SOME && w < count; w++) {
                uint8_t eight[8][WIDTH];
                for (long c = 0; c < columns; c += 8) {
                    uint64_t fields[8];
                    for (int i = 0; i < 8; i++) fields[i] = c + i < columns ? _pdep_u64(words[(k0 + c + i) * count + w], each_byte(15)) : 0;
                    transpose8(fields, eight[0] + c, WIDTH);
                }
                for (int f = 0; f < 8; f++) memcpy(codes + (8 * w + order[f]) * k + k0, eight[f], (size_t)columns);
            }
        }
}

/* Bytes [16][16], rows `stride` apart, transposed. */
INLINE void transpose16(const uint8_t *from, long stride, uint8_t *to) {
    __m128i a[16], b[16];
    UNROLL for (int i = 0; i < 16; i++) a[i] = _mm_loadu_si128((const void *)(from + i * stride));
    /* Four times, each row is interleaved with the one eight further. */
    UNROLL for (int stage = 0; stage < 4; stage++) {
        UNROLL for (int i = 0; i < 8; i++) {
            b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
            b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
        }
        UNROLL for (int i = 0; i < 16; i++) a[i] = b[i];
    }
    UNROLL for (int i = 0; i < 16; i++) _mm_storeu_si128((void *)(to + 16 * i), a[i]);
}

INLINE uint32_t gathered(const uint8_t *bytes, int count, int bits) {
    uint64_t some;
    memcpy(&some, bytes, 8);
    return (uint32_t)_pext_u64(some, each_byte((1 << bits) - 1) >> (64 - 8 * count));
}

/* One row of a unit to its words, which are TILE apart. */
INLINE void unit_words(int type, const uint8_t *bytes, uint32_t *to) {
    const int bits = bits_of(type);
    if (type == INT2) to[0] = gathered(bytes, 8, bits) | gathered(bytes + 8, 8, bits) << 16;
    else if (type != INT3) to[0] = gathered(bytes, 8, bits);
    else
        for (int i = 0; i < 3; i++) {
            const uint32_t low = gathered(bytes + 10 * i, 5, bits) | (bytes[30] >> i & 1u) << 15;
            to[i * TILE] = low | gathered(bytes + 10 * i + 5, 5, bits) << 16 | (uint32_t)(bytes[31] >> i & 1) << 31;
        }
}

INLINE int not_a_number(int type, uint8_t code) {
    return type == FP8_E4M3 ? (code & 0x7f) == 0x7f : type == FP8_E5M2 ? (code & 0x7f) > 0x7c : 0;
}

/* Columns first .. first + count of a row as they are stored. Returns whether there was a NaN, which is stored as 0. */
INLINE uint8_t stored(int type, const uint8_t *row, const int32_t *order, long first, long count, int flip, uint8_t *to) {
    uint8_t missing = 0;
    if (order) for (long i = 0; i < count; i++) to[i] = order[first + i] >= 0 ? row[order[first + i]] ^ (uint8_t)flip : type == INT8 ? 128 : 0;
    else for (long i = 0; i < count; i++) to[i] = row[first + i] ^ (uint8_t)flip;
    if (type == FP8_E4M3 || type == FP8_E5M2)
        for (long i = 0; i < count; i++) {
            const uint8_t nan = (uint8_t)not_a_number(type, to[i]);
            missing |= nan;
            to[i] = nan ? 0 : to[i];
        }
    return missing;
}

INLINE void pack_tile(int type, uint8_t *packed, uint8_t *missing, const uint8_t *codes, const int32_t *order, long n, long k, long kp, int flip, long tile) {
    uint8_t bytes[TILE][WIDTH + 8];
    const int unit = unit_of(type), words = words_of(type) * TILE;
    memset(bytes, type == INT8 ? 128 : 0, sizeof bytes);
    for (long c = 0; c < kp; c += WIDTH) {
        const long count = kp - c < WIDTH ? kp - c : WIDTH;
        for (long i = 0; i < TILE && tile * TILE + i < n; i++) {
            const long row = tile * TILE + i;
            const uint8_t nan = stored(type, codes + row * k, order, c, count, flip, bytes[i]);
            if (missing) missing[row] |= nan;
        }
        if (bits_of(type) == 8) {
            uint8_t *to = packed + (tile * kp + c) * TILE, turned[16 * TILE];
            for (long j = 0; j < count; j += 16) {
                transpose16(bytes[0] + j, WIDTH + 8, turned);
                memcpy(to + j * TILE, turned, (size_t)((count - j < 16 ? count - j : 16) * TILE));
            }
        } else {
            uint32_t *to = (uint32_t *)packed + (tile * kp + c) / unit * words;
            for (long u = 0; u < count / unit; u++)
                for (int i = 0; i < TILE; i++) unit_words(type, bytes[i] + u * unit, to + u * words + i);
        }
    }
}

/* codes[n][k], one byte each, to the layout of codes.h with kp columns. `order` [kp]: column of each packed one, -1 for padding; NULL where
 * they are the same. `flip`: bits that are turned over in every code. `missing` [n] or NULL: set to 1 for rows with a NaN. */
EXPORT void qplug_pack(uint8_t *packed, uint8_t *missing, const uint8_t *codes, const int32_t *order, long n, long k, long kp, int type, int flip,
                       int threads) {
    if (n * kp < 1 << 16) threads = 1;
#pragma omp parallel for schedule(dynamic, SHARE) num_threads(threads)
    for (long tile = 0; tile < (n + TILE - 1) / TILE; tile++)
        switch (type) {
#define CASE(type) case type: pack_tile(type, packed, missing, codes, order, n, k, kp, flip, tile); break;
            CASE(INT2) CASE(INT3) CASE(INT4) CASE(INT8) CASE(LUT4) CASE(FP8_E4M3) CASE(FP8_E5M2)
#undef CASE
        }
}
