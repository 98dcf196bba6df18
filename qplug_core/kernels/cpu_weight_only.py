"""Quantized weights times float activations on x86 CPUs: packing, and the operation ``qplug::weight_only``.

Integers of 2 to 8 bits, every 4-bit codebook (NF4, FP4), and 8-bit floats; the layout is described in ``weight_only.c``. A group is padded to
whole units of columns (16, 32, 8, 4 for 2, 3, 4, 8 bits), so three bits in groups of 16 take as much room as six. Integers of 5, 6 and 7
bits take a byte each. Scales stay in their stored dtype, E8M0 and e4m3 as bytes; a global scale multiplies sums.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..device import Device
from ..kernel import Kernel, PackedWeight, Problem
from ..support import Refusal
from ..weight import OpaqueWeight, QuantWeight
from . import builder, cpu_packing
from .torch_c import KINDS, address, bias_kind, operation, plain

TILE = 16
SEGMENT = 128
INT2, INT3, INT4, INT8, LUT4, E4M3, E5M2 = range(7)
"""``enum type`` of ``codes.h``."""
SCALES_E4M3, SCALES_E8M0 = 3, 4
"""``enum kind`` of ``vec.h``, of scales that are bytes."""
UNITS = {INT2: 16, INT3: 32, INT4: 8, INT8: 4, LUT4: 8, E4M3: 4, E5M2: 4}
"""Columns of one unit, by type."""
TYPES = {
    "int2": INT2, "int3": INT3, "int4": INT4, "int5": INT8, "int6": INT8, "int7": INT8, "int8": INT8,
    "nf4": LUT4, "fp4_e2m1": LUT4, "fp4_bnb": LUT4, "iq4nl": LUT4, "fp8_e4m3": E4M3, "fp8_e5m2": E5M2,
}  # fmt: skip
"""Types by the number type of the scheme."""


class CpuWeightOnly(Kernel):
    """A weight-only kernel for the number types in ``numbers``, or integers of the widths in ``bits``. Subclasses say which, and their name.

    Ragged shapes, groups of any length (also unequal ones, which a cut through an act-order weight leaves), blocks, zero points of any
    value, float zero points, shifts of integers, E8M0 and two-level scales, ``pre_scale`` and ``act_shift`` are taken.
    """

    grouped = True
    bits: tuple[int, ...] = ()
    numbers: tuple[str, ...] = ()

    def supports(self, problem: Problem, device: Device) -> list[Refusal]:
        """Refuses other operations and types, quantized activations, sparsity, shifted floats, and machines without AVX2 or compiler."""
        refusals = self.common_refusals(problem, device)
        if problem.scheme.act is not None:
            refusals.append(Refusal("scheme", f"activations of {problem.scheme.act.dtype}", "16-bit or float32 activations"))
        return refusals

    def common_refusals(self, problem: Problem, device: Device) -> list[Refusal]:
        """What is refused whatever the activations are."""
        refusals = builder.refusals("weight_only", device)
        if problem.op not in ("linear", "experts", "lm_head"):
            refusals.append(Refusal("op", f"operation {problem.op}", "linear, experts or lm_head"))
        weight, scheme = problem.scheme.weight, problem.scheme
        taken = (*(f"int{b}" for b in self.bits), *self.numbers)
        if weight is None or problem.encoding or weight.dtype not in taken:
            refusals.append(Refusal("scheme", f"scheme {scheme}", f"weights of {' or '.join(taken)}"))
        if scheme.sparsity:
            refusals.append(Refusal("scheme", f"{scheme.sparsity} sparsity", "dense weights"))
        if problem.shift and (weight is None or not weight.dtype.startswith("int")):
            refusals.append(
                Refusal("zeros", f"a shift of {weight.dtype if weight else 'no'} weights", "a shift of integers")
            )
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
        return multiply(prepared(x, packed), packed, None, bias, None)

    def apply_experts(self, x: Tensor, packed: PackedWeight, ends: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :meth:`qplug_core.kernel.Kernel.apply_experts`."""
        from .cpu_experts import weight_only_product

        return weight_only_product(x, packed, ends, bias)


def prepared(x: Tensor, packed: PackedWeight) -> Tensor:
    """x after ``act_shift`` and ``pre_scale``, where the weight has them."""
    t = packed.tensors
    if "act_shift" in t:
        x = x - t["act_shift"].to(x.dtype)
    if "pre_scale" in t:
        x = x * t["pre_scale"].to(x.dtype)
    return x


