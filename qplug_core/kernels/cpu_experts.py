"""All experts of one projection in one call on x86 CPUs: the operations ``qplug::weight_only_experts`` and ``qplug::w8a8_experts``.

Tokens come sorted by expert, packed tensors as stacks with E in front; see ``experts.h``. Results are those of one call for each expert, bit for bit.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ..kernel import PackedWeight
from . import builder
from .cpu_w8a8 import _rule as code_rule
from .cpu_weight_only import UNITS
from .torch_c import KINDS, address, bias_kind, operation

STACKS = ("codes", "table", "scales", "zeros", "shifts", "row_scales", "segments", "order")
"""Packed tensors in the order of ``enum`` in ``weight_only_experts.h``; the bias comes after them."""


def weight_only_product(x: Tensor, packed: PackedWeight, ends: Tensor, bias: Tensor | None) -> Tensor:
    """``x [T, K]`` to ``[T, N]``: stacks that :func:`qplug_core.kernels.cpu_weight_only.pack` made; see :meth:`Kernel.apply_experts`."""
    t, meta = packed.tensors, packed.meta
    x = prepared(x, packed, ends)
    stacks = [t.get(name) for name in STACKS]
    y: Tensor = weight_only_experts(x, *stacks, bias, ends, packed.n, meta["type"], meta["bytes"])
    return y


def w8a8_product(x: Tensor, packed: PackedWeight, ends: Tensor, bias: Tensor | None) -> Tensor:
    """``x [T, K]`` to ``[T, N]``: stacks that :func:`qplug_core.kernels.cpu_w8a8.pack` made."""
    t, meta = packed.tensors, packed.meta
    x = prepared(x, packed, ends)
    y: Tensor = w8a8_experts(
        x, t["codes"], t["scales"], t["sums"], t.get("act_scale"), t.get("act_zero"), bias, ends, packed.n, meta["symmetric"], meta["half"]
    )  # fmt: skip
    return y


def prepared(x: Tensor, packed: PackedWeight, ends: Tensor) -> Tensor:
    """x after ``act_shift`` and ``pre_scale [E, K]`` of each row's expert, where the weights have them."""
    t = packed.tensors
    if "act_shift" not in t and "pre_scale" not in t:
        return x
    rows = torch.arange(x.shape[0], device=x.device)
    expert = torch.searchsorted(ends, rows, right=True).clamp_(max=len(ends) - 1)
    if "act_shift" in t:
        x = x - t["act_shift"][expert].to(x.dtype)
    if "pre_scale" in t:
        x = x * t["pre_scale"][expert].to(x.dtype)
    return x


@functools.cache
def _weight_only() -> ctypes._NamedFuncPointer:
    function = builder.library("weight_only").qplug_weight_only_experts
    function.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_long] * 8 + [ctypes.c_int] * 6
    return function


@functools.cache
def _w8a8() -> ctypes._NamedFuncPointer:
    function = builder.library("int8").qplug_w8a8_experts
    pointer, integer, long, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
    function.argtypes = [pointer] * 9 + [long] * 4 + [integer] * 3 + [real] * 2 + [integer]
    return function


def _run_weight_only(
    x: Tensor,
    codes: Tensor,
    table: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    shifts: Tensor | None,
    row_scales: Tensor | None,
    segments: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    ends: Tensor,
    n: int,
    type: int,
    scale_bytes: int,
) -> Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    stacks = (codes, table, scales, zeros, shifts, row_scales, segments, order, bias)
    pointers = (ctypes.c_void_p * len(stacks))(*(address(s) for s in stacks))
    strides = (ctypes.c_long * len(stacks))(*(0 if s is None else s.nbytes // len(s) for s in stacks))
    y = x.new_empty((x.shape[0], n))
    kp = codes.shape[2] * (1 if codes.ndim == 4 else UNITS[type])
    failed = _weight_only()(
        y.data_ptr(), x.data_ptr(), pointers, strides, None, ends.data_ptr(), len(ends), *x.shape[:1], n, x.shape[1], kp, scales.shape[2],
        segments.shape[1], 0, type, KINDS[x.dtype], KINDS[y.dtype], scale_bytes or KINDS[scales.dtype], bias_kind(bias),
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for {x.shape[0]} tokens of {kp} columns")
    return y


def _fake_weight_only(
    x: Tensor,
    codes: Tensor,
    table: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    shifts: Tensor | None,
    row_scales: Tensor | None,
    segments: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    ends: Tensor,
    n: int,
    type: int,
    scale_bytes: int,
) -> Tensor:
    return x.new_empty((x.shape[0], n))


def _run_w8a8(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    sums: Tensor,
    act_scale: Tensor | None,
    act_zero: Tensor | None,
    bias: Tensor | None,
    ends: Tensor,
    n: int,
    symmetric: bool,
    half: bool,
) -> Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    y = x.new_empty((x.shape[0], n))
    divisor, low = code_rule(act_scale is None, symmetric, half)
    failed = _w8a8()(
        y.data_ptr(), x.data_ptr(), address(act_scale), address(act_zero), codes.data_ptr(), scales.data_ptr(), sums.data_ptr(),
        address(bias), ends.data_ptr(), len(ends), x.shape[0], n, x.shape[1], KINDS[x.dtype], bias_kind(bias), symmetric, divisor, low,
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for {x.shape[0]} tokens of {x.shape[1]} columns in 16 bits")
    return y


def _fake_w8a8(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    sums: Tensor,
    act_scale: Tensor | None,
    act_zero: Tensor | None,
    bias: Tensor | None,
    ends: Tensor,
    n: int,
    symmetric: bool,
    half: bool,
) -> Tensor:
    return x.new_empty((x.shape[0], n))


weight_only_experts = operation(
    "weight_only_experts(Tensor x, Tensor codes, Tensor? table, Tensor scales, Tensor? zeros, Tensor? shifts, Tensor? row_scales,"
    " Tensor segments, Tensor? order, Tensor? bias, Tensor ends, int n, int type, int scale_bytes) -> Tensor",
    _run_weight_only,
    _fake_weight_only,
)
w8a8_experts = operation(
    "w8a8_experts(Tensor x, Tensor codes, Tensor scales, Tensor sums, Tensor? act_scale, Tensor? act_zero, Tensor? bias, Tensor ends,"
    " int n, bool symmetric, bool half) -> Tensor",
    _run_w8a8,
    _fake_w8a8,
)
