"""Integer weights of 2, 3, 4 or 8 bits times float activations on x86 CPUs: packing, and the operation ``qplug::weight_only``.

The layout is described in ``weight_only.c``. A group is padded to whole units of columns (16, 32, 8, 4 for 2, 3, 4, 8 bits),
so three bits in groups of 16 take as much room as six.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..device import Device
from ..kernel import Kernel, PackedWeight, Problem
from ..support import Refusal
from ..weight import OpaqueWeight, QuantWeight
from . import builder
from .torch_c import KINDS, address, bias_kind, operation

TILE = 16
SEGMENT = 128
UNITS = {2: 16, 3: 32, 4: 8, 8: 4}
"""Columns of one unit, by bits."""


class CpuWeightOnly(Kernel):
    """A weight-only kernel for schemes of the widths in ``bits``. Subclasses say which, and their name.

    Ragged shapes, groups of any length (also unequal ones, which a cut through an act-order weight leaves), zero points of any
    value, float zero points, ``pre_scale`` and ``act_shift`` are taken.
    """

    bits: tuple[int, ...]

    def supports(self, problem: Problem, device: Device) -> list[Refusal]:
        """Refuses other operations and widths, quantized activations, sparsity, shifted weights, and machines without AVX2 or compiler."""
        refusals = builder.refusals("weight_only", device)
        if problem.op not in ("linear", "experts", "lm_head"):
            refusals.append(Refusal("op", f"operation {problem.op}", "linear, experts or lm_head"))
        weight, scheme = problem.scheme.weight, problem.scheme
        widths = " or ".join(str(b) for b in self.bits)
        if weight is None or problem.encoding or not weight.dtype.startswith("int") or weight.bits not in self.bits:
            refusals.append(Refusal("scheme", f"scheme {scheme}", f"integer weights of {widths} bits"))
        elif weight.scale_dtype != "float":
            refusals.append(Refusal("scheme", f"scales of {weight.scale_dtype}", "float scales"))
        if scheme.act is not None:
            refusals.append(Refusal("scheme", f"activations of {scheme.act.dtype}", "16-bit or float32 activations"))
        if scheme.sparsity:
            refusals.append(Refusal("scheme", f"{scheme.sparsity} sparsity", "dense weights"))
        if problem.shift:
            refusals.append(Refusal("zeros", "a shift in units of the weight", "zero points in units of codes"))
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
        bits = packed.meta["bits"]
        y: Tensor = weight_only(
            x, t["codes"], t["scales"], t.get("zeros"), t["segments"], t.get("order"), bias, packed.n, bits
        )
        return y


class _Columns(NamedTuple):
    """``order`` [KP] as in the layout; ``segments`` [S, 3]; ``identity``: whether the order changes nothing."""

    order: Tensor
    segments: Tensor
    identity: bool


def pack(weight: QuantWeight, name: str) -> PackedWeight:
    """A plain weight ``[N, K]`` in the layout of ``weight_only.c``, with ``pre_scale`` and ``act_shift`` beside it where it has them."""
    assert weight.scheme.weight is not None
    bits = weight.scheme.weight.bits
    weight = weight.regroup(1, weight.block[1])
    columns = _columns(weight, UNITS[bits])
    rows = -weight.n % TILE
    low = 0 if weight.codes.dtype == torch.uint8 else 1 << (bits - 1)
    # In uint8 this wraps round, from two's complement to unsigned.
    source = weight.codes.view(torch.uint8) + low
    codes = torch.zeros(weight.n + rows, len(columns.order), dtype=torch.uint8)
    kept = columns.order >= 0
    codes[: weight.n, kept] = source[:, columns.order[kept].long()]
    kind = weight.scales.dtype
    exact = kind in KINDS and weight.global_scale is None
    if weight.zeros is not None and weight.zeros.is_floating_point():
        exact = exact and weight.zeros.dtype == kind
    if not exact:
        kind = torch.float32
    tensors = {
        "codes": _pack_codes(codes, bits),
        "scales": _tiles(weight.scale_values(), rows).to(kind),
        "segments": columns.segments,
    }
    if weight.zeros is not None:
        # Codes and zero points are moved together where the codes were signed.
        tensors["zeros"] = _tiles(weight.zeros.float() + low, rows).to(kind)
    if not columns.identity:
        tensors["order"] = columns.order
    for field in ("pre_scale", "act_shift"):
        if (value := getattr(weight, field)) is not None:
            tensors[field] = value.clone()
    return PackedWeight(name, weight.n, weight.k, tensors, {"bits": bits})


def _columns(weight: QuantWeight, unit: int) -> _Columns:
    """Columns sorted by group, each group padded to whole units, and the segments that sums are taken over."""
    k, groups = weight.k, weight.scales.shape[-1]
    by_position = torch.arange(k) // (weight.block[1] or max(k, 1))
    index = by_position if weight.group_index is None else weight.group_index.long()
    order: list[Tensor] = []
    segments: list[list[int]] = []
    start = 0
    by_group = torch.argsort(index, stable=True).to(torch.int32).split(torch.bincount(index, minlength=groups).tolist())
    for group, members in enumerate(by_group):
        end = start + -(-len(members) // unit)
        order += [members, torch.full((end * unit - start * unit - len(members),), -1, dtype=torch.int32)]
        step = SEGMENT // unit
        segments += [[first, min(first + step, end), group] for first in range(start, end, step)]
        start = end
    joined = torch.cat(order) if order else torch.empty(0, dtype=torch.int32)
    identity = torch.equal(joined, torch.arange(k, dtype=torch.int32))
    return _Columns(joined, torch.tensor(segments, dtype=torch.int32).reshape(-1, 3), identity)


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes ``[N, KP]`` uint8, N and KP whole, as int32 ``[N/16, KP/unit, words, 16]``; 8 bits as int8 ``[N/16, KP, 16]``."""
    n, kp = codes.shape
    unit = UNITS[bits]
    if bits == 8:
        return (codes ^ 128).view(torch.int8).view(n // TILE, TILE, kp).transpose(1, 2).contiguous()
    units = codes.view(n // TILE, TILE, kp // unit, unit).permute(0, 2, 3, 1)
    if bits == 3:
        words = [_word(units[:, :, 10 * i : 10 * i + 10], 3) for i in range(3)]
        low = [units[:, :, 30].int(), units[:, :, 31].int()]
        words[0] |= (low[0] & 3) << 30
        words[1] |= (low[1] & 3) << 30
        words[2] |= (low[0] >> 2) << 30 | (low[1] >> 2) << 31
        return torch.stack(words, dim=2)
    return _word(units, bits)[:, :, None].contiguous()


def _word(fields: Tensor, bits: int) -> Tensor:
    """Fields ``[tiles, units, count, 16]`` as int32 words ``[tiles, units, 16]``, the first in the lowest bits."""
    word = torch.zeros_like(fields[:, :, 0], dtype=torch.int32)
    for i in range(fields.shape[2]):
        word |= fields[:, :, i].int() << (bits * i)
    return word


def _tiles(grid: Tensor, rows: int) -> Tensor:
    """``[N, G]`` as ``[N/16, G, 16]``, with ``rows`` of zeros added."""
    padded = torch.nn.functional.pad(grid, (0, 0, 0, rows))
    return padded.view(-1, TILE, grid.shape[1]).transpose(1, 2).contiguous()


@functools.cache
def _function() -> ctypes._NamedFuncPointer:
    function = builder.library("weight_only").qplug_weight_only
    function.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_long] * 6 + [ctypes.c_int] * 5
    return function


def _run(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    segments: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    n: int,
    bits: int,
) -> Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    k = x.shape[-1]
    m = x.numel() // k
    y = x.new_empty((*x.shape[:-1], n))
    kp = codes.shape[1] * (1 if bits == 8 else UNITS[bits])
    failed = _function()(
        y.data_ptr(), x.data_ptr(), codes.data_ptr(), scales.data_ptr(), address(zeros), segments.data_ptr(), address(order),
        address(bias), m, n, k, kp, scales.shape[1], segments.shape[0], bits, KINDS[x.dtype], KINDS[scales.dtype],
        bias_kind(bias), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for {m} tokens of {kp} columns in float32")
    return y


def _fake(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    segments: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    n: int,
    bits: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


weight_only = operation(
    "weight_only(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor segments, Tensor? order, Tensor? bias, int n, int bits)"
    " -> Tensor",
    _run,
    _fake,
)
