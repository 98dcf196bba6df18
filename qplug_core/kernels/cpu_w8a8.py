"""Int8 weights times int8 activations on x86 CPUs: packing, and the operations of namespace ``qplug``.

``int8_quantize`` makes codes of activations, ``int8_product`` multiplies codes, ``w8a8`` does both in one call. The layout is described
in ``int8.c``. The product is exact in int32; scales are float32.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..device import Device
from ..kernel import Kernel, PackedWeight, Problem
from ..scheme import TensorQuant
from ..support import Refusal
from ..weight import OpaqueWeight, QuantWeight
from . import builder
from .torch_c import KINDS, address, bias_kind, operation

TILE = 16
LARGEST_K = 65536
"""Columns up to which the sum of products of 8-bit codes, with a zero point, fits int32."""


class CpuInt8(Kernel):
    """W8A8: weights by channel or tensor, symmetric; activations by token (dynamic) or tensor (static), with zero points or without."""

    grouped = True

    def supports(self, problem: Problem, device: Device) -> list[Refusal]:
        """Refuses whatever else, columns beyond :data:`LARGEST_K`, and machines without AVX2 or compiler."""
        refusals = builder.refusals("int8", device)
        weight, act, scheme = problem.scheme.weight, problem.scheme.act, problem.scheme
        if problem.op not in ("linear", "experts", "lm_head"):
            refusals.append(Refusal("op", f"operation {problem.op}", "linear, experts or lm_head"))
        if weight is None or problem.encoding or weight.dtype != "int8" or weight.scale_dtype != "float":
            refusals.append(Refusal("scheme", f"scheme {scheme}", "int8 weights with float scales"))
        else:
            if weight.block[1] and weight.block[1] < problem.k:
                refusals.append(
                    Refusal(
                        "group", f"weight scales by {weight.granularity} {weight.block}", "one scale for each row, or fewer"
                    )
                )
            if not weight.symmetric:
                refusals.append(Refusal("zeros", "weights with zero points", "symmetric weights"))
        if act is None or act.dtype != "int8":
            refusals.append(Refusal("scheme", f"activations of {act.dtype if act else '16 bit'}", "int8 activations"))
        else:
            if act.block != ((1, 0) if act.dynamic else (0, 0)):
                refusals.append(
                    Refusal("scheme", f"activation scales by {act.block}", "dynamic scales by token, or one static scale")
                )
            if act.dynamic == "local" or act.scale_dtype != "float" or act.outlier:
                refusals.append(
                    Refusal("scheme", f"activations of scheme {scheme}", "plain float32 scales, without outliers")
                )
            if act.rule not in ("", "127", "127.5"):
                refusals.append(Refusal("rule", f"activation rule {act.rule}", "127 or 127.5"))
        if scheme.act_order or scheme.sparsity:
            refusals.append(
                Refusal("act_order" if scheme.act_order else "scheme", f"scheme {scheme}", "dense columns in order")
            )
        if problem.shift:
            refusals.append(Refusal("zeros", "a shift in units of the weight", "weights without one"))
        if problem.k > LARGEST_K:
            refusals.append(Refusal("shape", f"K = {problem.k}", f"at most {LARGEST_K} columns, so that sums fit int32"))
        if problem.dtype not in ("float32", "bfloat16", "float16"):
            refusals.append(Refusal("dtype", f"activations {problem.dtype}", "float32, bfloat16 or float16"))
        return refusals

    def pack(self, weight: QuantWeight | OpaqueWeight, out: PackedWeight | None = None) -> PackedWeight:
        """See :func:`pack`."""
        assert isinstance(weight, QuantWeight)
        packed = pack(weight, self.name)
        return packed if out is None else out.refill(packed)

    def apply(self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """``x [*, K]`` float32, bfloat16 or float16 to ``[*, N]``; ``bias [N]`` of any of these."""
        t = packed.tensors
        if "act_shift" in t:
            x = x - t["act_shift"].to(x.dtype)
        if "pre_scale" in t:
            x = x * t["pre_scale"].to(x.dtype)
        meta = packed.meta
        y: Tensor = w8a8(
            x,
            t["codes"],
            t["scales"],
            t["sums"],
            t.get("act_scale"),
            t.get("act_zero"),
            bias,
            packed.n,
            meta["symmetric"],
            meta["half"],
        )
        return y

    def apply_experts(self, x: Tensor, packed: PackedWeight, ends: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :meth:`qplug_core.kernel.Kernel.apply_experts`."""
        from .cpu_experts import w8a8_product

        return w8a8_product(x, packed, ends, bias)


def is_half(act: TensorQuant) -> bool:
    """Whether scales are amax / 127.5 with codes down to -128; otherwise amax / 127 down to -127."""
    return act.rule == "127.5"


