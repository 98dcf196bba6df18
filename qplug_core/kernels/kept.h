/* Scratch arrays that outlive a call. Memory that is touched for the first time costs a fault for each page, which took longer than all
 * other work on an array of activations: 4 to 5 ms for 4 MB on a virtual machine, where a product of 512 tokens takes 40. */
#ifndef QPLUG_KEPT_H
#define QPLUG_KEPT_H

#include <sys/mman.h>

#include "vec.h"

typedef struct { _Alignas(64) size_t bytes; } Block; /* bytes that follow it */

enum { KEPT = 2, LEAST = 1 << 20, MOST = 32 << 20, HUGE_PAGE = 2 << 20 };
static Block *kept[KEPT];

/* An array of `bytes`, aligned to a line, or NULL. Of calls at the same time only some find one that was kept. */
static void *borrow(size_t bytes) {
    for (int i = 0; bytes >= LEAST && i < KEPT; i++) {
        Block *block = __atomic_exchange_n(&kept[i], NULL, __ATOMIC_ACQ_REL);
        if (block && block->bytes >= bytes) return block + 1;
        free(block);
    }
    const size_t page = bytes >= LEAST ? HUGE_PAGE : 64, whole = (size_t)round_up((long)(bytes + sizeof(Block)), (long)page);
    Block *block = aligned_alloc(page, whole);
    if (!block) return NULL;
#if defined(MADV_HUGEPAGE)
    if (page == HUGE_PAGE) madvise(block, whole, MADV_HUGEPAGE);
#endif
    block->bytes = whole - sizeof(Block);
    return block + 1;
}

static void give_back(void *array) {
    if (!array) return;
    Block *block = (Block *)array - 1;
    for (int i = 0; block->bytes >= LEAST && block->bytes <= MOST && i < KEPT; i++) {
        Block *none = NULL;
        if (__atomic_compare_exchange_n(&kept[i], &none, block, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) return;
    }
    free(block);
}

#endif
