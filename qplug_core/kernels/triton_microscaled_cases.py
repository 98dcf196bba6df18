"""What the compile matrix compiles of microscaled products: every tile of an architecture with every pair of types, and the quantizers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .triton_experts_cases import grouped
from .triton_launch import DTYPES, CompileCase
from .triton_microscaled import FAMILY, GROUPS, RULES, widened
from .triton_tables import tiles

MODULE = "qplug_core.kernels.triton_microscaled_kernels"
PAIRS = {"e4m3": (("e2m1", "e2m1"),), "e8m0": (("e2m1", "e2m1"), ("e2m1", "e4m3"), ("e4m3", "e4m3"))}
"""Types of weights and activations by the type of their scales; the first stands for them in the CI subset."""
_CODES = {"e2m1": "*u8", "e4m3": "*fp8e4nv"}
_SCALES = {"e4m3": "*fp8e4nv", "e8m0": "*u8"}


def cases(scale: str, arch: str, subset: str) -> list[CompileCase]:
    """Compile cases of one type of scales. Activations are bfloat16, and of every second tile float16."""
    found: dict[str, CompileCase] = {}
    for kind, act in PAIRS[scale][: 1 if subset == "ci" else None]:
        made = list(_products(scale, kind, act, arch))
        for case in [*made, *grouped(made, "*bf16", subset, MODULE), *_quantizers(scale, act, subset)]:
            found.setdefault(case.name, case)
    return list(found.values())


def _products(scale: str, kind: str, act: str, arch: str) -> Iterator[CompileCase]:
    matrix = "nvf4" if scale == "e4m3" else "mxf4" if (kind, act) == ("e2m1", "e2m1") else "mxf8"
    for place, tile in enumerate(tiles(FAMILY, arch, 4 if act == "e2m1" else 8)):
        split = place % 2 == 0
        dtype = ("bfloat16", "float16")[place % 2]
        types = {
            "y": "*fp32" if split else DTYPES[dtype], "x": _CODES[act], "x_scales": _SCALES[scale], "codes": _CODES[kind],
            "scales": _SCALES[scale], "bias": DTYPES[dtype],
        }  # fmt: skip
        constants: dict[str, Any] = {
            "G": GROUPS[scale], "X": act, "W": kind, "WIDEN": widened(act, kind, arch), "SPLIT": split, **dict(tile.sizes),
        }  # fmt: skip
        if scale == "e4m3":
            types["row"] = "*fp32"
        else:
            constants["row"] = None
        sizes = "x".join(str(value) for _, value in tile.sizes)
        yield CompileCase(
            f"microscaled {scale} {kind} {act} {dtype} {sizes}{' split' if split else ''}", f"{MODULE}:microscaled_gemm", types,
            constants, dict(tile.options), matrix, unaligned=("m", "splits"),
        )  # fmt: skip


def _quantizers(scale: str, act: str, subset: str) -> Iterator[CompileCase]:
    """Of activations, by every rule, the input of one dtype or the other."""
    rules = RULES[1 : 2 if subset == "ci" else None] if scale == "e8m0" else ("",)
    for place, rule in enumerate(rules):
        for divide in (False, True) if scale == "e4m3" else (False,):
            dtype = ("bfloat16", "float16")[(place + divide) % 2]
            types = {"codes": _CODES[act], "scales": _SCALES[scale], "x": DTYPES[dtype]}
            constants: dict[str, Any] = {
                "G": GROUPS[scale],
                "FP4": act == "e2m1",
                "RULE": rule,
                "DIVIDE": divide,
                "BLOCK": 1024,
            }
            if scale == "e4m3":
                types["outer"] = "*fp32"
            else:
                constants["outer"] = None
            yield CompileCase(
                f"microscale {scale} {act} {dtype} {rule}{' divide' if divide else ''}", f"{MODULE}:microscale_rows", types, constants,
                {"num_warps": 4}, unaligned=("k", "outer_stride"),
            )  # fmt: skip
