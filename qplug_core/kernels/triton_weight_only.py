"""Weights of 2, 3, 4 or 8 bits times 16-bit activations on GPUs, in Triton: packing, and the operation ``qplug::triton_weight_only``.

Integers with zero points of any value, FP8 by bit decoding (no FP8 unit is needed), FP4, and 4-bit codebooks such as NF4; scales by
channel, group, block or tensor, as floats, E8M0 or E4M3 bytes. Up to 128 tokens the codes are multiplied as they are; for more tokens the
weight is written out in 16 bit once, some rows at a time, and torch multiplies: that is nearer to the machine's limit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import Device
from ..kernel import Kernel, PackedWeight, Problem
from ..scheme import NUMBER_TYPES
from ..support import Refusal
from ..weight import E2M1, OpaqueWeight, QuantWeight
from . import triton_experts
from .triton_launch import CompileCase, operation, refusals, rows_of, target_of, tile_of
from .triton_pack import NARROWEST, PARTS, by_group, columns_of, pack_codes
from .triton_tables import splits_of

FAMILY = "weight_only"
SCRATCH = 128 * 2**20
"""Bytes of 16-bit weights that are written out at a time."""
LARGEST_ZERO = {8: 1024, 4: 128, 3: 128, 2: 128}
"""Whole zero points up to which codes are converted without arithmetic in float32, by bits."""


class TritonWeightOnly(Kernel):
    """A weight-only kernel for the number types in ``numbers``. Subclasses say which, and their name.

    ``drops_act``: takes schemes that quantize activations, too, and leaves these at 16 bit; to be declared ``mode="weight-only"``.
    Ragged shapes, groups of any length, zero points of any value, ``pre_scale`` and ``act_shift`` are taken.
    """

    numbers: tuple[str, ...]
    grouped = True
    drops_act: bool = False

    def supports(self, problem: Problem, device: Device) -> list[Refusal]:
        """Refuses other operations and number types, quantized activations, sparsity, shifted weights, float32, and what is no GPU."""
        found = refusals(device, problem.dtype)
        weight, scheme = problem.scheme.weight, problem.scheme
        if problem.op not in ("linear", "experts", "lm_head"):
            found.append(Refusal("op", f"operation {problem.op}", "linear, experts or lm_head"))
        if weight is None or problem.encoding or weight.dtype not in self.numbers:
            found.append(Refusal("scheme", f"scheme {scheme}", f"weights of {' or '.join(self.numbers)}"))
        if scheme.act is not None and not self.drops_act:
            found.append(Refusal("scheme", f"activations of {scheme.act.dtype}", "16-bit activations"))
        if scheme.sparsity:
            found.append(Refusal("scheme", f"{scheme.sparsity} sparsity", "dense weights"))
        if problem.shift:
            found.append(Refusal("zeros", "a shift in units of the weight", "zero points in units of codes"))
        return found

    def compile_cases(self, arch: str, subset: str) -> list[CompileCase]:
        """What the compile matrix compiles for ``arch``; ``subset`` is ``ci`` or ``all``."""
        from .triton_weight_only_cases import cases

        return cases(self.numbers, arch, subset)

    def pack(self, weight: QuantWeight | OpaqueWeight, out: PackedWeight | None = None) -> PackedWeight:
        """See :func:`pack`."""
        assert isinstance(weight, QuantWeight)
        packed = pack(weight, self.name)
        return packed if out is None else out.refill(packed)

    def apply(self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """``x [*, K]`` bfloat16 or float16 to ``[*, N]``; ``bias [N]`` of any float dtype."""
        t, meta = packed.tensors, packed.meta
        if "act_shift" in t:
            x = x - t["act_shift"].to(x.dtype)
        if "pre_scale" in t:
            x = x * t["pre_scale"].to(x.dtype)
        y: Tensor = weight_only(
            x, t["codes"], t.get("scales"), t.get("zeros"), t.get("row"), t.get("table"), t.get("order"), bias,
            packed.n, meta["kind"], meta["bits"], meta["offset"], meta["scale"], meta["group"], meta["rows"], meta["part"],
        )  # fmt: skip
        return y

    def apply_experts(self, x: Tensor, packed: PackedWeight, ends: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :meth:`qplug_core.kernel.Kernel.apply_experts`."""
        return triton_experts.weight_only_product(x, packed, ends, bias)


