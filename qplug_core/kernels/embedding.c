/* Rows of a quantized embedding in float32: (code - zero) * scale - shift, each operation rounded, as the definition computes it.
 *
 * codes  [N][ceil(K * bits / 8)]: fields of 2, 4 or 8 bits, the first in the lowest bits of a byte
 * table  [2^bits] float32: value of each field
 * scales [ceil(N / block)][G] float32; zeros and shift likewise, or NULL. A group is `group` columns.
 */
#include "vec.h"

typedef struct {
    const uint8_t *codes;
    const float *table, *scales, *zeros, *shift;
    long k, groups, group, block;
    int bits;
} Embedding;

INLINE void fields(int bits, const uint8_t *codes, const float *table, long k, float *to) {
    const int each = 8 / bits, mask = (1 << bits) - 1;
    for (long i = 0; i < k; i++) to[i] = table[codes[i / each] >> i % each * bits & mask];
}

static void decode_row(const Embedding *e, long row, float *to) {
    const uint8_t *codes = e->codes + row * ((e->k * e->bits + 7) / 8);
    const long grid = row / e->block * e->groups;
    if (e->bits == 2) fields(2, codes, e->table, e->k, to);
    else if (e->bits == 4) fields(4, codes, e->table, e->k, to);
    else fields(8, codes, e->table, e->k, to);
    for (long g = 0; g < e->groups; g++) {
        const long first = g * e->group, end = first + e->group < e->k ? first + e->group : e->k;
        const float scale = e->scales[grid + g], zero = e->zeros ? e->zeros[grid + g] : 0.0f;
        for (long i = first; i < end; i++) to[i] = (to[i] - zero) * scale;
    }
    if (!e->shift) return;
    /* A loop of its own, in which there is no product that a subtraction could be fused with: that would round once instead of twice. */
    __asm__("" ::: "memory");
    for (long i = 0; i < e->k; i++) to[i] -= e->shift[grid + i / e->group];
}

/* rows[count][k] of rows ids[count], which exist. */
EXPORT void qplug_embedding(float *rows, const int64_t *ids, const uint8_t *codes, const float *table, const float *scales, const float *zeros,
                            const float *shift, long count, long k, long groups, long group, long block, int bits, int threads) {
    const Embedding e = {codes, table, scales, zeros, shift, k, groups, group, block, bits};
    if (count * k < 1 << 15) threads = 1; /* waking threads costs more */
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < count; i++) decode_row(&e, ids[i], rows + i * k);
}
