"""Packing of 4-bit codes, as ModelOpt stores them.

FP4: two columns of one row share a byte, the even one in the low bits. INT4: two **rows** of one column share a byte, the even
row in the low bits, in two's complement: byte 0x9F is -1 in the even row and -7 in the odd one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qplug_core.packing import pack, unpack


def unpack_fp4(packed: Tensor) -> Tensor:
    """uint8 codes ``[N, K]`` of uint8 ``[N, K/2]``."""
    return unpack(packed.contiguous(), 4)


def pack_fp4(codes: Tensor) -> Tensor:
    """The inverse of :func:`unpack_fp4`."""
    return pack(codes.contiguous(), 4, torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """int8 codes ``[N, K]`` of bytes ``[N/2, K]``."""
    data = packed.contiguous().view(torch.int8)
    codes = torch.empty((2 * data.shape[0], data.shape[1]), dtype=torch.int8)
    # A shift to the left and an arithmetic one back carry the sign of the low half along.
    torch.bitwise_left_shift(data, 4, out=codes[0::2])
    torch.bitwise_right_shift(data, 4, out=codes[1::2])
    codes[0::2].bitwise_right_shift_(4)
    return codes


def pack_int4(codes: Tensor) -> Tensor:
    """The inverse of :func:`unpack_int4`; N is even."""
    low = codes[0::2].bitwise_and(15)
    return low.bitwise_or_(codes[1::2].bitwise_left_shift(4)).view(torch.uint8)
