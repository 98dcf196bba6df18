/* Products of packed weights with the same row x, for C that calls them: all that a call needs but x and y. Part of weight_only.c, see the arrays there.
 *
 * Where every weight is read from memory, reading is the time: threads walk over the border of one weight into the next.
 */
enum { LINEARS_AT_MOST = 4 };

typedef struct {
    const void *codes, *table, *scales, *zeros, *shifts, *row_scales, *segments, *order, *bias;
    long n, k, kp, groups, count;
    int type, scale_kind, bias_kind;
} Weight;

typedef struct {
    Product p;
#if defined(__AVX512BF16__)
    Tables tables;
#endif
    int use16;
    long tiles, bytes; /* bytes: of one tile */
} Linear;

static int begin_linear(Linear *l, const Weight *w, void *y, const void *x, int kind) {
    l->p = (Product){.x = x, .codes = w->codes, .scales = w->scales, .zeros = w->zeros, .shifts = w->shifts, .bias = w->bias, .table = w->table,
                     .row_scales = w->row_scales, .segments = w->segments, .order = w->order, .y = y, .m = 1, .n = w->n, .k = w->k, .kp = w->kp,
                     .groups = w->groups, .count = w->count, .kind = kind, .y_kind = kind, .scale_kind = w->scale_kind, .bias_kind = w->bias_kind};
    l->use16 = 0;
#if defined(__AVX512BF16__)
    l->use16 = kind == BF16 && exact_enough(w->type, &l->p);
    if (l->use16) make_tables(w->type, w->table, &l->tables);
    l->p.tables = &l->tables;
#endif
    const int summed = l->use16 ? w->zeros || w->shifts : 1;
    l->p.xs = scratch((size_t)w->kp * (l->use16 ? 2 : 4));
    l->p.sums = summed ? scratch((size_t)w->count * 4) : NULL;
    if (!l->p.xs || (summed && !l->p.sums)) return 1;
    prepare_few(w->type, &l->p, l->use16, 0, 1);
    l->tiles = round_up(w->n, TILE) / TILE;
    l->bytes = w->kp / unit_of(w->type) * words_of(w->type) * TILE * 4;
    return 0;
}

/* Tiles first .. end of all tiles, one weight behind the other. */
static void run_tiles(const Linear *l, const Weight *const *w, long first, long end) {
    for (long t = 0; t < end; w++, t += l->tiles, l++)
        for (long tile = first > t ? first - t : 0; tile < end - t && tile < l->tiles; tile++) {
            if (l->use16) variants[(*w)->type].stream16(&l->p, tile, 0);
            else variants[(*w)->type].stream(&l->p, tile);
        }
}

/* y[i][n] from x[k], all of `kind`, for up to LINEARS_AT_MOST weights. Returns 0, or 1 where there was no memory. */
EXPORT int qplug_weight_only_linears(const Weight *const *weights, void *const *y, long count, const void *x, int kind, int threads) {
    Linear linears[LINEARS_AT_MOST] = {0};
    long tiles = 0, codes = 0, bytes = 0, begun = 0;
    int failed = 0;
    for (; begun < count && !failed; begun++) {
        failed = begin_linear(&linears[begun], weights[begun], y[begun], x, kind);
        tiles += linears[begun].tiles;
        codes += weights[begun]->n * weights[begun]->kp;
        bytes = linears[begun].bytes;
    }
    if (!failed && (threads == 1 || codes < 1 << 16)) run_tiles(linears, weights, 0, tiles); /* waking threads costs more */
    else if (!failed) {
        Part parts[threads];
        divide(parts, threads, tiles);
#pragma omp parallel num_threads(threads)
        for (long i = 0; i < threads; i++)
            for (Range r; take(parts, threads, tiles, i, bytes, &r);) run_tiles(linears, weights, r.first, r.end);
    }
    while (begun--) {
        free(linears[begun].p.xs);
        free(linears[begun].p.sums);
    }
    return failed;
}