def pack(weight: QuantWeight, name: str, narrowest: int = NARROWEST) -> PackedWeight:
    """A plain weight ``[N, K]`` in the layout of ``triton_pack.py``, parts of at least ``narrowest`` columns.

    ``codes`` uint8 ``[N, bytes]``; ``scales`` ``[G, N/bn]`` as stored (none where a row has one scale); ``zeros`` ``[G, N/bn]``, float16 where exact;
    ``row`` float32 ``[N]``, what multiplies a whole row: its only scale, or the global scale; ``table`` float32 ``[16]``; ``order`` int32.
    """
    part = weight.scheme.weight
    assert part is not None
    bits, number = part.bits, part.dtype
    if weight.block[0] == 0 or weight.scales.shape[-1] == 1:
        weight = weight.regroup(1, weight.block[1])
    low = 0
    codes = weight.codes.view(torch.uint8)
    if NUMBER_TYPES[number].kind == "int" and weight.codes.dtype == torch.int8:
        # In uint8 this wraps round, from two's complement to unsigned.
        low = 1 << (bits - 1)
        codes = codes + low
    columns = columns_of(weight, bits, narrowest)
    packed_codes, order = pack_codes(codes, bits, columns)
    length = packed_codes.shape[1] * 8 // bits
    tensors = {"codes": packed_codes}
    scales = weight.scales
    if number == "fp8_e4m3":
        scales = _with_nans(weight)
    if columns.group:
        tensors["scales"] = by_group(scales, columns, length)
        if weight.global_scale is not None:
            factor = weight.global_scale.float()
            factor = 1.0 / factor if weight.global_div else factor
            tensors["row"] = factor.reshape(-1).expand(weight.n).contiguous()
    else:
        tensors["row"] = _filled(weight, scales).reshape(-1).contiguous()
    kind = {"fp8_e4m3": "e4m3", "fp8_e5m2": "e5m2"}.get(number, "int")
    if weight.codebook is not None:
        kind = "e2m1" if weight.codebook.tolist() == list(E2M1) else "table"
        if kind == "table":
            tensors["table"] = weight.codebook.float().clone()
    if weight.zeros is not None:
        # Codes and zero points are moved together where the codes were signed.
        zeros = weight.zeros.float() + low
        whole = not weight.zeros.is_floating_point() and bool((zeros.abs() <= LARGEST_ZERO[bits]).all())
        kind = "int" if whole else "real"
        tensors["zeros"] = by_group(zeros.half() if whole else zeros, columns, length)
    if order is not None:
        tensors["order"] = order
    for field in ("pre_scale", "act_shift"):
        if (value := getattr(weight, field)) is not None:
            tensors[field] = value.clone()
    scale = part.scale_dtype if weight.scales.dtype in (torch.uint8, torch.float8_e4m3fn) else "float"
    meta = {
        "kind": kind, "bits": bits, "offset": low, "scale": scale, "group": columns.group, "rows": weight.block[0] or 1,
        "part": columns.part,
    }  # fmt: skip
    return PackedWeight(name, weight.n, weight.k, tensors, meta)


