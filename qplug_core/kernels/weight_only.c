/* Weight-only products: y[M, N] = x[M, K] * W[N, K]^T + bias, W of 2, 3, 4 or 8 bits in groups that share a scale and a zero point.
 *
 * Integers: w = (u - z) * s or (u - middle) * s - shift; tables and 8-bit floats: w = value * s. Packing sorts the columns by group and pads
 * each group to whole units, so K grows to KP; `order` says where each column was.
 *
 * codes      see codes.h
 * table      [16] float32, for LUT4
 * scales     [N/16][G][16] float32, bfloat16, float16, e4m3 or E8M0
 * zeros      like scales, or NULL: then 2^(bits-1), the middle of the unsigned codes; with 8 bits 0
 * shifts     [N/16][G][16] float32 or NULL, without zeros: in units of the weight
 * row_scales [16 * ceil(N/16)] float32 or NULL, multiply the sums of a row: the second level of two-level scales
 * segments   [S][4] int32: first unit, end unit, group, group of x_scales. At most 128 columns each, in order, so that sums stay short.
 * order      [KP] int32: column of x for each packed column, -1 for padding (x is 0 there); NULL where it is the identity
 * x_scales   [M][GX] float32 or NULL: of activations that are codes, multiply them; GX = 1: by token
 *
 * bfloat16 activations take the dot products of AVX512-BF16 where there are any (bf16_product.h), everything else float32.
 */
#include "float_product.h"
#include "kept.h"
#include "walk.h"
#if defined(__AVX512BF16__)
#include "bf16_product.h"
#else
enum { MR16 = MR, BLOCK16 = BLOCK, WIDE = 1 };
#endif

enum { SMALL = 16 };

/* The kernels of one type: OpenMP would outline loops before a constant type reached them. */
typedef struct {
    void (*stream)(const Product *p, long tile);
    void (*panel)(const Product *p, long index, long m0, long m1);
    void (*stream16)(const Product *p, long tile, int two);
    void (*panels16)(const Product *p, long n0, long n1, long m0, long m1, long rows);
} Variant;

#define FLOATS(type) \
    static void stream_##type(const Product *p, long tile) { stream_tokens(type, p, tile); } \
    static void panel_##type(const Product *p, long index, long m0, long m1) { panel(type, p, index, m0, m1); }
#if defined(__AVX512BF16__)
#define VARIANT(type) FLOATS(type) \
    static void stream16_##type(const Product *p, long tile, int two) { stream_tokens16(type, p, tile, two); } \
    static void panels16_##type(const Product *p, long n0, long n1, long m0, long m1, long rows) { panels16(type, p, n0, n1, m0, m1, rows); }
#define ROW(type) [type] = {stream_##type, panel_##type, stream16_##type, panels16_##type}
#else
#define VARIANT(type) FLOATS(type)
#define ROW(type) [type] = {stream_##type, panel_##type, NULL, NULL}
#endif
VARIANT(INT2)
VARIANT(INT3)
VARIANT(INT4)
VARIANT(INT8)
VARIANT(LUT4)
VARIANT(FP8_E4M3)
VARIANT(FP8_E5M2)
static const Variant variants[TYPES] = {ROW(INT2), ROW(INT3), ROW(INT4), ROW(INT8), ROW(LUT4), ROW(FP8_E4M3), ROW(FP8_E5M2)};

/* Rows of x in one block of xs, for the path with few tokens. */
static long tokens_at_once(long m) { return m <= 1 ? 1 : m <= 2 ? 2 : m <= 4 ? 4 : 8; }

static void prepare_many(int type, const Product *p, int use16, long row, long rows) {
    if (!use16) {
        prepare(type, p, MR, row);
        return;
    }
#if defined(__AVX512BF16__)
    for (long s0 = 0, s1; s0 < p->count; s0 = s1) {
        s1 = chunk_end(type, p, s0, CHUNK16);
        const long first = (long)p->segments[4 * s0] * unit_of(type), columns = (long)p->segments[4 * s1 - 3] * unit_of(type) - first;
        prepare16(type, p, row, s0, s1, (uint16_t *)p->xs + first * rows + row * columns);
    }
#else
    (void)rows;
#endif
}

/* Row `row` of x alone behind all blocks, then between the others of its block. */
static void prepare_few(int type, const Product *p, int use16, long row, long R) {
    if (!use16) prepare(type, p, (int)R, row);
#if defined(__AVX512BF16__)
    else if (p->count) {
        uint16_t *block = (uint16_t *)p->xs + row / R * R * p->kp, *alone = (uint16_t *)p->xs + (round_up(p->m, R) + row) * p->kp;
        prepare16(type, p, row, 0, p->count, R == 1 ? block : alone);
        for (long i = 0; R > 1 && i < p->kp / 2; i++) memcpy(block + (i * R + row % R) * 2, alone + i * 2, 4);
    }
#endif
}

