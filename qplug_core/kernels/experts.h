/* Experts of one layer in one call. Tokens come sorted by expert: those of expert e are rows ends[e-1] .. ends[e]. */
#ifndef QPLUG_EXPERTS_H
#define QPLUG_EXPERTS_H

#include "vec.h"

/* A product of tokens m0 .. m0 + m with expert e. Returns 0, or 1 where there was no memory. */
typedef int Expert(const void *call, long e, long m0, long m, int threads);
typedef struct { long e, first, count; } Share;

enum { READING = 8 }; /* reading a weight costs about as much as this many tokens times it */

static int more_tokens(const void *a, const void *b) {
    const long left = ((const Share *)a)->count, right = ((const Share *)b)->count;
    return (left < right) - (left > right);
}

/* Every expert that has tokens, each on one thread, most tokens first. Those with so many that others would wait for them come before,
 * on all threads. `rows`: of x; what `ends` says beyond is not looked at. */
static int each_expert(Expert *one, const void *call, const int64_t *ends, long experts, long rows, int threads) {
    Share *shares = malloc((size_t)experts * sizeof(Share) + 1);
    if (!shares) return 1;
    long some = 0, total = 0, narrow = 0;
    for (long e = 0, first = 0; e < experts; e++) {
        const long end = ends[e] < rows ? ends[e] : rows;
        if (end <= first) continue;
        shares[some++] = (Share){e, first, end - first};
        total += end - first + READING;
        first = end;
    }
    int failed = 0;
    for (long i = 0; i < some; i++) {
        const Share s = shares[i];
        if (threads > 1 && (s.count + READING) * threads * 2 > total) failed |= one(call, s.e, s.first, s.count, threads);
        else shares[narrow++] = s;
    }
    qsort(shares, (size_t)narrow, sizeof(Share), more_tokens);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) reduction(| : failed)
    for (long i = 0; i < narrow; i++) failed |= one(call, shares[i].e, shares[i].first, shares[i].count, 1);
    free(shares);
    return failed;
}

/* Part e of a stack of which each takes `bytes`; NULL of NULL. */
INLINE const void *part(const void *stack, long bytes, long e) { return stack ? (const char *)stack + bytes * e : NULL; }

#endif
