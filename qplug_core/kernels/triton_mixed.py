"""Weights of 2, 4 or 8 bits by group times 8-bit activations on GPUs, in Triton: packing, and the operation ``qplug::triton_mixed``.

W4A8 and its like: integers with zero points of any value times INT8 (sums exact in int32) or FP8 codes, and FP4 e2m1 times FP8. A weight
becomes the 8-bit number of its value in registers, so the matrix unit for 8 bits multiplies it. Activations as in ``triton_activations.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import Device
from ..kernel import Kernel, PackedWeight, Problem
from ..support import Refusal
from ..weight import OpaqueWeight, QuantWeight
from . import triton_experts
from .triton_activations import describe, needs_fnuz, quantized, refusals_of
from .triton_launch import CompileCase, operation, refusals, target_of, tile_of
from .triton_pack import PARTS
from .triton_scaled import LARGEST_K, NUMBERS
from .triton_tables import splits_of
from .triton_weight_only import pack as pack_weight

FAMILY = "mixed"
DEPTH = 32
"""Columns of a part, at least: the depth of the smallest matrix instruction for 8 bits."""
WHOLE = {"int8": (-128, 127), "fp8_e4m3": (-16, 16)}
"""Integers from the first to the last that the type of the activations holds exactly."""


class TritonMixed(Kernel):
    """Narrow weights of the number types in ``numbers``, activations of the type ``act``. Subclasses say which, and their name."""

    numbers: tuple[str, ...]
    act: str
    grouped = True
    fnuz: bool | None = None
    """Whether FP8 codes are held as e4m3fnuz; None: where the device needs it."""

    def supports(self, problem: Problem, device: Device) -> list[Refusal]:
        """Refuses other number types, activations by group or with zero points, float32, and devices without the matrix unit."""
        found = refusals(device, problem.dtype)
        weight, act, scheme = problem.scheme.weight, problem.scheme.act, problem.scheme
        if ("fp8" if self.act == "fp8_e4m3" else "int8") not in device.features:
            need = f"a GPU that multiplies {NUMBERS[self.act]}"
            found.append(Refusal("device", str(device), need, "weight-only kernels run everywhere"))
        if problem.op not in ("linear", "experts", "lm_head"):
            found.append(Refusal("op", f"operation {problem.op}", "linear, experts or lm_head"))
        if weight is None or problem.encoding or weight.dtype not in self.numbers:
            found.append(Refusal("scheme", f"scheme {scheme}", f"weights of {' or '.join(self.numbers)}"))
        if act is None or act.dtype != self.act:
            found.append(
                Refusal("scheme", f"activations of {act.dtype if act else '16 bit'}", f"{NUMBERS[self.act]} activations")
            )
        else:
            found += refusals_of(act, str(scheme))
            if act.block[1]:
                found.append(Refusal("group", f"activation groups of {act.block[1]}", "one scale for each token, or fewer"))
            if not act.symmetric:
                found.append(Refusal("zeros", "activations with zero points", "symmetric activations"))
        if scheme.sparsity:
            found.append(Refusal("scheme", f"{scheme.sparsity} sparsity", "dense weights"))
        if problem.shift:
            found.append(Refusal("zeros", "a shift in units of the weight", "zero points in units of codes"))
        if problem.k > LARGEST_K:
            found.append(Refusal("shape", f"K = {problem.k}", f"at most {LARGEST_K} columns, so that sums fit int32"))
        return found

    def compile_cases(self, arch: str, subset: str) -> list[CompileCase]:
        """What the compile matrix compiles for ``arch``; ``subset`` is ``ci`` or ``all``."""
        from .triton_mixed_cases import cases

        return cases(self.numbers, self.act, arch, subset)

    def pack(self, weight: QuantWeight | OpaqueWeight, out: PackedWeight | None = None) -> PackedWeight:
        """See :func:`pack`."""
        assert isinstance(weight, QuantWeight)
        packed = pack(weight, self.name, needs_fnuz(weight.codes) if self.fnuz is None else self.fnuz)
        return packed if out is None else out.refill(packed)

    def apply(self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """``x [*, K]`` bfloat16 or float16 to ``[*, N]``; ``bias [N]`` of any float dtype."""
        t, meta = packed.tensors, packed.meta
        q, q_scales, _ = quantized(x, packed, t["codes"].shape[1] * 8 // meta["bits"])
        y: Tensor = mixed(
            q, q_scales, t["codes"], t.get("scales"), t.get("zeros"), t.get("row"), bias, packed.n, meta["kind"], meta["bits"],
            meta["offset"], meta["scale"], meta["group"], meta["rows"], meta["part"], x.dtype,
        )  # fmt: skip
        return y.view(*x.shape[:-1], packed.n)

    def apply_experts(self, x: Tensor, packed: PackedWeight, ends: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :meth:`qplug_core.kernel.Kernel.apply_experts`."""
        return triton_experts.mixed_product(x, packed, ends, bias)


