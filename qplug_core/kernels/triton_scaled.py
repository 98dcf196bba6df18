"""8-bit weights times 8-bit activations on GPUs, in Triton: packing, and the operations ``qplug::triton_quantize`` and ``triton_scaled``.

INT8 with scales by tensor or channel, activations by token or tensor, with zero points or without; FP8 e4m3 the same way, and by block
(weights ``bn x bk``, activations by groups of bk). Integer sums are exact in int32. On gfx942, whose units know e4m3fnuz only, codes are
held as fnuz of half the value with twice the scale: the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import Device
from ..kernel import Kernel, PackedWeight, Problem
from ..scheme import TensorQuant
from ..support import Refusal
from ..weight import OpaqueWeight, QuantWeight
from .triton_launch import INTERPRETED, CompileCase, operation, refusals, rows_of, target_of
from .triton_tables import splits_of, tile_for

FAMILY = "scaled"
DEPTH = 128
"""Columns are padded to a multiple of this."""
LARGEST_K = 65536
"""Columns up to which the sum of products of 8-bit codes, with a zero point, fits int32."""
NUMBERS = {"int8": "INT8", "fp8_e4m3": "FP8 e4m3"}
_FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


class TritonScaled(Kernel):
    """W8A8 of one number type, ``number``: ``int8`` or ``fp8_e4m3``. Subclasses say which, and their name."""

    number: str
    fnuz: bool | None = None
    """Whether FP8 codes are held as e4m3fnuz; None: where the device needs it."""

    def supports(self, problem: Problem, device: Device) -> list[Refusal]:
        """Refuses other number types and granularities, weights with zero points, 16-bit activations, float32, and devices without the unit."""
        found = refusals(device, problem.dtype)
        weight, act, scheme = problem.scheme.weight, problem.scheme.act, problem.scheme
        name = NUMBERS[self.number]
        if ("fp8" if self.number == "fp8_e4m3" else "int8") not in device.features:
            found.append(
                Refusal("device", str(device), f"a GPU that multiplies {name}", "weight-only kernels run everywhere")
            )
        if problem.op not in ("linear", "experts", "lm_head"):
            found.append(Refusal("op", f"operation {problem.op}", "linear, experts or lm_head"))
        if weight is None or problem.encoding or weight.dtype != self.number or weight.scale_dtype != "float":
            found.append(Refusal("scheme", f"scheme {scheme}", f"{name} weights with float scales"))
        elif not weight.symmetric:
            found.append(Refusal("zeros", "weights with zero points", "symmetric weights"))
        if act is None or act.dtype != self.number:
            found.append(Refusal("scheme", f"activations of {act.dtype if act else '16 bit'}", f"{name} activations"))
        elif weight is not None:
            found += self._granularity(weight, act, problem)
        if scheme.act_order or scheme.sparsity:
            found.append(
                Refusal("act_order" if scheme.act_order else "scheme", f"scheme {scheme}", "dense columns in order")
            )
        if problem.shift:
            found.append(Refusal("zeros", "a shift in units of the weight", "weights without one"))
        if problem.k > LARGEST_K:
            found.append(Refusal("shape", f"K = {problem.k}", f"at most {LARGEST_K} columns, so that sums fit int32"))
        return found

    def _granularity(self, weight: TensorQuant, act: TensorQuant, problem: Problem) -> list[Refusal]:
        found = []
        if act.dynamic == "local" or act.scale_dtype != "float" or act.outlier:
            found.append(Refusal("scheme", f"activations of {problem.scheme}", "plain float32 scales, without outliers"))
        rules = ("", "127", "127.5") if self.number == "int8" else ("", "ub1200")
        if act.rule not in rules:
            found.append(Refusal("rule", f"activation rule {act.rule}", " or ".join(r or "the common one" for r in rules)))
        if act.block[1]:
            size = act.block[1]
            if self.number == "int8" or weight.block[1] != size or size not in (32, 64, 128, 256):
                found.append(
                    Refusal(
                        "group", f"activation groups of {size} with weight blocks of {weight.block}",
                        "FP8 groups of 32, 64, 128 or 256 as wide as the blocks of the weight",
                    )
                )  # fmt: skip
        elif weight.block[1] and weight.block[1] < problem.k:
            found.append(Refusal("group", f"weight scales by {weight.block}", "one scale for each row, or fewer"))
        return found

    def compile_cases(self, arch: str, subset: str) -> list[CompileCase]:
        """What the compile matrix compiles for ``arch``; ``subset`` is ``ci`` or ``all``."""
        from .triton_scaled_cases import cases

        return cases(self.number, arch, subset)

    def pack(self, weight: QuantWeight | OpaqueWeight, out: PackedWeight | None = None) -> PackedWeight:
        """See :func:`pack`."""
        assert isinstance(weight, QuantWeight)
        fnuz = self.fnuz
        if fnuz is None:
            fnuz = weight.codes.is_cuda and target_of(weight.codes).arch == "gfx942"
        packed = pack(weight, self.name, fnuz)
        return packed if out is None else out.refill(packed)

    def apply(self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """``x [*, K]`` bfloat16 or float16 to ``[*, N]``; ``bias [N]`` of any float dtype."""
        t, meta = packed.tensors, packed.meta
        if "act_shift" in t:
            x = x - t["act_shift"].to(x.dtype)
        if "pre_scale" in t:
            x = x * t["pre_scale"].to(x.dtype)
        scale = t.get("act_scale")
        if meta["whole"] and x.numel():
            scale = _tensor_scale(x, meta["divisor"], meta["bound"])
        q, q_scales, q_zeros = quantize(
            x, scale, t.get("act_zero"), t["codes"].shape[1], meta["group"], meta["kind"], meta["symmetric"], meta["divisor"],
            meta["lowest"], meta["bound"],
        )  # fmt: skip
        y: Tensor = scaled(
            q, q_scales, None if meta["symmetric"] else q_zeros, t["codes"], t["scales"], t.get("sums"), bias, packed.n,
            meta["group"], meta["rows"], x.dtype,
        )  # fmt: skip
        return y.view(*x.shape[:-1], packed.n)


def _tensor_scale(x: Tensor, divisor: float, bound: float) -> Tensor:
    """The scale float32 ``[1]`` of all tokens together."""
    amax = x.abs().amax().float()
    return ((amax.clamp(max=bound) if bound else amax) / divisor).reshape(1)


def pack(weight: QuantWeight, name: str, fnuz: bool) -> PackedWeight:
    """A plain symmetric weight ``[N, K]``.

    ``codes`` int8 or FP8 ``[N, KP]``, KP a multiple of 128; ``scales`` float32 ``[N]``, or ``[G, N/bn]`` by block; ``sums`` int32 ``[N]``
    of rows, where activations have zero points; ``act_scale`` float32 ``[1]`` (a multiplier) and ``act_zero`` float32 ``[1]`` where they are static.
    """
    act = weight.scheme.act
    assert act is not None
    integers = weight.codes.dtype == torch.int8
    group = act.block[1]
    codes = torch.nn.functional.pad(weight.codes.view(torch.int8), (0, -weight.k % DEPTH))
    scales = weight.scale_values() if group else weight.regroup(1, 0).scale_values()
    if fnuz:
        # The sign bit alone is NaN there; all other bytes are half of what they were.
        codes = torch.where(codes == -128, 0, codes)
        scales = scales * 2.0
    if group:
        scales = torch.nn.functional.pad(scales, (0, codes.shape[1] // group - scales.shape[1]))
    tensors = {
        "codes": (codes if integers else codes.view(_FP8[fnuz])).clone(),
        "scales": (scales.t() if group else scales.reshape(-1)).contiguous().clone(),
    }
    if not act.symmetric:
        tensors["sums"] = codes.sum(1, dtype=torch.int32)
    if not act.dynamic:
        assert weight.act_scale is not None
        stored = weight.act_scale.float().reshape(1)
        tensors["act_scale"] = stored.reciprocal() if weight.act_div else stored.clone()
        if weight.act_zero is not None:
            tensors["act_zero"] = weight.act_zero.float().reshape(1)
    for field in ("pre_scale", "act_shift"):
        if (value := getattr(weight, field)) is not None:
            tensors[field] = value.clone()
    half = act.rule == "127.5"
    meta = {
        "kind": "int8" if integers else "fnuz" if fnuz else "fp8",
        "symmetric": act.symmetric,
        "divisor": (255.0 if not act.symmetric else 127.5 if half else 127.0) if integers else 448.0,
        "lowest": -127.0 if act.dynamic and act.symmetric and not half else -128.0,
        "bound": float(act.rule[2:]) if act.rule.startswith("ub") else 0.0,
        "whole": act.dynamic is True and act.block == (0, 0),
        "group": group,
        "rows": weight.block[0] or weight.n,
    }
    return PackedWeight(name, weight.n, weight.k, tensors, meta)


def _quantize(
    x: Tensor, scale: Tensor | None, zero: Tensor | None, kp: int, group: int, kind: str, symmetric: bool, divisor: float,
    lowest: float, bound: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    flat = rows_of(x)
    target_of(x)
    codes, scales, zeros = _quantize_fake(flat, scale, zero, kp, group, kind, symmetric, divisor, lowest, bound)
    if not flat.numel():
        return codes, scales, zeros
    from .triton_scaled_kernels import quantize_rows

    m, k = flat.shape
    width = group or kp
    block = min(1 << (width - 1).bit_length(), 1024)
    quantize_rows[(m, scales.shape[0])](
        codes, scales, None if symmetric else zeros, flat, scale, zero, m, k, width, flat.stride(0), kp,
        KIND=kind, SYMMETRIC=symmetric, DIVISOR=divisor, LOWEST=lowest, BOUND=bound, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return codes, scales, zeros


def _quantize_fake(
    x: Tensor, scale: Tensor | None, zero: Tensor | None, kp: int, group: int, kind: str, symmetric: bool, divisor: float,
    lowest: float, bound: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    m = x.numel() // x.shape[-1]
    dtype = torch.int8 if kind == "int8" else _FP8[kind == "fnuz"]
    codes = torch.empty((m, kp), dtype=dtype, device=x.device)
    scales = torch.empty((kp // group if group else 1, m), dtype=torch.float32, device=x.device)
    return codes, scales, torch.empty(0 if symmetric else m, dtype=torch.float32, device=x.device)


def _scaled(
    q: Tensor, q_scales: Tensor, q_zeros: Tensor | None, codes: Tensor, scales: Tensor, sums: Tensor | None, bias: Tensor | None,
    n: int, group: int, rows: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    y = _scaled_fake(q, q_scales, q_zeros, codes, scales, sums, bias, n, group, rows, dtype)
    if not y.numel():
        return y
    import triton.language as tl

    from .triton_scaled_kernels import scaled_gemm
    from .triton_weight_only_kernels import sum_splits

    m, k = q.shape
    target = target_of(q)
    tile = tile_for(FAMILY, "sm_80" if target.arch == INTERPRETED else target.arch, 8, m, n, k)
    assert tile is not None, f"no tile for {m} tokens on {target.arch}"
    sizes = tile.arguments()
    if group:
        sizes["BK"] = min(sizes["BK"], group)
    grid = (-(-n // tile["BN"]), -(-m // tile["BM"]))
    splits = tile.splits or splits_of(k // sizes["BK"], grid[0] * grid[1], target.processors)
    parts = y if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=q.device)
    scaled_gemm[(*grid, splits)](
        parts, q, q_scales, q_zeros, codes, scales, sums, bias, m, n, k, splits,
        ACC=tl.int32 if codes.dtype == torch.int8 else tl.float32, GROUP=group, ROWS=rows if group else 1, SPLIT=splits > 1, **sizes,
    )  # fmt: skip
    if splits > 1:
        sum_splits[(-(-m * n // 1024),)](y, parts, bias, m * n, n, splits, BLOCK=1024, num_warps=4)
    return y


def _scaled_fake(
    q: Tensor, q_scales: Tensor, q_zeros: Tensor | None, codes: Tensor, scales: Tensor, sums: Tensor | None, bias: Tensor | None,
    n: int, group: int, rows: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return torch.empty((q.shape[0], n), dtype=dtype, device=q.device)


quantize = operation(
    "triton_quantize(Tensor x, Tensor? scale, Tensor? zero, int kp, int group, str kind, bool symmetric, float divisor, float lowest, "
    "float bound) -> (Tensor, Tensor, Tensor)",
    _quantize,
    _quantize_fake,
)
scaled = operation(
    "triton_scaled(Tensor q, Tensor q_scales, Tensor? q_zeros, Tensor codes, Tensor scales, Tensor? sums, Tensor? bias, int n, int group, "
    "int rows, ScalarType dtype) -> Tensor",
    _scaled,
    _scaled_fake,
)
