"""Memory for packed weights in pages of 2 MB where Linux gives them: a weight that is read whole for every token misses fewer translations."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = 1 << 21


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU without values. From 2 MB on it begins a page, and its whole pages are asked for; what is left is of small ones."""
    size = math.prod(shape) * dtype.itemsize
    if size < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(*shape, dtype=dtype)
    try:
        # Room that is never written takes no memory.
        room = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = torch.frombuffer(room, dtype=torch.uint8)
        start = -whole.data_ptr() % PAGE
        room.madvise(mmap.MADV_HUGEPAGE, start, size // PAGE * PAGE)
    except OSError:  # A kernel that was built without them, or too many mappings; nothing else depends on it.
        return torch.empty(*shape, dtype=dtype)
    return whole[start : start + size].view(dtype).view(*shape)
