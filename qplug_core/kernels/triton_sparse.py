"""2:4 sparse INT8 and FP8 weights times 8-bit activations on GPUs, in Triton: packing, and the operation ``qplug::triton_sparse``.

Two of every four columns are kept, at 5 bits for each column: their bytes, and two places of 2 bits. The product is a dense one, so it saves
memory and its bandwidth, never arithmetic. A unit is 256 columns in two halves; of a half the values on the left of each four come first,
then those on the right, 32 each; byte i of the places holds those of fours i of both halves, the first half in the low bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import SchemeError
from ..kernel import PackedWeight
from ..weight import QuantWeight
from .triton_activations import describe, halved, quantized
from .triton_experts import power_of, quantized_experts, tile_of_experts
from .triton_launch import DTYPES, CompileCase, operation, target_of, tile_of
from .triton_tables import splits_of, tiles

FAMILY = "sparse"
UNIT = 256
VARIANTS = (("bfloat16", False, False), ("bfloat16", False, True), ("float16", True, False))
"""What is compiled: dtype of results, whether activations have zero points, whether for experts. The first stands for all in the CI subset."""


def product(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """``x [*, K]`` to ``[*, N]``."""
    q, q_scales, q_zeros = quantized(x, packed, packed.tensors["places"].shape[-2] * UNIT)
    return _multiply(q, q_scales, q_zeros, packed, bias, None, x.dtype).view(*x.shape[:-1], packed.n)


def experts_product(x: Tensor, packed: PackedWeight, ends: Tensor, bias: Tensor | None) -> Tensor:
    """``x [T, K]`` sorted by expert to ``[T, N]``; see :meth:`qplug_core.kernel.Kernel.apply_experts`."""
    q, q_scales, q_zeros = quantized_experts(x, packed, ends, packed.tensors["places"].shape[-2] * UNIT)
    return _multiply(q, q_scales, q_zeros, packed, bias, ends, x.dtype)


def _multiply(
    q: Tensor,
    q_scales: Tensor,
    q_zeros: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    ends: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    t = packed.tensors
    # Of each half first the columns that are first in their four, then the second ones: a load of the kernel finds neighbours.
    q = q.view(torch.uint8).view(q.shape[0], q.shape[1] // UNIT, 2, 32, 4).transpose(3, 4).reshape(q.shape).view(q.dtype)
    zeros = None if packed.meta["symmetric"] else q_zeros
    y: Tensor = sparse(q, q_scales, zeros, t["values"], t["places"], t["scales"], t.get("sums"), bias, ends, packed.n, dtype)
    return y


def pack(weight: QuantWeight, name: str, fnuz: bool) -> PackedWeight:
    """A plain symmetric weight ``[N, K]`` of which two of every four columns at most are not zero.

    ``values`` uint8 ``[N, units, 128]`` and ``places`` uint8 ``[N, units, 32]`` as in the head of this file; ``scales`` float32 ``[N]``; ``sums``
    int32 ``[N]`` of rows, where activations have zero points; and what :func:`.triton_activations.describe` says.

    :raises SchemeError: where three of four columns are not zero.
    """
    act = weight.scheme.act
    assert act is not None
    codes = torch.nn.functional.pad(weight.codes.view(torch.int8), (0, -weight.k % UNIT))
    scales = weight.regroup(1, 0).scale_values().reshape(-1)
    if fnuz:
        codes, scales = halved(codes, scales)
    fours = codes.view(weight.n, -1, 2, 32, 4)
    # Minus zero of FP8 is a zero, too.
    kept = fours != 0 if act.dtype == "int8" else (fours & 0x7F) != 0
    if bool((kept.sum(-1) > 2).any()):
        raise SchemeError(
            f"three of four neighbouring columns are not zero in a weight of scheme {weight.scheme}, which keeps two; the file is damaged or "
            "its config wrong, so fetch it again"
        )
    places = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
    values = fours.gather(-1, places).movedim(-1, -2)
    nibbles = (places[..., 0] | (places[..., 1] << 2)).to(torch.uint8)
    more, meta = describe(weight, fnuz)
    tensors = {
        "values": values.reshape(weight.n, -1, UNIT // 2).contiguous().view(torch.uint8),
        "places": (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).contiguous(),
        "scales": scales.contiguous().clone(),
    }
    if not act.symmetric:
        tensors["sums"] = codes.sum(1, dtype=torch.int32)
    return PackedWeight(name, weight.n, weight.k, tensors | more, meta)


def cases(number: str, arch: str, subset: str) -> Iterator[CompileCase]:
    """Compile cases of one number type."""
    fnuz = number == "fp8_e4m3" and arch == "gfx942"
    codes = "*i8" if number == "int8" else "*fp8e4b8" if fnuz else "*fp8e4nv"
    for place, tile in enumerate(tiles(FAMILY, arch, 8)[: 1 if subset == "ci" else None]):
        for dtype, asym, experts in VARIANTS[: 1 if subset == "ci" else None]:
            if asym and number != "int8":
                continue
            split = place % 2 == 0 and not experts
            pointer = DTYPES[dtype]
            io = {
                "y": "*fp32" if split else pointer,
                "x": codes,
                "bias": pointer,
                "values": "*u8",
                "places": "*u8",
                "ends": "*i64",
            }
            io |= dict.fromkeys(("x_scales", "w_scales", *(("x_zeros",) if asym else ())), "*fp32") | (
                {"sums": "*i32"} if asym else {}
            )
            absent = ({} if asym else {"x_zeros": None, "sums": None}) | ({} if experts else {"ends": None})
            words = f"sparse {number}{' asym' if asym else ''} {dtype} {tile['BN']}x{tile['BM']}{' split' if split else ''}"
            yield CompileCase(
                f"experts {words}" if experts else words, "qplug_core.kernels.triton_sparse_kernels:sparse_gemm", io,
                {**dict(tile.sizes), "SPLIT": split, "E": 128, **absent}, dict(tile.options), "i8" if number == "int8" else "fp8",
                unaligned=("m", "count", "units", "splits"),
            )  # fmt: skip


def _run(
    q: Tensor, q_scales: Tensor, q_zeros: Tensor | None, values: Tensor, places: Tensor, scales: Tensor, sums: Tensor | None,
    bias: Tensor | None, ends: Tensor | None, n: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    m, units, splits, count = q.shape[0], places.shape[-2], 1, 1
    y = torch.zeros((m, n), dtype=dtype, device=q.device)
    if not y.numel():
        return y
    from .triton_sparse_kernels import sparse_gemm
    from .triton_weight_only_kernels import sum_splits

    target = target_of(q)
    if ends is None:
        tile = tile_of(FAMILY, target, "sm_89", 8, m, n, q.shape[1])
        assert tile is not None, f"no tile for {m} tokens on {target.arch}"
        grid = (-(-n // tile["BN"]), -(-m // tile["BM"]))
        splits = tile.splits or splits_of(units, grid[0] * grid[1], target.processors)
    else:
        count = len(ends)
        tile, grid = tile_of_experts(FAMILY, q, 8, count, n)
    parts = y if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=q.device)
    sparse_gemm[(*grid, splits)](
        parts, q, q_scales, q_zeros, values, places, scales, sums, bias, ends, m, n, units, count, splits, SPLIT=splits > 1,
        E=power_of(count), **tile.arguments(),
    )  # fmt: skip
    if splits > 1:
        sum_splits[(-(-m * n // 1024),)](y, parts, bias, m * n, n, splits, BLOCK=1024, num_warps=4)
    return y


def _fake(
    q: Tensor, q_scales: Tensor, q_zeros: Tensor | None, values: Tensor, places: Tensor, scales: Tensor, sums: Tensor | None,
    bias: Tensor | None, ends: Tensor | None, n: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return torch.empty((q.shape[0], n), dtype=dtype, device=q.device)


sparse = operation(
    "triton_sparse(Tensor q, Tensor q_scales, Tensor? q_zeros, Tensor values, Tensor places, Tensor scales, Tensor? sums, Tensor? bias, "
    "Tensor? ends, int n, ScalarType dtype) -> Tensor",
    _run,
    _fake,
)