def pack(weight: QuantWeight, name: str) -> PackedWeight:
    """A plain symmetric weight ``[N, K]`` in the layout of ``int8.c``.

    ``codes`` int8 ``[N/16, KP/depth, 16, depth]``; ``scales`` float32 and ``sums`` int32 ``[16 * ceil(N/16)]``; ``act_scale``
    float32 ``[1]`` and ``act_zero`` int32 ``[1]`` where activations are static.
    """
    act = weight.scheme.act
    assert act is not None
    depth = builder.library("int8").qplug_int8_depth()
    n, k = weight.n, weight.k
    codes = torch.nn.functional.pad(weight.codes, (0, -k % depth, 0, -n % TILE))
    rows, columns = codes.shape
    scales = weight.regroup(1, weight.block[1]).scale_values()
    tensors = {
        "codes": codes.view(rows // TILE, TILE, columns // depth, depth).transpose(1, 2).contiguous(),
        "scales": torch.nn.functional.pad(scales.reshape(n), (0, rows - n)),
        "sums": codes.sum(1, dtype=torch.int32),
    }
    if not act.dynamic:
        assert weight.act_scale is not None
        tensors["act_scale"] = weight.act_scale.float().reshape(1)
        if weight.act_zero is not None:
            tensors["act_zero"] = weight.act_zero.to(torch.int32).reshape(1)
    for field in ("pre_scale", "act_shift"):
        if (value := getattr(weight, field)) is not None:
            tensors[field] = value
    tensors = {name: t.clone() if t.data_ptr() in _pointers(weight) else t for name, t in tensors.items()}
    return PackedWeight(name, n, k, tensors, {"symmetric": act.symmetric, "half": is_half(act)})


def _pointers(weight: QuantWeight) -> set[int]:
    """Addresses of the weight's own tensors, which a packed weight must not share: it is refilled in place."""
    return {t.data_ptr() for t in weight.tensors().values()}


class _Functions(NamedTuple):
    quantize: ctypes._NamedFuncPointer
    product: ctypes._NamedFuncPointer
    w8a8: ctypes._NamedFuncPointer


@functools.cache
def _functions() -> _Functions:
    library = builder.library("int8")
    found = _Functions(library.qplug_int8_quantize, library.qplug_int8_product, library.qplug_w8a8)
    pointer, integer, long, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
    found.quantize.argtypes = [pointer] * 6 + [long] * 2 + [integer] * 2 + [real] * 2 + [integer]
    found.quantize.restype = None
    found.product.argtypes = [pointer] * 8 + [long] * 3 + [integer] * 3
    found.w8a8.argtypes = [pointer] * 8 + [long] * 3 + [integer] * 3 + [real] * 2 + [integer]
    return found


def _rule(dynamic: bool, symmetric: bool, half: bool) -> tuple[float, float]:
    """Divisor of amax, and the lowest code."""
    return 127.5 if half else 127.0, -127.0 if dynamic and symmetric and not half else -128.0


def _quantize(
    x: Tensor, scale: Tensor | None, zero: Tensor | None, symmetric: bool, half: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    codes, scales, zeros = _quantize_fake(x, scale, zero, symmetric, half)
    _functions().quantize(
        codes.data_ptr(), scales.data_ptr(), zeros.data_ptr(), x.data_ptr(), address(scale), address(zero), *codes.shape,
        KINDS[x.dtype], symmetric, *_rule(scale is None, symmetric, half), torch.get_num_threads(),
    )  # fmt: skip
    return codes, scales, zeros


def _quantize_fake(
    x: Tensor, scale: Tensor | None, zero: Tensor | None, symmetric: bool, half: bool
) -> tuple[Tensor, Tensor, Tensor]:
    k = x.shape[-1]
    m = x.numel() // k
    return x.new_empty((m, k), dtype=torch.int8), x.new_empty(m, dtype=torch.float32), x.new_empty(m, dtype=torch.int32)


def _product(
    q: Tensor,
    q_scales: Tensor,
    q_zeros: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    n: int,
    dtype: torch.dtype,
) -> Tensor:
    q, bias = q.contiguous(), None if bias is None else bias.contiguous()
    m, k = q.shape
    y = q.new_empty((m, n), dtype=dtype)
    failed = _functions().product(
        y.data_ptr(), q.data_ptr(), q_scales.data_ptr(), address(q_zeros), codes.data_ptr(), scales.data_ptr(), sums.data_ptr(),
        address(bias), m, n, k, KINDS[dtype], bias_kind(bias), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for {m} tokens of {k} columns in 16 bits")
    return y


def _product_fake(
    q: Tensor,
    q_scales: Tensor,
    q_zeros: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    n: int,
    dtype: torch.dtype,
) -> Tensor:
    return q.new_empty((q.shape[0], n), dtype=dtype)


def _w8a8(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    sums: Tensor,
    act_scale: Tensor | None,
    act_zero: Tensor | None,
    bias: Tensor | None,
    n: int,
    symmetric: bool,
    half: bool,
) -> Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    k = x.shape[-1]
    m = x.numel() // k
    y = x.new_empty((*x.shape[:-1], n))
    divisor, low = _rule(act_scale is None, symmetric, half)
    failed = _functions().w8a8(
        y.data_ptr(), x.data_ptr(), address(act_scale), address(act_zero), codes.data_ptr(), scales.data_ptr(), sums.data_ptr(),
        address(bias), m, n, k, KINDS[x.dtype], bias_kind(bias), symmetric, divisor, low, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for {m} tokens of {k} columns in 16 bits")
    return y


def _w8a8_fake(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    sums: Tensor,
    act_scale: Tensor | None,
    act_zero: Tensor | None,
    bias: Tensor | None,
    n: int,
    symmetric: bool,
    half: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


_PACKED = "Tensor codes, Tensor scales, Tensor sums"
int8_quantize = operation(
    "int8_quantize(Tensor x, Tensor? scale, Tensor? zero, bool symmetric, bool half) -> (Tensor, Tensor, Tensor)",
    _quantize,
    _quantize_fake,
)
int8_product = operation(
    f"int8_product(Tensor q, Tensor q_scales, Tensor? q_zeros, {_PACKED}, Tensor? bias, int n, ScalarType dtype) -> Tensor",
    _product,
    _product_fake,
)
w8a8 = operation(
    f"w8a8(Tensor x, {_PACKED}, Tensor? act_scale, Tensor? act_zero, Tensor? bias, int n, bool symmetric, bool half) -> Tensor",
    _w8a8,
    _w8a8_fake,
)
