"""What the compile matrix compiles of the 8-bit kernels: every tile of an architecture with every branch of the product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .triton_experts_cases import grouped
from .triton_launch import DTYPES, CompileCase
from .triton_scaled import FAMILY
from .triton_tables import tiles

MODULE = "qplug_core.kernels.triton_scaled_kernels"
VARIANTS = {
    "int8": (("W8A8_a:asym", "bfloat16", 0), ("W8A8", "float16", 0)),
    "fp8_e4m3": (("Wfp8Afp8_b128x128", "bfloat16", 128), ("Wfp8Afp8", "bfloat16", 0), ("Wfp8Afp8_b64x32", "float16", 32)),
}
"""Scheme, activation dtype and group of scales along K; the first stands for the type in the CI subset."""
_NAMES = ("x_scales", "x_zeros", "w_scales", "sums")


def cases(number: str, arch: str, subset: str) -> list[CompileCase]:
    """Compile cases of one number type."""
    codes = "*i8" if number == "int8" else "*fp8e4b8" if arch == "gfx942" else "*fp8e4nv"
    kind = "int8" if number == "int8" else "fnuz" if arch == "gfx942" else "fp8"
    found: dict[str, CompileCase] = {}
    for text, dtype, group in VARIANTS[number][: 1 if subset == "ci" else None]:
        products = list(_products(text, dtype, group, codes, arch))
        for case in [*products, *grouped(products, DTYPES[dtype], subset), *quantizers(text, dtype, group, codes, kind)]:
            found.setdefault(case.name, case)
    return list(found.values())


def _products(text: str, dtype: str, group: int, codes: str, arch: str) -> Iterator[CompileCase]:
    import triton.language as tl

    integers = codes == "*i8"
    floats = dict.fromkeys(("x_scales", "w_scales", *(("x_zeros",) if text.endswith("asym") else ())), "*fp32")
    types = floats | ({"sums": "*i32"} if text.endswith("asym") else {})
    absent: dict[str, Any] = {name: None for name in _NAMES if name not in types}
    for place, tile in enumerate(tiles(FAMILY, arch, 8)):
        # The end of the kernel, partial sums or results, alternates: few tokens are split, many are not.
        split = place % 2 == (1 if group == 128 else 0)
        sizes = dict(tile.sizes)
        sizes["BK"] = min(sizes["BK"], group or sizes["BK"])
        constants = {
            "ACC": tl.int32 if integers else tl.float32, "GROUP": group, "ROWS": int(text.partition("_b")[2].partition("x")[0]) if group else 1,
            "SPLIT": split, **sizes, **absent,
        }  # fmt: skip
        pointers = {"y": "*fp32" if split else DTYPES[dtype], "x": codes, "w": codes, "bias": DTYPES[dtype], **types}
        shape = "x".join(str(value) for value in sizes.values())
        yield CompileCase(
            f"scaled {text} {dtype} {shape}{' split' if split else ''}", f"{MODULE}:scaled_gemm", pointers, constants,
            dict(tile.options), "i8" if integers else "fp8", unaligned=("m", "splits", "scale_stride"),
        )  # fmt: skip


def quantizers(text: str, dtype: str, group: int, codes: str, kind: str) -> Iterator[CompileCase]:
    """Of activations of the scheme ``text``, given as ``dtype``: with computed and with stored scales."""
    symmetric = not text.endswith("asym")
    for static in (False, True):
        stored = {"scale": "*fp32", "zero": "*fp32"} if static else {}
        if symmetric:
            stored.pop("zero", None)
        types = {"codes": codes, "scales": "*fp32", "zeros": "*fp32", "x": DTYPES[dtype], **stored}
        absent: dict[str, Any] = {name: None for name in ("scale", "zero") if name not in stored}
        if symmetric:
            types.pop("zeros")
            absent["zeros"] = None
        constants = {
            "KIND": kind, "SYMMETRIC": symmetric, "DIVISOR": (127.0 if symmetric else 255.0) if kind == "int8" else 448.0,
            "LOWEST": -127.0 if symmetric else -128.0, "BOUND": 0.0, "BLOCK": min(group or 1024, 1024), **absent,
        }  # fmt: skip
        yield CompileCase(
            f"quantize {text} {dtype}{' static' if static else ''}", f"{MODULE}:quantize_rows", types, constants, {"num_warps": 4},
            unaligned=("m", "k", "stored_stride"),
        )  # fmt: skip
