"""Bit planes: how ``gptq_p`` stores codes whose width does not divide 32.

Every run of 32 codes is ``bits`` int32 words: first the words of the lowest plane, then those of the higher ones. A plane of
width w is 32 fields of w bits, first code in the lowest bits, so that no code straddles a word. Planes of each width,
lowest first: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1; 2, 4 and 8 are one plane, the same words as the dense
stream (GPTQModel, since 2026).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qplug_core import packing

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Widths of the planes of a code, lowest first."""

RUN = 32
"""Codes of one run."""


def unpack(words: Tensor, bits: int) -> Tensor:
    """uint8 codes ``[R, L]`` of int32 words ``[R, L*bits/32]``, contiguous."""
    if len(PLANES[bits]) == 1:
        return packing.unpack(words, bits)
    rows = words.shape[0]
    runs = words.view(rows, words.shape[1] // bits, bits)
    out = torch.zeros(rows, runs.shape[1] * RUN, dtype=torch.uint8)
    low = 0
    for width in PLANES[bits]:
        # A copy into plain strides, which a reshape of one row or run does not promise and a view as bytes needs.
        plane = torch.empty(rows, runs.shape[1] * width, dtype=words.dtype)
        plane.view(rows, runs.shape[1], width).copy_(runs[:, :, low : low + width])
        out.bitwise_or_(packing.unpack(plane, width).bitwise_left_shift_(low))
        low += width
    return out


def pack(codes: Tensor, bits: int) -> Tensor:
    """int32 words of uint8 codes ``[R, L]`` that are below ``2**bits``; L fills whole runs, or whole words of one
    plane. See :func:`unpack`."""
    if len(PLANES[bits]) == 1:
        return packing.pack(codes, bits)
    rows, runs = codes.shape[0], codes.shape[1] // RUN
    planes = []
    low = 0
    for width in PLANES[bits]:
        field = codes.bitwise_right_shift(low).bitwise_and_(2**width - 1)
        planes.append(packing.pack(field, width).view(rows, runs, width))
        low += width
    return torch.cat(planes, dim=-1).view(rows, runs * bits)
