"""Packed integers of compressed-tensors: dense bit streams with a ragged end, and the older padded words."""

from __future__ import annotations

import torch
from torch import Tensor

from qplug_core.packing import pack, unpack, word_values


def words_axis(axis: str, bits: int, padded: bool = False) -> str:
    """The declared axis of int32 words that hold ``bits``-wide values along ``axis``.

    Dense: one bit stream, ``ceil(bits * L / 32)`` words. Padded (compressed-tensors before 0.17, widths that do not
    divide 32): ``32 // bits`` values in the low bits of each word.
    """
    if padded:
        return f"ceil({axis}/{32 // bits})"
    unit = word_values(bits)
    words = unit * bits // 32
    return f"ceil({axis}/{unit})" if words == 1 else f"ceil({words}*{axis}/{unit})"


def unpack_rows(words: Tensor, bits: int, length: int, padded: bool = False) -> Tensor:
    """uint8 values ``[R, length]`` of int32 words ``[R, W]``."""
    if padded and 32 % bits:
        each = 32 // bits
        out = torch.empty(words.shape[0], words.shape[1], each, dtype=torch.uint8)
        for i in range(each):
            out[:, :, i] = torch.bitwise_right_shift(words, bits * i) & (2**bits - 1)
        return _first(out.flatten(1), length)
    unit = word_values(bits) * bits // 32
    short = -words.shape[1] % unit
    if short:
        words = torch.nn.functional.pad(words, (0, short))
    return _first(unpack(words.contiguous(), bits), length)


def pack_rows(values: Tensor, bits: int, padded: bool = False) -> Tensor:
    """int32 words ``[R, W]`` of uint8 values ``[R, L]``; what is left of the last word is zero. See :func:`words_axis`."""
    length = values.shape[1]
    unit = 32 // bits if padded and 32 % bits else word_values(bits)
    filled = torch.nn.functional.pad(values, (0, -length % unit))
    if padded and 32 % bits:
        parts = filled.view(values.shape[0], -1, unit).to(torch.int64)
        total = sum(parts[:, :, i] << (bits * i) for i in range(unit))
        assert isinstance(total, Tensor)
        # Six values of five bits and the like leave the sign bit free, so this never overflows.
        return total.to(torch.int32)
    return pack(filled, bits)[:, : -(-length * bits // 32)].contiguous()


def _first(values: Tensor, length: int) -> Tensor:
    return values if values.shape[1] == length else values[:, :length].contiguous()
