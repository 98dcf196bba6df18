"""Microscaled FP4 and FP8 weights times activations of the same kind on GPUs, in Triton: packing, and ``qplug::triton_microscaled``.

NVFP4 (groups of 16, e4m3 scales under one float32 scale) and MXFP4, MXFP8 (groups of 32, E8M0 scales), on matrix units that multiply
block scales themselves: sm_100 and sm_120 with their relatives, and for MX gfx950. The activations are quantized by a kernel of its own,
``qplug::triton_microscale``. On sm_120, whose units mix no types, MXFP4 weights become FP8 in registers for FP8 activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import Device
from ..errors import DecodeError
from ..kernel import Kernel, PackedWeight, Problem
from ..support import Refusal
from ..weight import E2M1, OpaqueWeight, QuantWeight
from .triton_experts import _experts_of, power_of, prepared, tile_of_experts
from .triton_launch import INTERPRETED, CompileCase, operation, refusals, rows_of, target_of, tile_of
from .triton_tables import splits_of

FAMILY = "microscaled"
COLUMNS = 256
"""Columns of a row are padded to a multiple of this, the deepest tile."""
RULES = ("", "ct", "floor", "ceil", "even", "up")
GROUPS = {"e4m3": 16, "e8m0": 32}
"""Columns of a block by the type of its scale."""
KINDS = {"fp4_e2m1": "e2m1", "fp8_e4m3": "e4m3"}


class TritonMicroscaled(Kernel):
    """Weights and activations with scales of the type ``scale``: ``e4m3`` (NVFP4) or ``e8m0`` (MX). Subclasses say which, and their name."""

    scale: str
    grouped = True

    def supports(self, problem: Problem, device: Device) -> list[Refusal]:
        """Refuses devices without units for block scales, other blocks and other rules than those of NVFP4 and MX."""
        found = refusals(device, problem.dtype)
        weight, act, scheme = problem.scheme.weight, problem.scheme.act, problem.scheme
        if "fp4" not in device.features or (self.scale == "e4m3" and device.vendor != "nvidia"):
            need = f"a GPU that multiplies FP4 with {self.scale} block scales"
            found.append(Refusal("device", str(device), need, "weight-only kernels run everywhere"))
        if problem.op not in ("linear", "experts", "lm_head"):
            found.append(Refusal("op", f"operation {problem.op}", "linear, experts or lm_head"))
        group = GROUPS[self.scale]
        numbers = ("fp4_e2m1",) if self.scale == "e4m3" else tuple(KINDS)
        for part, what in ((weight, "weights"), (act, "activations")):
            if part is None or problem.encoding or part.dtype not in numbers or part.scale_dtype != self.scale:
                found.append(Refusal("scheme", f"{what} of {scheme}", f"{' or '.join(numbers)} with {self.scale} scales"))
            elif part.block != (1, group):
                found.append(Refusal("group", f"{what} with blocks {part.block}", f"blocks of {group} columns of one row"))
        if weight is not None and act is not None and (weight.dtype, act.dtype) == ("fp8_e4m3", "fp4_e2m1"):
            found.append(Refusal("scheme", f"scheme {scheme}", "activations that are no narrower than the weights"))
        if act is not None and act.dynamic != ("local" if self.scale == "e4m3" else True):
            found.append(
                Refusal("scheme", f"activation scales of {scheme}", "block scales that are computed from the input")
            )
        if act is not None and act.rule not in (RULES if self.scale == "e8m0" else ("",)):
            found.append(Refusal("rule", f"activation rule {act.rule}", " or ".join(r or "the common one" for r in RULES)))
        if scheme.sparsity or scheme.act_order:
            found.append(Refusal("scheme", f"scheme {scheme}", "dense weights with columns in order"))
        if problem.shift:
            found.append(Refusal("zeros", "a shift in units of the weight", "symmetric weights"))
        return found

    def compile_cases(self, arch: str, subset: str) -> list[CompileCase]:
        """What the compile matrix compiles for ``arch``; ``subset`` is ``ci`` or ``all``."""
        from .triton_microscaled_cases import cases

        return cases(self.scale, arch, subset)

    def pack(self, weight: QuantWeight | OpaqueWeight, out: PackedWeight | None = None) -> PackedWeight:
        """See :func:`pack`."""
        assert isinstance(weight, QuantWeight)
        packed = pack(weight, self.name)
        return packed if out is None else out.refill(packed)

    def apply(self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """``x [*, K]`` bfloat16 or float16 to ``[*, N]``; ``bias [N]`` of any float dtype."""
        t = packed.tensors
        if "act_shift" in t:
            x = x - t["act_shift"].to(x.dtype)
        if "pre_scale" in t:
            x = x * t["pre_scale"].to(x.dtype)
        q, q_scales = quantized(x, packed, t.get("act_scale"))
        y: Tensor = microscaled(
            q,
            q_scales,
            t["codes"],
            t["scales"],
            t.get("row"),
            bias,
            packed.n,
            packed.meta["act"],
            packed.meta["kind"],
            x.dtype,
        )
        return y.view(*x.shape[:-1], packed.n)

    def apply_experts(self, x: Tensor, packed: PackedWeight, ends: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :meth:`qplug_core.kernel.Kernel.apply_experts`."""
        t = packed.tensors
        outer = t.get("act_scale")
        q, q_scales = quantized(
            prepared(x, packed, ends), packed, None if outer is None else outer.reshape(-1)[_experts_of(x, ends)]
        )
        y: Tensor = microscaled_experts(
            q,
            q_scales,
            t["codes"],
            t["scales"],
            t.get("row"),
            bias,
            ends,
            packed.n,
            packed.meta["act"],
            packed.meta["kind"],
            x.dtype,
        )
        return y


