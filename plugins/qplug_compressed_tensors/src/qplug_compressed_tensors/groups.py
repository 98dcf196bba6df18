"""The order of columns: ``weight_g_idx``."""

from __future__ import annotations

import torch
from torch import Tensor

from qplug_core.errors import DecodeError


def trivial_index(index: Tensor, group: int, count: int, k: int) -> tuple[Tensor | None, slice]:
    """The index to keep (None where columns are in groups by position), and the columns of the scales that it needs.

    ``index`` int32 ``[K]``; ``count`` groups of ``group`` columns have scales.

    :raises DecodeError: for an index outside of the scales.
    """
    if index.numel() == 0:
        return None, slice(0, 0)
    low, high = int(index.min()), int(index.max())
    if low == high == -1 and count == -(-k // group):
        return None, slice(None)  # Set aside by the producer, and never filled: columns stayed where they were.
    if low < 0 or high >= count:
        raise DecodeError(
            f"weight_g_idx assigns columns to groups {low} to {high}, and the file has scales of groups 0 to {count - 1}; one of the "
            "two is damaged, or columns without an order are cut, so fetch the file again or load it on one rank"
        )
    first = int(index[0])
    if torch.equal(index - first, torch.arange(index.numel(), dtype=index.dtype) // group):
        return None, slice(first, high + 1)
    return index.to(torch.int32), slice(None)
