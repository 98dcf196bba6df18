"""``int8.triton_wint2``: FastDeploy's WINT2, a convolutional code of 2 bits, times 16-bit activations on NVIDIA and AMD GPUs.

x ``[*, K]`` bfloat16 or float16; the stored bytes, a row of the weight in a row, decoded in registers by :mod:`qplug_int8.paddle.ccq`'s rule;
local scales of 64 columns multiply float32 sums. Linear layers, and all experts of a layer in one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qplug_core.device import Device
from qplug_core.kernel import Kernel, PackedWeight, Problem
from qplug_core.kernels.triton_experts import power_of, prepared, tile_of_experts
from qplug_core.kernels.triton_launch import DTYPES, CompileCase, operation, refusals, rows_of, target_of, tile_of
from qplug_core.kernels.triton_tables import splits_of, tiles
from qplug_core.support import Refusal
from qplug_core.weight import OpaqueWeight, QuantWeight

FAMILY = "weight_only"
"""Tiles are those of the other weight-only products."""
MOST = 128
"""Tokens that those tiles are for, at most; the largest takes more."""


class TritonWINT2(Kernel):
    """Product of WINT2 weights."""

    name = "int8.triton_wint2"
    grouped = True

    def supports(self, problem: Problem, device: Device) -> list[Refusal]:
        """Refuses all other encodings, float32, and what is no GPU."""
        found = refusals(device, problem.dtype)
        if problem.op not in ("linear", "experts"):
            found.append(Refusal("op", f"operation {problem.op}", "linear or experts"))
        if problem.encoding != "ccq2":
            have = f"encoding {problem.encoding}" if problem.encoding else f"scheme {problem.scheme}"
            found.append(Refusal("scheme", have, "WINT2 as it is stored"))
        elif problem.k % 128:
            found.append(Refusal("shape", f"K = {problem.k}", "a multiple of 128, as a byte of scales has"))
        return found

    def compile_cases(self, arch: str, subset: str) -> list[CompileCase]:
        """What the compile matrix compiles for ``arch``; ``subset`` is ``ci`` or ``all``."""
        types = {"codes": "*u8", "local": "*u8", **dict.fromkeys(("row", "slope", "offset"), "*fp32")}
        found = []
        for dtype in ("bfloat16",) if subset == "ci" else DTYPES:
            for place, tile in enumerate(tiles(FAMILY, arch, 2)[: 1 if subset == "ci" else None]):
                for experts in (False, True):
                    split = not experts and place % 2 == 0
                    pointer = DTYPES[dtype]
                    io = {"y": "*fp32" if split else pointer, "x": pointer, "bias": pointer, "ends": "*i64", **types}
                    constants = {**dict(tile.sizes), "SPLIT": split, "E": 128, **({} if experts else {"ends": None})}
                    found.append(
                        CompileCase(
                            f"{'experts ' if experts else ''}wint2 {dtype} {tile['BN']}x{tile['BM']}{' split' if split else ''}",
                            "qplug_int8.kernels.triton_wint2_kernels:wint2_gemm", io, constants,
                            {**dict(tile.options), "enable_fp_fusion": False}, {"float16": "f16", "bfloat16": "bf16"}[dtype],
                            unaligned=("m", "count", "splits"),
                        )
                    )  # fmt: skip
        return found

    def pack(self, weight: QuantWeight | OpaqueWeight, out: PackedWeight | None = None) -> PackedWeight:
        """``codes`` uint8 ``[N, K/4]``, ``local`` uint8 ``[K/128, N]``, and float32 ``[N]``: ``row``, ``slope`` and ``offset``."""
        assert isinstance(weight, OpaqueWeight)
        stored = weight.stored
        tensors = {
            "codes": stored["quant_weight"].view(torch.uint8).t().contiguous(),
            "local": stored["weight_scale"].view(torch.uint8).contiguous().clone(),
        }
        for name, held in (("row", "super_scales"), ("slope", "code_scale"), ("offset", "code_zp")):
            tensors[name] = stored[held].float().reshape(-1).clone()
        for field in ("pre_scale", "act_shift"):
            if (value := getattr(weight, field)) is not None:
                tensors[field] = value.clone()
        packed = PackedWeight(self.name, weight.n, weight.k, tensors)
        return packed if out is None else out.refill(packed)

    def apply(self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """``x [*, K]`` bfloat16 or float16 to ``[*, N]``; ``bias [N]`` of any float dtype."""
        t = packed.tensors
        if "act_shift" in t:
            x = x - t["act_shift"].to(x.dtype)
        if "pre_scale" in t:
            x = x * t["pre_scale"].to(x.dtype)
        y: Tensor = wint2(_by_value(x), t["codes"], t["local"], t["row"], t["slope"], t["offset"], bias, None, packed.n)
        return y.view(*x.shape[:-1], packed.n)

    def apply_experts(self, x: Tensor, packed: PackedWeight, ends: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :meth:`qplug_core.kernel.Kernel.apply_experts`."""
        t = packed.tensors
        x = _by_value(prepared(x, packed, ends))
        y: Tensor = wint2(x, t["codes"], t["local"], t["row"], t["slope"], t["offset"], bias, ends, packed.n)
        return y


def _by_value(x: Tensor) -> Tensor:
    """``x [*, K]`` as ``[M, K]``, of each 64 columns those of the first value of a byte first: a load of the kernel finds neighbours."""
    flat = rows_of(x)
    return flat.view(flat.shape[0], flat.shape[1] // 64, 16, 4).transpose(2, 3).reshape(flat.shape)


def _run(
    x: Tensor, codes: Tensor, local: Tensor, row: Tensor, slope: Tensor, offset: Tensor, bias: Tensor | None, ends: Tensor | None, n: int
) -> Tensor:  # fmt: skip
    y = x.new_zeros((x.shape[0], n))
    if not y.numel():
        return y
    from qplug_core.kernels.triton_weight_only_kernels import sum_splits

    from .triton_wint2_kernels import wint2_gemm

    (m, k), target, splits, count = x.shape, target_of(x), 1, 1
    if ends is None:
        tile = tile_of(FAMILY, target, "sm_80", 2, min(m, MOST), n, k)
        assert tile is not None, f"no tile for {m} tokens on {target.arch}"
        grid = (-(-n // tile["BN"]), -(-m // tile["BM"]))
        splits = tile.splits or splits_of(k // 64, grid[0] * grid[1], target.processors)
    else:
        count = len(ends)
        tile, grid = tile_of_experts(FAMILY, x, 2, count, n)
    parts = y if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=x.device)
    wint2_gemm[(*grid, splits)](
        parts, x, codes, local, row, slope, offset, bias, ends, m, n, k, count, splits, x.stride(0), SPLIT=splits > 1,
        E=power_of(count), enable_fp_fusion=False, **tile.arguments(),
    )  # fmt: skip
    if splits > 1:
        sum_splits[(-(-m * n // 1024),)](y, parts, bias, m * n, n, splits, BLOCK=1024, num_warps=4)
    return y


def _fake(
    x: Tensor, codes: Tensor, local: Tensor, row: Tensor, slope: Tensor, offset: Tensor, bias: Tensor | None, ends: Tensor | None, n: int
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], n))


wint2 = operation(
    "triton_wint2(Tensor x, Tensor codes, Tensor local, Tensor row, Tensor slope, Tensor offset, Tensor? bias, Tensor? ends, int n) -> Tensor",
    _run,
    _fake,
)