def _with_nans(weight: QuantWeight) -> Tensor:
    """The scales, NaN for every block with a NaN code, which a kernel that decodes bits does not see."""
    bad = (weight.codes.view(torch.uint8) & 0x7F) == 0x7F
    if not bool(bad.any()):
        return weight.scales
    bn, bk = weight.block
    scales = weight.scales.clone()
    row, column = bad.nonzero(as_tuple=True)
    group = column // (bk or weight.k) if weight.group_index is None else weight.group_index.long()[column]
    scales[row // (bn or weight.n), group] = 255 if scales.dtype == torch.uint8 else float("nan")
    return scales


def _filled(weight: QuantWeight, scales: Tensor) -> Tensor:
    return weight.with_tensors({"scales": scales}).scale_values()


def _run(
    x: Tensor, codes: Tensor, scales: Tensor | None, zeros: Tensor | None, row: Tensor | None, table: Tensor | None,
    order: Tensor | None, bias: Tensor | None, n: int, kind: str, bits: int, offset: int, scale: str, group: int, rows: int, part: int,
) -> Tensor:  # fmt: skip
    flat, target = rows_of(x), target_of(x)
    m, k = flat.shape
    y = x.new_empty((*x.shape[:-1], n))
    if not y.numel():
        return y
    constants = {
        "KIND": kind, "BITS": bits, "OFFSET": float(offset), "SCALE": scale, "GROUP": group, "ROWS": rows, "S": part
    }  # fmt: skip
    tensors = (codes, scales, zeros, row, table, order)
    # None: there are so many tokens that the weight is written out.
    tile = tile_of(FAMILY, target, "sm_80", bits, m, n, k, kind)
    if tile is None:
        return _written_out(y, flat, tensors, bias, constants)
    from .triton_weight_only_kernels import sum_splits, weight_only_gemm

    units = codes.shape[1] * 8 // bits // (part * PARTS[bits])
    grid = (-(-n // tile["BN"]), -(-m // tile["BM"]))
    splits = tile.splits or splits_of(units, grid[0] * grid[1], target.processors)
    parts = y if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=x.device)
    weight_only_gemm[(*grid, splits)](
        parts, flat, *tensors, bias, m, n, k, units, splits, flat.stride(0), codes.stride(0),
        **constants, SPLIT=splits > 1, **tile.arguments(),
    )  # fmt: skip
    if splits > 1:
        sum_splits[(-(-m * n // 1024),)](y, parts, bias, m * n, n, splits, BLOCK=1024, num_warps=4)
    return y


def _written_out(
    y: Tensor, x: Tensor, tensors: tuple[Tensor | None, ...], bias: Tensor | None, constants: dict[str, object]
) -> Tensor:
    """x times the weight in 16 bit, as many rows at a time as :data:`SCRATCH` holds; ``y`` is filled."""
    from .triton_weight_only_kernels import weight_only_dequantize

    codes, order = tensors[0], tensors[5]
    assert codes is not None
    m, k = x.shape
    n = y.shape[-1]
    bits, part = constants["BITS"], constants["S"]
    assert isinstance(bits, int)
    assert isinstance(part, int)
    length = codes.shape[1] * 8 // bits
    columns = k if order is None else length
    if order is not None:
        x = x.index_select(1, order.clamp(min=0))
    flat = y.view(m, n)
    step = max(SCRATCH // (2 * columns) // 64 * 64, 64)
    for start in range(0, n, step):
        stop = min(start + step, n)
        w = x.new_empty((stop - start, columns))
        weight_only_dequantize[(-(-(stop - start) // 64), length // (part * PARTS[bits]))](
            w, *tensors, start, stop, n, columns, codes.stride(0), **constants, BN=64, num_warps=4
        )
        torch.mm(x, w.t(), out=flat[:, start:stop]) if start or stop < n else torch.mm(x, w.t(), out=flat)
    return y if bias is None else y.add_(bias)


def _fake(
    x: Tensor, codes: Tensor, scales: Tensor | None, zeros: Tensor | None, row: Tensor | None, table: Tensor | None,
    order: Tensor | None, bias: Tensor | None, n: int, kind: str, bits: int, offset: int, scale: str, group: int, rows: int, part: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], n))


weight_only = operation(
    "triton_weight_only(Tensor x, Tensor codes, Tensor? scales, Tensor? zeros, Tensor? row, Tensor? table, Tensor? order, Tensor? bias, "
    "int n, str kind, int bits, int offset, str scale, int group, int rows, int part) -> Tensor",
    _run,
    _fake,
)