def pack(weight: QuantWeight, name: str, fnuz: bool) -> PackedWeight:
    """A plain weight ``[N, K]`` as :func:`.triton_weight_only.pack` lays it out, and what :func:`.triton_activations.describe` says.

    ``kind`` is ``int`` where every code less its zero point is an 8-bit number, otherwise ``real``: zero points meet the sums of x.
    """
    act = weight.scheme.act
    assert act is not None
    packed = pack_weight(weight, name, DEPTH)
    if (zeros := packed.tensors.get("zeros")) is not None and packed.meta["kind"] == "int":
        low, high = WHOLE[act.dtype]
        top = (1 << packed.meta["bits"]) - 1
        if bool((zeros > -low).any()) or bool((zeros < top - high).any()):
            packed.meta["kind"] = "real"
    tensors, meta = describe(weight, fnuz)
    packed.tensors |= tensors
    packed.meta |= meta
    return packed


def _run(
    q: Tensor, q_scales: Tensor, codes: Tensor, scales: Tensor | None, zeros: Tensor | None, row: Tensor | None, bias: Tensor | None,
    n: int, kind: str, bits: int, offset: int, scale: str, group: int, rows: int, part: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    m = q.shape[0]
    y = q.new_empty((m, n), dtype=dtype)
    if not y.numel():
        return y
    from .triton_mixed_kernels import mixed_gemm
    from .triton_weight_only_kernels import sum_splits

    target = target_of(q)
    tile = tile_of(FAMILY, target, "sm_89", bits, m, n, q.shape[1])
    assert tile is not None, f"no tile for {m} tokens on {target.arch}"
    units = q.shape[1] // (part * PARTS[bits])
    grid = (-(-n // tile["BN"]), -(-m // tile["BM"]))
    splits = tile.splits or splits_of(units, grid[0] * grid[1], target.processors)
    parts = y if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=q.device)
    mixed_gemm[(*grid, splits)](
        parts, q, q_scales, codes, scales, zeros, row, bias, m, n, units, splits, q.stride(0), codes.stride(0),
        KIND=kind, BITS=bits, OFFSET=float(offset), SCALE=scale, GROUP=group, ROWS=rows, S=part, SPLIT=splits > 1, **tile.arguments(),
    )  # fmt: skip
    if splits > 1:
        sum_splits[(-(-m * n // 1024),)](y, parts, bias, m * n, n, splits, BLOCK=1024, num_warps=4)
    return y


def _fake(
    q: Tensor, q_scales: Tensor, codes: Tensor, scales: Tensor | None, zeros: Tensor | None, row: Tensor | None, bias: Tensor | None,
    n: int, kind: str, bits: int, offset: int, scale: str, group: int, rows: int, part: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return q.new_empty((q.shape[0], n), dtype=dtype)


mixed = operation(
    "triton_mixed(Tensor q, Tensor q_scales, Tensor codes, Tensor? scales, Tensor? zeros, Tensor? row, Tensor? bias, int n, str kind, "
    "int bits, int offset, str scale, int group, int rows, int part, ScalarType dtype) -> Tensor",
    _run,
    _fake,
)