def multiply(
    x: Tensor, packed: PackedWeight, x_scales: Tensor | None, bias: Tensor | None, dtype: torch.dtype | None
) -> Tensor:
    """The operation on a packed weight. ``x_scales`` float32 ``[M, GX]`` where x holds codes; ``dtype`` of the result, None as x."""
    t = packed.tensors
    call = _run if plain(x) else weight_only
    y: Tensor = call(
        x, t["codes"], t.get("table"), t["scales"], t.get("zeros"), t.get("shifts"), t.get("row_scales"), t["segments"], t.get("order"), x_scales,
        bias, packed.n, packed.meta["type"], packed.meta["bytes"], dtype,
    )  # fmt: skip
    return y


class _Columns(NamedTuple):
    """``order`` [KP] as in the layout; ``segments`` [S, 4]; ``identity``: whether the order changes nothing."""

    order: Tensor
    segments: Tensor
    identity: bool


def pack(weight: QuantWeight, name: str, x_block: int = 0) -> PackedWeight:
    """A plain weight ``[N, K]`` in the layout of ``weight_only.c``, with ``pre_scale`` and ``act_shift`` beside it where it has them.

    ``x_block``: columns of x that share a scale, where products are given ``x_scales`` by group.
    """
    assert weight.scheme.weight is not None
    kind = TYPES[weight.scheme.weight.dtype]
    weight = weight.regroup(1, weight.block[1])
    if weight.shift is not None and weight.global_scale is not None:
        weight = replace(weight, scales=weight.scale_values(), global_scale=None)
    columns = _columns(weight, UNITS[kind], x_block)
    rows = -weight.n % TILE
    # Signed codes become unsigned, which turns their highest bit over; zero points are moved with them. Whole bytes stay signed.
    low = 0 if kind >= LUT4 or weight.codes.dtype == torch.uint8 else {INT2: 2, INT3: 4, INT4: 8, INT8: 128}[kind]
    codes, missing = _pack_codes(weight, kind, columns, low ^ 128 if kind == INT8 else low)
    row_scales = _row_scales(weight)
    if kind >= E4M3:
        # NaN times anything is NaN, so a NaN among the codes of a row is one NaN as its scale.
        row_scales = (torch.ones(weight.n) if row_scales is None else row_scales).masked_fill(missing, float("nan"))
    scales, row_scales, scale_bytes = _scales(weight, row_scales)
    tensors = {"codes": codes, "scales": _tiles(scales, rows), "segments": columns.segments}
    if weight.shift is not None:
        middle = {INT2: 2, INT3: 4, INT4: 8, INT8: 128}[kind]
        points = low - middle + (0 if weight.zeros is None else weight.zeros.float())
        tensors["shifts"] = _tiles(weight.shift.float() + points * weight.scale_values(), rows)
    elif weight.zeros is not None:
        tensors["zeros"] = _tiles((weight.zeros.float() + low).to(scales.dtype), rows)
    if kind == LUT4:
        assert weight.codebook is not None
        tensors["table"] = torch.nn.functional.pad(weight.codebook.float(), (0, 16 - len(weight.codebook)))
    if row_scales is not None:
        tensors["row_scales"] = torch.nn.functional.pad(row_scales, (0, rows))
    if not columns.identity:
        tensors["order"] = columns.order
    for field in ("pre_scale", "act_shift"):
        if (value := getattr(weight, field)) is not None:
            tensors[field] = value.clone()
    return PackedWeight(name, weight.n, weight.k, tensors, {"type": kind, "bytes": scale_bytes})


def _row_scales(weight: QuantWeight) -> Tensor | None:
    """The global scale as float32 ``[N]``."""
    if weight.global_scale is None:
        return None
    factor = weight.global_scale.float().reshape(-1).expand(weight.n)
    return factor.reciprocal() if weight.global_div else factor.clone()


