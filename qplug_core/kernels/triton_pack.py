"""Packing of weight-only weights for Triton: columns into groups and units, codes into bytes, scales into rows of groups.

A unit is ``P`` parts of ``S`` columns: 1, 2, 4 or 8 parts for 8, 4, 2 or 3 bits. Byte j of a unit holds column j of every part, the first
part in the lowest bits, so that a shift gives S neighbouring columns and nothing has to be interleaved. 3 bits are three blocks
of S bytes: two bits of parts 0 to 3, two bits of parts 4 to 7, the third bit of all eight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..weight import QuantWeight

PARTS = {8: 1, 4: 2, 3: 8, 2: 4}
WIDEST = {8: 128, 4: 64, 3: 16, 2: 32}
"""Columns of a part, at most: a unit is 128 columns."""
NARROWEST = 16
"""Columns of a part, at least: the depth of the smallest matrix instruction."""


class Columns(NamedTuple):
    """How columns are laid out.

    ``group``: columns of each group, padding included; 0 where all columns share one. ``part``: S. ``order`` int32 ``[KP]``: the column
    of x that stands at each position, -1 for padding; None where columns are in order, and only the end is padded.
    """

    group: int
    part: int
    order: Tensor | None


def columns_of(weight: QuantWeight, bits: int, narrowest: int = NARROWEST) -> Columns:
    """The layout of the columns of a weight: groups that fit no part of ``narrowest`` columns, and act order, become an order with padding."""
    groups, size = weight.scales.shape[-1], weight.block[1]
    if groups == 1:
        return Columns(0, WIDEST[bits], None)
    order = None
    if weight.group_index is not None or size % narrowest:
        index = (
            torch.arange(weight.k, device=weight.codes.device) // size
            if weight.group_index is None
            else weight.group_index.long()
        )
        order, size = _by_group(index, groups)
    part = WIDEST[bits]
    while size % part:
        part //= 2
    return Columns(size, part, order)


def _by_group(index: Tensor, groups: int) -> tuple[Tensor, int]:
    """Positions of columns sorted by group, and the padded size of a group, a multiple of 32."""
    counts = torch.bincount(index, minlength=groups)
    size = -(-int(counts.max()) // 32) * 32
    members = torch.argsort(index, stable=True)
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(index), device=index.device) - starts[index[members]]
    order = torch.full((groups, size), -1, dtype=torch.int32, device=index.device)
    order[index[members], place] = members.to(torch.int32)
    return order.reshape(-1), size


def pack_codes(codes: Tensor, bits: int, columns: Columns) -> tuple[Tensor, Tensor | None]:
    """Unsigned codes ``[N, K]`` uint8 as bytes ``[N, units * unit * bits / 8]``, and the order padded to whole units."""
    unit = columns.part * PARTS[bits]
    order = columns.order
    if order is not None:
        codes = torch.where(order >= 0, codes[:, order.clamp(min=0).long()], 0)
    short = -codes.shape[1] % unit
    codes = torch.nn.functional.pad(codes, (0, short))
    if order is not None:
        order = torch.nn.functional.pad(order, (0, short), value=-1)
    parts = codes.view(len(codes), -1, PARTS[bits], columns.part)
    if bits == 3:
        low, high = parts & 3, parts >> 2
        blocks = [_shifted(low[:, :, :4], 2), _shifted(low[:, :, 4:], 2), _shifted(high, 1)]
        packed = torch.stack(blocks, dim=2)
    else:
        packed = _shifted(parts, bits)
    return packed.reshape(len(codes), -1).contiguous(), order


def _shifted(parts: Tensor, bits: int) -> Tensor:
    """Parts ``[N, units, P, S]`` in one byte each, the first in the lowest bits: ``[N, units, S]``."""
    byte = torch.zeros_like(parts[:, :, 0])
    for i in range(parts.shape[2]):
        byte |= parts[:, :, i] << (bits * i)
    return byte


def by_group(grid: Tensor, columns: Columns, length: int) -> Tensor:
    """A grid ``[N/bn, G]`` as rows of groups ``[G', N/bn]``, with zeros for groups that only padding up to ``length`` columns reaches."""
    count = -(-length // columns.group) if columns.group else 1
    bits = grid.contiguous().view(torch.uint8) if grid.is_floating_point() and grid.element_size() == 1 else grid
    return torch.nn.functional.pad(bits, (0, max(count - grid.shape[1], 0))).t().contiguous()
