"""All experts of one projection in one launch on GPUs, in Triton: the operations ``qplug::triton_*_experts``.

Tokens come sorted by expert, packed tensors as stacks with E in front, see :meth:`qplug_core.kernel.Kernel.apply_experts`. The number of programs
depends on the shapes alone, so that a CUDA graph may hold them: those without tokens end at once.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..kernel import PackedWeight
from .triton_activations import quantize
from .triton_launch import operation, rows_of, target_of, tile_of
from .triton_pack import PARTS
from .triton_tables import Tile

MOST = 128
"""Tokens of one expert, on average, beyond which tiles stay as they are."""


def weight_only_product(x: Tensor, packed: PackedWeight, ends: Tensor, bias: Tensor | None) -> Tensor:
    """``x [T, K]`` to ``[T, N]``, with stacks that :func:`.triton_weight_only.pack` made."""
    t, meta = packed.tensors, packed.meta
    y: Tensor = weight_only_experts(
        prepared(x, packed, ends), t["codes"], t.get("scales"), t.get("zeros"), t.get("row"), t.get("table"), t.get("order"),
        bias, ends, packed.n, meta["kind"], meta["bits"], meta["offset"], meta["scale"], meta["group"], meta["rows"], meta["part"],
    )  # fmt: skip
    return y


def mixed_product(x: Tensor, packed: PackedWeight, ends: Tensor, bias: Tensor | None) -> Tensor:
    """``x [T, K]`` to ``[T, N]``, with stacks that :func:`.triton_mixed.pack` made."""
    t, meta = packed.tensors, packed.meta
    q, q_scales, _ = quantized_experts(x, packed, ends, t["codes"].shape[2] * 8 // meta["bits"])
    y: Tensor = mixed_experts(
        q, q_scales, t["codes"], t.get("scales"), t.get("zeros"), t.get("row"), bias, ends, packed.n, meta["kind"], meta["bits"],
        meta["offset"], meta["scale"], meta["group"], meta["rows"], meta["part"], x.dtype,
    )  # fmt: skip
    return y


def scaled_product(x: Tensor, packed: PackedWeight, ends: Tensor, bias: Tensor | None) -> Tensor:
    """``x [T, K]`` to ``[T, N]``, with stacks that :func:`.triton_scaled.pack` made."""
    t, meta = packed.tensors, packed.meta
    q, q_scales, q_zeros = quantized_experts(x, packed, ends, t["codes"].shape[2])
    y: Tensor = scaled_experts(
        q, q_scales, None if meta["symmetric"] else q_zeros, t["codes"], t["scales"], t.get("sums"), bias, ends, packed.n,
        meta["act_group"], meta["rows"], x.dtype,
    )  # fmt: skip
    return y


def _experts_of(x: Tensor, ends: Tensor) -> Tensor:
    """The expert int64 ``[T]`` of each row; of rows that none takes, the last."""
    return _taken_by(x, ends).clamp(max=len(ends) - 1)


def _taken_by(x: Tensor, ends: Tensor) -> Tensor:
    """The expert int64 ``[T]`` of each row; E for rows that none takes."""
    return torch.searchsorted(ends, torch.arange(x.shape[0], device=x.device), right=True)


def prepared(x: Tensor, packed: PackedWeight, ends: Tensor) -> Tensor:
    """x after ``act_shift`` and ``pre_scale [E, K]`` of each row's expert, where the weights have them."""
    t = packed.tensors
    if "act_shift" not in t and "pre_scale" not in t:
        return x
    expert = _experts_of(x, ends)
    if "act_shift" in t:
        x = x - t["act_shift"][expert].to(x.dtype)
    if "pre_scale" in t:
        x = x * t["pre_scale"][expert].to(x.dtype)
    return x