def _scales(weight: QuantWeight, row_scales: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
    """Scales ``[N, G]`` as the C code reads them, the row scales, which hold the NaN of scales that are bytes, and what bytes are (0: none)."""
    assert weight.scheme.weight is not None
    scales = weight.scales
    if scales.dtype == torch.uint8 and weight.scheme.weight.scale_dtype == "e8m0":
        missing, stored, kind = scales == 255, scales, SCALES_E8M0
    elif scales.dtype == torch.float8_e4m3fn:
        missing, stored, kind = scales.float().isnan(), scales.view(torch.uint8), SCALES_E4M3
    else:
        floating = weight.zeros is not None and weight.zeros.is_floating_point()
        exact = scales.dtype in KINDS and (not floating or weight.zeros is None or weight.zeros.dtype == scales.dtype)
        return (scales if exact else scales.float()), row_scales, 0
    row_scales = (torch.ones(weight.n) if row_scales is None else row_scales).masked_fill(missing.any(1), float("nan"))
    return stored.masked_fill(missing, 0), row_scales, kind


def _columns(weight: QuantWeight, unit: int, x_block: int) -> _Columns:
    """Columns sorted by group, each group padded to whole units, and the segments that sums are taken over."""
    k = weight.k
    positions = torch.arange(k)
    index = positions // (weight.block[1] or max(k, 1)) if weight.group_index is None else weight.group_index.long()
    x_groups = -(-k // x_block) if x_block else 1
    both = index * x_groups + (positions // x_block if x_block else 0)
    order: list[Tensor] = []
    segments: list[list[int]] = []
    start = 0
    by_group = torch.argsort(both, stable=True).to(torch.int32).split(torch.bincount(both).tolist())
    for group, members in enumerate(by_group):
        end = start + -(-len(members) // unit)
        order.append(members)
        if short := end * unit - start * unit - len(members):
            order.append(torch.full((short,), -1, dtype=torch.int32))
        step = SEGMENT // unit
        segments += [[first, min(first + step, end), *divmod(group, x_groups)] for first in range(start, end, step)]
        start = end
    joined = torch.cat(order) if order else torch.empty(0, dtype=torch.int32)
    identity = torch.equal(joined, positions.to(torch.int32))
    return _Columns(joined, torch.tensor(segments, dtype=torch.int32).reshape(-1, 4), identity)


def _pack_codes(weight: QuantWeight, kind: int, columns: _Columns, flip: int) -> tuple[Tensor, Tensor]:
    """Codes as int32 ``[N/16, KP/unit, words, 16]``, 8 bits as bytes ``[N/16, KP, 16]``, and the rows with a NaN; ``flip``: bits turned over."""
    unit, tiles, kp = UNITS[kind], -(-weight.n // TILE), len(columns.order)
    shape = (tiles, kp, TILE) if unit == 4 else (tiles, kp // unit, 3 if kind == INT3 else 1, TILE)
    codes, missing = cpu_packing.pack(weight.codes, None if columns.identity else columns.order, shape, kp, kind, flip)
    return codes.view(torch.int8) if kind == INT8 else codes, missing


def _tiles(grid: Tensor, rows: int) -> Tensor:
    """``[N, G]`` as ``[N/16, G, 16]``, with ``rows`` of zeros added."""
    padded = torch.nn.functional.pad(grid, (0, 0, 0, rows))
    return padded.view(-1, TILE, grid.shape[1]).transpose(1, 2).contiguous()


@functools.cache
def _function() -> ctypes._NamedFuncPointer:
    function = builder.library("weight_only").qplug_weight_only
    function.argtypes = [ctypes.c_void_p] * 12 + [ctypes.c_long] * 7 + [ctypes.c_int] * 6
    return function


def _run(
    x: Tensor,
    codes: Tensor,
    table: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    shifts: Tensor | None,
    row_scales: Tensor | None,
    segments: Tensor,
    order: Tensor | None,
    x_scales: Tensor | None,
    bias: Tensor | None,
    n: int,
    type: int,
    scale_bytes: int,
    dtype: torch.dtype | None,
) -> Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    k = x.shape[-1]
    m = x.numel() // k
    y = x.new_empty((*x.shape[:-1], n), dtype=dtype)
    kp = codes.shape[1] * (1 if codes.ndim == 3 else UNITS[type])
    failed = _function()(
        y.data_ptr(), x.data_ptr(), codes.data_ptr(), address(table), scales.data_ptr(), address(zeros), address(shifts), address(row_scales),
        segments.data_ptr(), address(order), address(x_scales), address(bias), m, n, k, kp, scales.shape[1], segments.shape[0],
        0 if x_scales is None else x_scales.shape[-1], type, KINDS[x.dtype], KINDS[y.dtype], scale_bytes or KINDS[scales.dtype],
        bias_kind(bias), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for {m} tokens of {kp} columns")
    return y


def _fake(
    x: Tensor,
    codes: Tensor,
    table: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    shifts: Tensor | None,
    row_scales: Tensor | None,
    segments: Tensor,
    order: Tensor | None,
    x_scales: Tensor | None,
    bias: Tensor | None,
    n: int,
    type: int,
    scale_bytes: int,
    dtype: torch.dtype | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n), dtype=dtype)


weight_only = operation(
    "weight_only(Tensor x, Tensor codes, Tensor? table, Tensor scales, Tensor? zeros, Tensor? shifts, Tensor? row_scales, Tensor segments,"
    " Tensor? order, Tensor? x_scales, Tensor? bias, int n, int type, int scale_bytes, ScalarType? dtype) -> Tensor",
    _run,
    _fake,
)
