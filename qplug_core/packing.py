"""Dense little-endian bit streams: the packing of GPTQ, compressed-tensors, FP4 files and others.

Value ``i`` of a row occupies bits ``b*i`` to ``b*i + b - 1`` of the row's bytes. For 2, 4 and 8 bits this is "first value in
the lowest bits of each int32 word"; for 3 bits some values straddle two bytes, and 32 values fill three words.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from .kernels import cpu_packing


def unpack(stream: Tensor, bits: int) -> Tensor:
    """uint8 values ``[R, L]`` of a stream ``[R, L*bits/32]`` int32, or ``[R, L*bits/8]`` uint8, contiguous, little-endian."""
    if stream.dtype == torch.int32 and cpu_packing.available(stream):
        return cpu_packing.unpack(stream, bits)
    data = stream.view(torch.uint8)
    values, step = _period(bits)
    out = torch.empty(data.shape[0], data.shape[1] // step * values, dtype=torch.uint8)
    for i in range(values):
        byte, shift = divmod(bits * i, 8)
        field = out[:, i::values]
        torch.bitwise_right_shift(data[:, byte::step], shift, out=field)
        if shift + bits > 8:
            field.bitwise_or_(torch.bitwise_left_shift(data[:, byte + 1 :: step], 8 - shift))
    if bits < 8:
        out.bitwise_and_(2**bits - 1)
    return out


def unpack_columns(words: Tensor, bits: int, minus: int = 0) -> Tensor:
    """uint8 values ``[R, L]``, less ``minus`` (wrapping round), of a stream for each column: words int32 ``[L*bits/32, R]``.

    ``minus`` is 0 or ``2**(bits-1)``, which makes the two's complement of a code whose middle is that.
    """
    if cpu_packing.available(words):
        return cpu_packing.unpack(words.t(), bits, minus)
    return unpack(transposed(words), bits).sub_(minus)


def pack(values: Tensor, bits: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Words of ``dtype`` of uint8 values ``[R, L]`` that are below ``2**bits``; L fills whole words. See :func:`unpack`."""
    period, step = _period(bits)
    data = torch.zeros(values.shape[0], values.shape[1] // period * step, dtype=torch.uint8)
    for i in range(period):
        byte, shift = divmod(bits * i, 8)
        field = values[:, i::period]
        data[:, byte::step].bitwise_or_(torch.bitwise_left_shift(field, shift))
        if shift + bits > 8:
            data[:, byte + 1 :: step].bitwise_or_(torch.bitwise_right_shift(field, 8 - shift))
    return data.view(dtype)


def transposed(words: Tensor) -> Tensor:
    """``[A, B]`` as ``[B, A]`` in memory of its own: ``t().contiguous()`` keeps odd strides where A or B is 1."""
    return torch.empty((words.shape[1], words.shape[0]), dtype=words.dtype).copy_(words.t())


def word_values(bits: int) -> int:
    """Values after which a stream is at a word boundary again: the unit of every legal length."""
    return 32 // gcd(32, bits)


def _period(bits: int) -> tuple[int, int]:
    """The smallest run of values that fills whole bytes, and how many bytes that is."""
    shared = gcd(8, bits)
    return 8 // shared, bits // shared