def quantized_experts(x: Tensor, packed: PackedWeight, ends: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`.triton_activations.quantized`, each row by what the packed tensors of its expert say."""
    t, meta = packed.tensors, packed.meta
    x, expert = prepared(x, packed, ends), _experts_of(x, ends)
    if (order := t.get("order")) is not None:
        place = order[expert]
        x = torch.where(place >= 0, x.gather(1, place.clamp(min=0).long()), 0)
    scale, zero = t.get("act_scale"), t.get("act_zero")
    if meta["whole"]:
        amax = x.abs().amax(1).float()
        # One more, for rows that none takes: they are no part of the last expert's scale.
        of_expert = amax.new_zeros(len(ends) + 1).scatter_reduce_(0, _taken_by(x, ends), amax, "amax")
        scale = (of_expert.clamp(max=meta["bound"]) if meta["bound"] else of_expert) / meta["divisor"]
    found: tuple[Tensor, Tensor, Tensor] = quantize(
        x, None if scale is None else scale.reshape(-1)[expert], None if zero is None else zero.reshape(-1)[expert], columns,
        meta["act_group"], meta["act"], meta["symmetric"], meta["divisor"], meta["lowest"], meta["bound"],
    )  # fmt: skip
    return found


def tile_of_experts(family: str, x: Tensor, bits: int, experts: int, n: int, kind: str = "") -> tuple[Tile, tuple[int, int]]:
    """The tile for as many tokens as an expert has on average, and the grid: at most one block of each expert is not full."""
    tokens, target = x.shape[0], target_of(x)
    each = min(-(-tokens // experts), MOST)
    # Experts without tokens leave processors to those that have some: how many is not known here.
    tile = tile_of(family, replace(target, processors=0), "sm_89", bits, each, n, x.shape[1], kind)
    assert tile is not None, f"no tile for {each} tokens on {target.arch}"
    return tile, (-(-n // tile["BN"]), min(tokens, tokens // tile["BM"] + experts))


def _stride(stack: Tensor | None) -> int:
    """Elements of one expert."""
    return 0 if stack is None else stack.stride(0)


def _run_weight_only(
    x: Tensor, codes: Tensor, scales: Tensor | None, zeros: Tensor | None, row: Tensor | None, table: Tensor | None,
    order: Tensor | None, bias: Tensor | None, ends: Tensor, n: int, kind: str, bits: int, offset: int, scale: str, group: int,
    rows: int, part: int,
) -> Tensor:  # fmt: skip
    y = x.new_zeros((x.shape[0], n))
    if not y.numel():
        return y
    from .triton_experts_kernels import weight_only_experts as kernel

    x = rows_of(x)
    count = codes.shape[0]
    tile, grid = tile_of_experts("weight_only", x, bits, count, n, kind)
    units = codes.shape[2] * 8 // bits // (part * PARTS[bits])
    kernel[grid](
        y, x, codes, scales, zeros, row, table, order, bias, ends, count, n, x.shape[1], units, x.stride(0), codes.stride(1),
        codes.stride(0), _stride(scales), _stride(order), KIND=kind, BITS=bits, OFFSET=float(offset), SCALE=scale, GROUP=group, ROWS=rows,
        S=part, E=power_of(count), **tile.arguments(),
    )  # fmt: skip
    return y


def _run_mixed(
    q: Tensor, q_scales: Tensor, codes: Tensor, scales: Tensor | None, zeros: Tensor | None, row: Tensor | None, bias: Tensor | None,
    ends: Tensor, n: int, kind: str, bits: int, offset: int, scale: str, group: int, rows: int, part: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    y = torch.zeros((q.shape[0], n), dtype=dtype, device=q.device)
    if not y.numel():
        return y
    from .triton_experts_kernels import mixed_experts as kernel

    count = codes.shape[0]
    tile, grid = tile_of_experts("mixed", q, bits, count, n)
    kernel[grid](
        y, q, q_scales, codes, scales, zeros, row, bias, ends, count, n, q.shape[1] // (part * PARTS[bits]), q.stride(0), codes.stride(1),
        codes.stride(0), _stride(scales), KIND=kind, BITS=bits, OFFSET=float(offset), SCALE=scale, GROUP=group, ROWS=rows, S=part,
        E=power_of(count), **tile.arguments(),
    )  # fmt: skip
    return y


def _run_scaled(
    q: Tensor, q_scales: Tensor, q_zeros: Tensor | None, codes: Tensor, scales: Tensor, sums: Tensor | None, bias: Tensor | None,
    ends: Tensor, n: int, group: int, rows: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    y = torch.zeros((q.shape[0], n), dtype=dtype, device=q.device)
    if not y.numel():
        return y
    import triton.language as tl

    from .triton_experts_kernels import scaled_experts as kernel

    count = codes.shape[0]
    tile, grid = tile_of_experts("scaled", q, 8, count, n)
    sizes = tile.arguments()
    if group:
        sizes["BK"] = min(sizes["BK"], group)
    kernel[grid](
        y, q, q_scales, q_zeros, codes, scales, sums, bias, ends, count, n, q.shape[1], q.shape[0], codes.stride(0), scales.stride(0),
        ACC=tl.int32 if codes.dtype == torch.int8 else tl.float32, GROUP=group, ROWS=rows if group else 1, E=power_of(count), **sizes,
    )  # fmt: skip
    return y


def power_of(count: int) -> int:
    """The power of two that is at least ``count``, and 16."""
    return max(1 << (count - 1).bit_length(), 16)


def _fake_weight_only(
    x: Tensor, codes: Tensor, scales: Tensor | None, zeros: Tensor | None, row: Tensor | None, table: Tensor | None,
    order: Tensor | None, bias: Tensor | None, ends: Tensor, n: int, kind: str, bits: int, offset: int, scale: str, group: int,
    rows: int, part: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], n))


def _fake_mixed(
    q: Tensor, q_scales: Tensor, codes: Tensor, scales: Tensor | None, zeros: Tensor | None, row: Tensor | None, bias: Tensor | None,
    ends: Tensor, n: int, kind: str, bits: int, offset: int, scale: str, group: int, rows: int, part: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return q.new_empty((q.shape[0], n), dtype=dtype)


def _fake_scaled(
    q: Tensor, q_scales: Tensor, q_zeros: Tensor | None, codes: Tensor, scales: Tensor, sums: Tensor | None, bias: Tensor | None,
    ends: Tensor, n: int, group: int, rows: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return q.new_empty((q.shape[0], n), dtype=dtype)


weight_only_experts = operation(
    "triton_weight_only_experts(Tensor x, Tensor codes, Tensor? scales, Tensor? zeros, Tensor? row, Tensor? table, Tensor? order, "
    "Tensor? bias, Tensor ends, int n, str kind, int bits, int offset, str scale, int group, int rows, int part) -> Tensor",
    _run_weight_only,
    _fake_weight_only,
)
mixed_experts = operation(
    "triton_mixed_experts(Tensor q, Tensor q_scales, Tensor codes, Tensor? scales, Tensor? zeros, Tensor? row, Tensor? bias, Tensor ends, "
    "int n, str kind, int bits, int offset, str scale, int group, int rows, int part, ScalarType dtype) -> Tensor",
    _run_mixed,
    _fake_mixed,
)
scaled_experts = operation(
    "triton_scaled_experts(Tensor q, Tensor q_scales, Tensor? q_zeros, Tensor codes, Tensor scales, Tensor? sums, Tensor? bias, Tensor ends, "
    "int n, int group, int rows, ScalarType dtype) -> Tensor",
    _run_scaled,
    _fake_scaled,
)
