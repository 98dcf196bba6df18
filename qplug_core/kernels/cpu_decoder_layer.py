"""One token through one decoder layer in one call on x86 CPUs: norms, products, rotation, attention over a cache, SiLU and sums."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..device import Device
from ..kernel import Kernel, PackedWeight
from . import builder
from .cpu_weight_only import UNITS, CpuWeightOnly
from .torch_c import KINDS, address, bias_kind

LINEARS, NORMS = 7, 4
_ARRAYS = ("codes", "table", "scales", "zeros", "shifts", "row_scales", "segments", "order", "bias")


class Weight(ctypes.Structure):
    """``Weight`` of ``weight_only_linear.h``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _ARRAYS),
        *((name, ctypes.c_long) for name in ("n", "k", "kp", "groups", "count")),
        *((name, ctypes.c_int) for name in ("type", "scale_kind", "bias_kind")),
    ]


class _Layer(ctypes.Structure):
    """``Layer`` of ``decoder_layer.c``."""

    _fields_ = [
        ("multiply", ctypes.c_void_p),
        ("weights", ctypes.POINTER(Weight) * LINEARS),
        ("norms", ctypes.c_void_p * NORMS),
        ("eps", ctypes.c_float * NORMS),
        ("scaling", ctypes.c_float),
        ("kind", ctypes.c_int),
        *((name, ctypes.c_long) for name in ("wide", "inner", "heads", "kv_heads", "depth")),
    ]


class Norm(NamedTuple):
    """A weight and what is added to the mean of squares."""

    weight: Tensor
    eps: float


class Linear(NamedTuple):
    """A packed weight, its kernel, and a bias ``[N]`` or None."""

    kernel: Kernel
    packed: PackedWeight
    bias: Tensor | None


def taken(linear: Linear) -> bool:
    """Whether C can call this product: a weight-only one without a step in torch before it."""
    own = type(linear.kernel).apply is CpuWeightOnly.apply
    return own and not {"act_shift", "pre_scale"} & linear.packed.tensors.keys() and linear.packed.tensors["codes"].is_cpu


def missing() -> bool:
    """Whether this machine has no such kernel."""
    return bool(builder.refusals("decoder_layer", Device.cpu()) or builder.refusals("weight_only", Device.cpu()))


class DecoderLayer:
    """A layer's weights, whose addresses must stay, and the call.

    linears
        Queries, keys, values, output; gate, up, down. All :func:`taken`.
    norms
        Before attention ``[K]``, before the MLP ``[K]``, of queries and of keys ``[D]`` or None; of ``dtype``.
    depth
        Channels of a head. K, D and the width of the MLP are multiples of 16.
    scaling
        What multiplies scores.
    """

    def __init__(
        self, linears: Sequence[Linear], norms: Sequence[Norm | None], depth: int, scaling: float, dtype: torch.dtype
    ) -> None:
        self.weights = [_weight(linear) for linear in linears]
        multiply = ctypes.cast(builder.library("weight_only").qplug_weight_only_linears, ctypes.c_void_p).value
        wide, inner = linears[0].packed.k, linears[6].packed.k
        heads, kv_heads = linears[0].packed.n // depth, linears[1].packed.n // depth
        self.layer = _Layer(
            multiply,
            (ctypes.POINTER(Weight) * LINEARS)(*map(ctypes.pointer, self.weights)),
            (ctypes.c_void_p * NORMS)(*(None if norm is None else norm.weight.data_ptr() for norm in norms)),
            (ctypes.c_float * NORMS)(*(0.0 if norm is None else norm.eps for norm in norms)),
            scaling, KINDS[dtype], wide, inner, heads, kv_heads, depth,
        )  # fmt: skip
        self.held: Any = (linears, norms)
        self.at = ctypes.addressof(self.layer)
        self.call = _function()

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The layer's output like ``x [1, 1, K]``, contiguous.

        cos, sin
            ``[1, 1, R]``, contiguous, R a multiple of 32 and at most D: the first R channels of a head are turned, half by half.
        keys, values
            ``[1, HKV, T, D]``, alike in strides, channels next to each other: the last token is written here, and all are attended.
        """
        y = torch.empty_like(x)
        size, (_, head, row, _) = x.element_size(), keys.stride()
        failed = self.call(
            self.at, y.data_ptr(), x.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[-1], keys.data_ptr(), values.data_ptr(),
            head * size, row * size, keys.shape[2], torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for one token of {x.shape[-1]} columns")
        return y


def _weight(linear: Linear) -> Weight:
    t, packed = linear.packed.tensors, linear.packed
    codes, scales, kind = t["codes"], t["scales"], packed.meta["type"]
    return Weight(
        codes.data_ptr(), address(t.get("table")), scales.data_ptr(), address(t.get("zeros")), address(t.get("shifts")),
        address(t.get("row_scales")), t["segments"].data_ptr(), address(t.get("order")), address(linear.bias), packed.n, packed.k,
        codes.shape[1] * (1 if codes.ndim == 3 else UNITS[kind]), scales.shape[1], t["segments"].shape[0], kind,
        packed.meta["bytes"] or KINDS[scales.dtype], bias_kind(linear.bias),
    )  # fmt: skip


@functools.cache
def _function() -> ctypes._NamedFuncPointer:
    function = builder.library("decoder_layer").qplug_decoder_layer
    function.argtypes = (
        [ctypes.c_void_p] * 5 + [ctypes.c_long] + [ctypes.c_void_p] * 2 + [ctypes.c_long] * 3 + [ctypes.c_int]
    )
    return function
