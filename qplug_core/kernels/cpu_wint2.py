"""WINT2's bytes times float activations on x86 CPUs: the operations ``qplug::wint2`` and ``qplug::wint2_experts``; layouts in ``wint2.c``."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import builder
from .cpu_weight_only import INT8, TILE, UNITS, weight_only
from .torch_c import KINDS, address, bias_kind, operation

GROUP = 64
"""Columns that share a local scale."""
FEW = 16
"""Tokens up to which decoding again for every eight of them costs less than making bytes of the whole weight."""


class _Functions(NamedTuple):
    product: ctypes._NamedFuncPointer
    experts: ctypes._NamedFuncPointer
    bytes: ctypes._NamedFuncPointer


@functools.cache
def _functions() -> _Functions:
    library = builder.library("wint2")
    found = _Functions(library.qplug_wint2, library.qplug_wint2_experts, library.qplug_wint2_bytes)
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
    found.product.argtypes = [pointer] * 6 + [long] * 3 + [integer] * 3
    found.experts.argtypes = [pointer] * 7 + [long] * 4 + [integer] * 3
    found.bytes.argtypes = [pointer] * 5 + [long] * 2 + [integer]
    found.bytes.restype = None
    return found


def pack(stored: Tensor, local: Tensor, maps: Tensor) -> dict[str, Tensor]:
    """``wint2.c``'s layout of bytes uint8 ``[K/4, N]``, local scales uint8 ``[K/64, N]``, and slope, offset, super scale float32 ``[3, N]``."""

    def tiles(rows: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % TILE))
        return padded.view(len(rows), -1, TILE).transpose(0, 1).contiguous()

    return {"codes": tiles(stored), "maps": tiles(maps), "locals": tiles(local)}


@functools.cache
def _segments(k: int) -> Tensor:
    """Segments of ``weight_only.c``: one for each group."""
    group, unit = torch.arange(k // GROUP), GROUP // UNITS[INT8]
    return torch.stack([group * unit, (group + 1) * unit, group, torch.zeros_like(group)], 1).int()


def _many(x: Tensor, codes: Tensor, maps: Tensor, local: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """The product by way of bytes."""
    k = x.shape[-1]
    values, scales = torch.empty(codes.shape[0], k, TILE, dtype=torch.int8), torch.empty(local.shape)
    pointers = [t.data_ptr() for t in (values, scales, codes, maps, local)]
    _functions().bytes(*pointers, n, k, torch.get_num_threads())
    y: Tensor = weight_only(x, values, None, scales, None, None, None, _segments(k), None, None, bias, n, INT8, 0, None)
    return y


def _run(x: Tensor, codes: Tensor, maps: Tensor, local: Tensor, bias: Tensor | None, n: int) -> Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    k = x.shape[-1]
    m = x.numel() // k
    if m > FEW:
        return _many(x, codes, maps, local, bias, n)
    y = x.new_empty((*x.shape[:-1], n))
    failed = _functions().product(
        y.data_ptr(), x.data_ptr(), codes.data_ptr(), maps.data_ptr(), local.data_ptr(), address(bias), m, n, k, KINDS[x.dtype],
        bias_kind(bias), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for {m} tokens of {k} columns")
    return y


def _fake(x: Tensor, codes: Tensor, maps: Tensor, local: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _run_experts(x: Tensor, codes: Tensor, maps: Tensor, local: Tensor, bias: Tensor | None, ends: Tensor, n: int) -> Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    t, k = x.shape
    y = x.new_empty((t, n))
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    many = (counts > FEW).nonzero().flatten().tolist()
    if not many:
        failed = _functions().experts(
            y.data_ptr(), x.data_ptr(), codes.data_ptr(), maps.data_ptr(), local.data_ptr(), address(bias), ends.data_ptr(), len(ends),
            t, n, k, KINDS[x.dtype], bias_kind(bias), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for {t} tokens of {k} columns")
        return y
    y[int(ends[-1]) :] = 0
    first = 0
    for e, end in enumerate(ends.tolist()):
        if end > first:
            y[first:end] = _run(x[first:end], codes[e], maps[e], local[e], None if bias is None else bias[e], n)
        first = end
    return y


def _fake_experts(
    x: Tensor, codes: Tensor, maps: Tensor, local: Tensor, bias: Tensor | None, ends: Tensor, n: int
) -> Tensor:
    return x.new_empty((x.shape[0], n))


wint2 = operation("wint2(Tensor x, Tensor codes, Tensor maps, Tensor local, Tensor? bias, int n) -> Tensor", _run, _fake)
wint2_experts = operation(
    "wint2_experts(Tensor x, Tensor codes, Tensor maps, Tensor local, Tensor? bias, Tensor ends, int n) -> Tensor",
    _run_experts,
    _fake_experts,
)
