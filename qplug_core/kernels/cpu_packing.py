"""Codes from files and into layouts in C, on all threads: what loading a checkpoint spends its time with. See ``packing.c``.

Without a compiler or a vector unit the torch code of :mod:`qplug_core.packing` and of the formats does the same, slower.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..support import Refusal
from . import builder, huge_pages

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_ARGUMENTS = {
    "qplug_unpack": [_POINTER] * 2 + [_LONG] * 4 + [_INT] * 3,
    "qplug_unpack_awq": [_POINTER] * 3 + [_LONG] * 2 + [_INT],
    "qplug_pack": [_POINTER] * 4 + [_LONG] * 3 + [_INT] * 3,
}


@functools.cache
def _function(name: str) -> ctypes._NamedFuncPointer:
    function: ctypes._NamedFuncPointer = getattr(builder.library("packing"), name)
    function.argtypes = _ARGUMENTS[name]
    function.restype = None
    return function


def available(words: Tensor) -> bool:
    """Whether ``words`` lie in the memory of a CPU that the C code runs on."""
    return words.device.type == "cpu" and not isinstance(builder.load("packing"), Refusal)


def unpack(words: Tensor, bits: int, minus: int = 0) -> Tensor:
    """uint8 values ``[R, L]``, less ``minus``, of int32 words ``[R, L*bits/32]`` of any strides; see :func:`qplug_core.packing.unpack`."""
    rows, count = words.shape
    codes = torch.empty(rows, count * 32 // bits, dtype=torch.uint8)
    apart, step = words.stride()
    _function("qplug_unpack")(
        codes.data_ptr(), words.data_ptr(), *codes.shape, step, apart, bits, minus, torch.get_num_threads()
    )
    return codes


def unpack_awq(words: Tensor, order: Sequence[int]) -> Tensor:
    """uint8 codes ``[8*W, K]`` of int32 words ``[K, W]`` of eight 4-bit fields; field f, from the low bits up, is code ``order[f]`` of the eight."""
    words = words.contiguous()
    k, count = words.shape
    codes = torch.empty(8 * count, k, dtype=torch.uint8)
    places = (ctypes.c_int32 * 8)(*order)
    _function("qplug_unpack_awq")(codes.data_ptr(), words.data_ptr(), places, count, k, torch.get_num_threads())
    return codes


def pack(
    codes: Tensor, order: Tensor | None, shape: Sequence[int], columns: int, kind: int, flip: int
) -> tuple[Tensor, Tensor]:
    """Codes ``[N, K]`` of one byte in the layout of ``codes.h``, as int32 (8 bits: int8 or uint8) of ``shape``, and which rows held a NaN.

    ``order`` int32 ``[columns]``: the column at each place, -1 for padding; None where they are the same. ``kind``: ``enum type``.
    ``flip``: bits that are turned over in every code.
    """
    codes = codes.view(torch.uint8).contiguous()
    dtype = torch.int32 if len(shape) == 4 else torch.uint8
    packed = huge_pages.empty(shape, dtype)
    missing = torch.zeros(codes.shape[0], dtype=torch.uint8)
    _function("qplug_pack")(
        packed.data_ptr(), missing.data_ptr(), codes.data_ptr(), None if order is None else order.data_ptr(), *codes.shape, columns,
        kind, flip, torch.get_num_threads(),
    )  # fmt: skip
    return packed, missing.bool()
