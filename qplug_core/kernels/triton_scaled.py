"""8-bit weights times 8-bit activations on GPUs, in Triton: packing, and the operation ``qplug::triton_scaled``.

INT8 with scales by tensor or channel, FP8 e4m3 the same way, and by block (weights ``bn x bk``, activations by groups of bk); activations
as in ``triton_activations.py``. Integer sums are exact in int32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import Device
from ..kernel import Kernel, PackedWeight, Problem
from ..scheme import TensorQuant
from ..support import Refusal
from ..weight import OpaqueWeight, QuantWeight
from . import triton_experts, triton_sparse
from .triton_activations import FP8, describe, halved, needs_fnuz, quantized, refusals_of
from .triton_launch import CompileCase, operation, refusals, target_of, tile_of
from .triton_tables import splits_of

FAMILY = "scaled"
DEPTH = 128
"""Columns are padded to a multiple of this."""
LARGEST_K = 65536
"""Columns up to which the sum of products of 8-bit codes, with a zero point, fits int32."""
NUMBERS = {"int8": "INT8", "fp8_e4m3": "FP8 e4m3"}


class TritonScaled(Kernel):
    """W8A8 of one number type, ``number``: ``int8`` or ``fp8_e4m3``. Subclasses say which, and their name."""

    number: str
    grouped = True
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
        if scheme.act_order:
            found.append(Refusal("act_order", f"scheme {scheme}", "columns in order"))
        if scheme.sparsity and act is not None and act.block[1]:
            found.append(Refusal("scheme", f"{scheme.sparsity} sparsity with scales by block", "dense weights"))
        if problem.shift:
            found.append(Refusal("zeros", "a shift in units of the weight", "weights without one"))
        if problem.k > LARGEST_K:
            found.append(Refusal("shape", f"K = {problem.k}", f"at most {LARGEST_K} columns, so that sums fit int32"))
        return found

    def _granularity(self, weight: TensorQuant, act: TensorQuant, problem: Problem) -> list[Refusal]:
        found = refusals_of(act, str(problem.scheme))
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

        return [*cases(self.number, arch, subset), *triton_sparse.cases(self.number, arch, subset)]

    def pack(self, weight: QuantWeight | OpaqueWeight, out: PackedWeight | None = None) -> PackedWeight:
        """See :func:`pack`, and for 2:4 sparse weights :func:`.triton_sparse.pack`."""
        assert isinstance(weight, QuantWeight)
        fnuz = needs_fnuz(weight.codes) if self.fnuz is None else self.fnuz
        packed = (triton_sparse.pack if weight.scheme.sparsity else pack)(weight, self.name, fnuz)
        return packed if out is None else out.refill(packed)

    def apply(self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """``x [*, K]`` bfloat16 or float16 to ``[*, N]``; ``bias [N]`` of any float dtype."""
        t, meta = packed.tensors, packed.meta
        if "places" in t:
            return triton_sparse.product(x, packed, bias)
        q, q_scales, q_zeros = quantized(x, packed, t["codes"].shape[1])
        y: Tensor = scaled(
            q, q_scales, None if meta["symmetric"] else q_zeros, t["codes"], t["scales"], t.get("sums"), bias, packed.n,
            meta["act_group"], meta["rows"], x.dtype,
        )  # fmt: skip
        return y.view(*x.shape[:-1], packed.n)

    def apply_experts(self, x: Tensor, packed: PackedWeight, ends: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :meth:`qplug_core.kernel.Kernel.apply_experts`."""
        if "places" in packed.tensors:
            return triton_sparse.experts_product(x, packed, ends, bias)
        return triton_experts.scaled_product(x, packed, ends, bias)


def pack(weight: QuantWeight, name: str, fnuz: bool) -> PackedWeight:
    """A plain symmetric weight ``[N, K]``.

    ``codes`` int8 or FP8 ``[N, KP]``, KP a multiple of 128; ``scales`` float32 ``[N]``, or ``[G, N/bn]`` by block; ``sums`` int32 ``[N]``
    of rows, where activations have zero points; and what :func:`~.triton_activations.describe` says of activations.
    """
    act = weight.scheme.act
    assert act is not None
    integers = weight.codes.dtype == torch.int8
    group = act.block[1]
    codes = torch.nn.functional.pad(weight.codes.view(torch.int8), (0, -weight.k % DEPTH))
    scales = weight.scale_values() if group else weight.regroup(1, 0).scale_values()
    if fnuz:
        codes, scales = halved(codes, scales)
    if group:
        scales = torch.nn.functional.pad(scales, (0, codes.shape[1] // group - scales.shape[1]))
    tensors = {
        "codes": (codes if integers else codes.view(FP8[fnuz])).clone(),
        "scales": (scales.t() if group else scales.reshape(-1)).contiguous().clone(),
    }
    if not act.symmetric:
        tensors["sums"] = codes.sum(1, dtype=torch.int32)
    more, meta = describe(weight, fnuz)
    return PackedWeight(name, weight.n, weight.k, tensors | more, meta | {"rows": weight.block[0] or weight.n})


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
    tile = tile_of(FAMILY, target, "sm_80", 8, m, n, k)
    assert tile is not None, f"no tile for {m} tokens on {target.arch}"
    sizes = tile.arguments()
    if group:
        sizes["BK"] = min(sizes["BK"], group)
    grid = (-(-n // tile["BN"]), -(-m // tile["BM"]))
    splits = tile.splits or splits_of(k // sizes["BK"], grid[0] * grid[1], target.processors)
    parts = y if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=q.device)
    scaled_gemm[(*grid, splits)](
        parts, q, q_scales, q_zeros, codes, scales, sums, bias, m, n, k, splits, m,
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


scaled = operation(
    "triton_scaled(Tensor q, Tensor q_scales, Tensor? q_zeros, Tensor codes, Tensor scales, Tensor? sums, Tensor? bias, int n, int group, "
    "int rows, ScalarType dtype) -> Tensor",
    _scaled,
    _scaled_fake,
)