def pack(weight: QuantWeight, name: str) -> PackedWeight:
    """A plain weight ``[N, K]`` with columns padded to KP, a multiple of :data:`COLUMNS`.

    ``codes`` FP8 ``[N, KP]``, or uint8 ``[N, KP / 2]``, the even column in the low half; ``scales`` e4m3 or uint8 ``[N, KP / group]``; ``row``
    float32 ``[N]``, the global scales of weights and activations together; ``act_scale`` float32 ``[1]``; ``pre_scale`` and ``act_shift`` ``[K]``.
    """
    part, act = weight.scheme.weight, weight.scheme.act
    assert part is not None
    assert act is not None
    group, kind = GROUPS[part.scale_dtype], KINDS[part.dtype]
    short = -weight.k % COLUMNS
    codes, scales = weight.codes.view(torch.uint8), weight.scales
    if part.scale_dtype == "e4m3":
        codes, scales = _unsigned(codes, scales, group)
    scales = torch.nn.functional.pad(scales.view(torch.uint8), (0, (weight.k + short) // group - scales.shape[1]))
    codes = torch.nn.functional.pad(codes, (0, short))
    if kind == "e2m1":
        assert weight.codebook is None or weight.codebook.tolist() == list(E2M1)
        codes = codes[:, ::2] | (codes[:, 1::2] << 4)
    tensors = {
        "codes": codes.contiguous() if kind == "e2m1" else codes.contiguous().view(torch.float8_e4m3fn),
        "scales": scales.contiguous().view(torch.float8_e4m3fn) if part.scale_dtype == "e4m3" else scales.contiguous(),
    }
    factors = (
        (weight.global_scale, weight.global_div),
        (weight.act_scale if act.dynamic == "local" else None, weight.act_div),
    )
    for factor, divide in factors:
        if factor is not None:
            value = (1.0 / factor.float() if divide else factor.float()).reshape(-1).expand(weight.n)
            tensors["row"] = (tensors["row"] * value if "row" in tensors else value).contiguous()
    if act.dynamic == "local":
        assert weight.act_scale is not None
        tensors["act_scale"] = weight.act_scale.float().reshape(1).clone()
    for field in ("pre_scale", "act_shift"):
        if (stored := getattr(weight, field)) is not None:
            tensors[field] = stored.clone()
    meta = {"kind": kind, "act": KINDS[act.dtype], "rule": act.rule or "ct", "divide": weight.act_div, "group": group}
    return PackedWeight(name, weight.n, weight.k, tensors, meta)


def _unsigned(codes: Tensor, scales: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The same weights with e4m3 scales without a sign, which matrix units do not read: codes of such blocks change theirs."""
    stored = scales.to(torch.float8_e4m3fn)
    if bool((stored.to(scales.dtype) != scales).any()):
        raise DecodeError(
            "block scales are no FP8 e4m3 numbers; NVFP4 needs such, so load with a weight-only kernel or quantize again"
        )
    negative = (stored.view(torch.uint8) >= 0x80).repeat_interleave(group, dim=1)[:, : codes.shape[1]]
    return torch.where(negative, codes ^ 8, codes), (stored.view(torch.uint8) & 0x7F).view(torch.float8_e4m3fn)


def quantized(x: Tensor, packed: PackedWeight, outer: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``x [*, K]`` for ``packed``, see :func:`pack`; ``outer`` float32 ``[1]``, or ``[M]`` by token."""
    columns = packed.tensors["codes"].shape[-1] * (2 if packed.meta["kind"] == "e2m1" else 1)
    group, rule, divide = packed.meta["group"], packed.meta["rule"], packed.meta["divide"]
    codes, scales = microscale(x, outer, columns, group, packed.meta["act"], rule, divide)
    return codes, scales


def _microscale(
    x: Tensor, outer: Tensor | None, columns: int, group: int, kind: str, rule: str, divide: bool
) -> tuple[Tensor, Tensor]:
    flat = rows_of(x)
    target_of(x)
    codes, scales = _microscale_fake(flat, outer, columns, group, kind, rule, divide)
    if not flat.numel():
        return codes, scales
    from .triton_microscaled_kernels import microscale_rows

    m, k = flat.shape
    block = min(1024, columns & -columns)
    microscale_rows[(m, -(-columns // block))](
        codes, scales, flat, outer, k, columns, flat.stride(0), 0 if outer is None or outer.numel() == 1 else 1,
        G=group, FP4=kind == "e2m1", RULE=rule, DIVIDE=divide, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return codes, scales


def _microscale_fake(
    x: Tensor, outer: Tensor | None, columns: int, group: int, kind: str, rule: str, divide: bool
) -> tuple[Tensor, Tensor]:
    m = x.numel() // x.shape[-1]
    four = kind == "e2m1"
    codes = torch.empty(
        (m, columns // 2 if four else columns), dtype=torch.uint8 if four else torch.float8_e4m3fn, device=x.device
    )
    dtype = torch.uint8 if outer is None else torch.float8_e4m3fn
    return codes, torch.empty((m, columns // group), dtype=dtype, device=x.device)


def _constants(q_scales: Tensor, q: Tensor, act: str, kind: str, arch: str) -> tuple[int, dict[str, object]]:
    """Padded columns, and what is part of the binary beside the tile."""
    columns = q.shape[1] * (2 if act == "e2m1" else 1)
    return columns, {"G": columns // q_scales.shape[1], "X": act, "W": kind, "WIDEN": widened(act, kind, arch)}


def widened(act: str, kind: str, arch: str) -> bool:
    """Whether FP4 weights become FP8 in registers: sm_120 and its relatives have no instruction of both types."""
    return act == "e4m3" and kind == "e2m1" and (arch.startswith("sm_12") or arch == INTERPRETED)


def _run(
    q: Tensor, q_scales: Tensor, codes: Tensor, scales: Tensor, row: Tensor | None, bias: Tensor | None, n: int, act: str, kind: str,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    m = q.shape[0]
    y = torch.empty((m, n), dtype=dtype, device=q.device)
    if not y.numel():
        return y
    from .triton_microscaled_kernels import microscaled_gemm
    from .triton_weight_only_kernels import sum_splits

    target = target_of(q)
    columns, constants = _constants(q_scales, q, act, kind, target.arch)
    tile = tile_of(FAMILY, target, "sm_120", _bits(act), m, n, columns)
    assert tile is not None, f"no tile for {m} tokens on {target.arch}"
    grid = (-(-n // tile["BN"]), -(-m // tile["BM"]))
    splits = tile.splits or splits_of(columns // tile["BK"], grid[0] * grid[1], target.processors)
    parts = y if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=q.device)
    microscaled_gemm[(*grid, splits)](
        parts,
        q,
        q_scales,
        codes,
        scales,
        row,
        bias,
        m,
        n,
        columns,
        splits,
        **constants,
        SPLIT=splits > 1,
        **tile.arguments(),
    )
    if splits > 1:
        sum_splits[(-(-m * n // 1024),)](y, parts, bias, m * n, n, splits, BLOCK=1024, num_warps=4)
    return y


def _run_experts(
    q: Tensor, q_scales: Tensor, codes: Tensor, scales: Tensor, row: Tensor | None, bias: Tensor | None, ends: Tensor, n: int, act: str,
    kind: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    y = torch.zeros((q.shape[0], n), dtype=dtype, device=q.device)
    if not y.numel():
        return y
    from .triton_microscaled_kernels import microscaled_experts as kernel

    count = codes.shape[0]
    columns, constants = _constants(q_scales, q, act, kind, target_of(q).arch)
    tile, grid = tile_of_experts(FAMILY, q, _bits(act), count, n)
    kernel[grid](
        y, q, q_scales, codes, scales, row, bias, ends, count, n, columns, **constants, E=power_of(count), **tile.arguments()
    )
    return y


def _bits(act: str) -> int:
    """Width of the activation codes, by which tiles differ."""
    return 4 if act == "e2m1" else 8


def _fake(
    q: Tensor, q_scales: Tensor, codes: Tensor, scales: Tensor, row: Tensor | None, bias: Tensor | None, n: int, act: str, kind: str,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return torch.empty((q.shape[0], n), dtype=dtype, device=q.device)


def _fake_experts(
    q: Tensor, q_scales: Tensor, codes: Tensor, scales: Tensor, row: Tensor | None, bias: Tensor | None, ends: Tensor, n: int, act: str,
    kind: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return torch.empty((q.shape[0], n), dtype=dtype, device=q.device)


microscale = operation(
    "triton_microscale(Tensor x, Tensor? outer, int columns, int group, str kind, str rule, bool divide) -> (Tensor, Tensor)",
    _microscale,
    _microscale_fake,
)
microscaled = operation(
    "triton_microscaled(Tensor q, Tensor q_scales, Tensor codes, Tensor scales, Tensor? row, Tensor? bias, int n, str act, str kind, "
    "ScalarType dtype) -> Tensor",
    _run,
    _fake,
)
microscaled_experts = operation(
    "triton_microscaled_experts(Tensor q, Tensor q_scales, Tensor codes, Tensor scales, Tensor? row, Tensor? bias, Tensor ends, int n, "
    "str act, str kind, ScalarType dtype) -> Tensor",
    _run_experts,
    _fake_experts,
)
