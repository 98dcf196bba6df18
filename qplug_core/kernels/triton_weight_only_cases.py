"""What the compile matrix compiles of the weight-only kernels: every tile of an architecture with schemes that together take every branch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..scheme import QuantScheme
from ..testing.weights import random_weight
from .triton_experts_cases import grouped
from .triton_launch import DTYPES, POINTERS, CompileCase
from .triton_tables import tiles
from .triton_weight_only import FAMILY, pack

MODULE = "qplug_core.kernels.triton_weight_only_kernels"
VARIANTS: dict[str, tuple[tuple[str, str], ...]] = {
    "int4": (("W4A16_g128_asym", "float16"), ("W4A16_g32_actorder", "bfloat16"), ("W4A16_channel", "bfloat16")),
    "int8": (("W8A16", "bfloat16"), ("W8A16_g128_asym", "float16")),
    "int2": (("W2A16_g64_asym", "bfloat16"), ("W2A16_g128", "float16")),
    "int3": (("W3A16_g128", "bfloat16"), ("W3A16_g32_asym_actorder", "float16")),
    "fp8_e4m3": (("Wfp8A16_b128x128", "bfloat16"), ("Wfp8A16", "float16")),
    "fp8_e5m2": (("Wfp8e5m2A16", "bfloat16"),),
    "fp4_e2m1": (("Wnvfp4A16", "bfloat16"), ("Wmxfp4A16", "bfloat16"), ("Wmxfp4A16", "float16")),
    "nf4": (("WNF4A16", "bfloat16"),),
    "fp4_bnb": (("WNF4A16", "bfloat16"),),
    "iq4nl": (("Wiq4nlA16", "bfloat16"),),
}
"""Schemes and activation dtypes by number type; the first stands for the type in the CI subset. The codebooks share their binaries.
The end of the kernel, partial sums or results, alternates from tile to tile."""
_TENSORS = ("codes", "scales", "zeros", "row", "table", "order")


def cases(numbers: tuple[str, ...], arch: str, subset: str) -> list[CompileCase]:
    """Compile cases of the number types of one kernel."""
    found: dict[str, CompileCase] = {}
    for number in numbers:
        variants = VARIANTS[number][: 1 if subset == "ci" else None]
        made = list(_cases(number, arch, variants, subset))
        first = [case for case in made if variants[0][0] in case.name] if subset == "all" or number == "int4" else []
        for case in [*made, *grouped(first, DTYPES[variants[0][1]], subset)]:
            found.setdefault(case.name, case)
    return list(found.values())


def _cases(number: str, arch: str, variants: tuple[tuple[str, str], ...], subset: str) -> Iterator[CompileCase]:
    for index, (text, dtype) in enumerate(variants):
        scheme = QuantScheme.parse(text)
        assert scheme.weight is not None
        weight = random_weight(scheme, 256, 512, torch.Generator().manual_seed(0), scale_dtype=getattr(torch, dtype))
        packed = pack(weight, "")
        meta = packed.meta
        types = {name: POINTERS[t.dtype] for name in _TENSORS if (t := packed.tensors.get(name)) is not None}
        absent: dict[str, Any] = {name: None for name in _TENSORS if name not in types}
        layout = {
            "KIND": meta["kind"], "BITS": meta["bits"], "OFFSET": float(meta["offset"]), "SCALE": meta["scale"],
            "GROUP": meta["group"], "ROWS": meta["rows"], "S": meta["part"], **absent,
        }  # fmt: skip
        pointer = DTYPES[dtype]
        rows = tiles(FAMILY, arch, meta["bits"], meta["kind"])
        for place, tile in enumerate(rows):
            if subset == "ci" and 0 < place < len(rows) - 1:
                continue  # The smallest and the largest stand for it.
            split = (place + index) % 2 == 0
            io = {"y": "*fp32" if split else pointer, "x": pointer, "bias": pointer, **types}
            sizes = "x".join(str(value) for _, value in tile.sizes)
            yield CompileCase(
                f"weight_only {text} {dtype} {sizes}{' split' if split else ''}", f"{MODULE}:weight_only_gemm", io,
                {**layout, **dict(tile.sizes), "SPLIT": split}, dict(tile.options), {"float16": "f16", "bfloat16": "bf16"}[dtype],
                unaligned=("m", "units", "splits"),
            )  # fmt: skip
        yield CompileCase(
            f"dequantize {text} {dtype}", f"{MODULE}:weight_only_dequantize", {"w": pointer, **types}, {**layout, "BN": 64},
            {"num_warps": 4}, unaligned=("start", "stop"),
        )  # fmt: skip
        yield CompileCase(
            f"sum_splits {dtype}", f"{MODULE}:sum_splits", {"y": pointer, "parts": "*fp32", "bias": pointer}, {"BLOCK": 1024},
            {"num_warps": 4}, unaligned=("total", "splits"),
        )  # fmt: skip