static void run(int type, const Product *p, int use16, int threads) {
    const Variant *variant = &variants[type];
    const long tiles = round_up(p->n, TILE) / TILE;
    if (p->m <= SMALL) {
        const long R = tokens_at_once(p->m);
        const long at_once = use16 && p->m > 4 && type != INT3 ? 2 : 1, tasks = (tiles + at_once - 1) / at_once;
        const long bytes = at_once * (p->kp / unit_of(type)) * words_of(type) * TILE * 4;
        Part parts[threads];
        divide(parts, threads, tasks);
        if (R == 1) prepare_few(type, p, use16, 0, R);
#pragma omp parallel num_threads(threads)
        {
            if (R > 1) {
#pragma omp for schedule(static)
                for (long m = 0; m < round_up(p->m, R); m++) prepare_few(type, p, use16, m, R);
            }
            for (long i = 0; i < threads; i++)
                for (Range r; take(parts, threads, tasks, i, bytes, &r);)
                    for (long t = r.first; t < r.end; t++) {
                        if (use16) variant->stream16(p, at_once * t, at_once == 2 && 2 * t + 1 < tiles);
                        else variant->stream(p, t);
                    }
        }
        return;
    }
    const long rows = round_up(p->m, use16 ? MR16 : MR), most_rows = use16 ? BLOCK16 : BLOCK, blocks = (rows + most_rows - 1) / most_rows;
    const long block = round_up((rows + blocks - 1) / blocks, use16 ? MR16 : MR), panels = (p->n + PANEL - 1) / PANEL;
    /* Panels that one task takes: several where that leaves enough tasks. */
    const long most = use16 ? WIDE : 1, share = panels * blocks / (threads * 4L), wide = share > most ? most : share > 1 ? share : 1;
    const long groups = (panels + wide - 1) / wide;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long m = 0; m < rows; m++) prepare_many(type, p, use16, m, rows);
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < groups * blocks; i++) {
            const long m0 = i / groups * block, m1 = m0 + block < rows ? m0 + block : rows;
            const long n0 = i % groups * wide, n1 = n0 + wide < panels ? n0 + wide : panels;
            if (use16) variant->panels16(p, n0, n1, m0, m1, rows);
            else variant->panel(p, n0, m0, m1);
        }
    }
}

/* y[m, n]; see the top for the arrays. `kind` is of x, `y_kind` of y. Returns 0, or 1 where there was no memory. */
EXPORT int qplug_weight_only(void *y, const void *x, const void *codes, const void *table, const void *scales, const void *zeros,
                             const void *shifts, const void *row_scales, const void *segments, const void *order, const void *x_scales,
                             const void *bias, long m, long n, long k, long kp, long groups, long count, long x_groups, int type, int kind, int y_kind,
                             int scale_kind, int bias_kind, int threads) {
    Product p = {x, codes, scales, zeros, bias, shifts, table, row_scales, x_scales, segments, order, y, m, n, k, kp, groups, count, x_groups,
                 kind, y_kind, scale_kind, bias_kind, 0, 0, NULL, NULL, NULL};
    const int small = m <= SMALL;
    int use16 = 0;
    if (!m) return 0;
#if defined(__AVX512BF16__)
    Tables tables;
    use16 = kind == BF16 && exact_enough(type, &p);
    if (use16) make_tables(type, table, &tables);
    p.tables = &tables;
    p.fold = folds(type, &p);
    p.integers = use16 && !small && integers(type, &p);
#endif
    const long rows = round_up(m, small ? tokens_at_once(m) : use16 ? MR16 : MR);
    const int summed = use16 ? (small || !p.fold) && ((zeros && !p.integers) || shifts) : small;
    p.xs = borrow((size_t)((use16 && small ? 2 * rows : rows) * kp) * (use16 ? 2 : 4)); /* twice: see prepare_few */
    p.sums = summed ? borrow((size_t)(rows * count) * 4) : NULL;
    const int failed = !p.xs || (summed && !p.sums);
    if (!failed) run(type, &p, use16, n * kp < 1 << 16 ? 1 : threads); /* waking threads costs more */
    give_back(p.xs);
    give_back(p.sums);
    return failed;
}

#include "weight_only_experts.h"
#include "weight_only_linear.h"
