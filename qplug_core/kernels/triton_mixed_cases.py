"""What the compile matrix compiles of products of narrow weights and 8-bit activations: every tile of an architecture with every branch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..scheme import QuantScheme
from ..testing.weights import random_weight
from .triton_experts_cases import grouped
from .triton_launch import DTYPES, POINTERS, CompileCase
from .triton_mixed import FAMILY, pack
from .triton_scaled_cases import quantizers
from .triton_tables import tiles

MODULE = "qplug_core.kernels.triton_mixed_kernels"
VARIANTS: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {
    ("int4", "int8"): (("W4A8_g128", "bfloat16"), ("W4A8_g32_asym", "float16"), ("W4A8_channel", "bfloat16")),
    ("int4", "fp8_e4m3"): (("W4Afp8_g128", "bfloat16"), ("W4Afp8_g32_asym", "float16"), ("W4Afp8_channel", "bfloat16")),
    ("int2", "int8"): (("W2A8_g64", "bfloat16"),),
    ("int8", "int8"): (("W8A8_g128", "bfloat16"), ("W8A8_g32_asym", "float16")),
    ("fp4_e2m1", "fp8_e4m3"): (("Wmxfp4Afp8", "bfloat16"),),
}
"""Schemes and dtypes of results by the number types of weights and activations; the first stands for them in the CI subset. Zero points
that no 8-bit number holds, and the end of the kernel, alternate from tile to tile."""
_TENSORS = ("scales", "zeros", "row")


def cases(numbers: tuple[str, ...], act: str, arch: str, subset: str) -> list[CompileCase]:
    """Compile cases of the number types of one kernel."""
    found: dict[str, CompileCase] = {}
    few = 1 if subset == "ci" else None
    for number in numbers[:few]:
        for i, (text, dtype) in enumerate(VARIANTS[number, act][:few]):
            made = list(_cases(text, dtype, act, arch, subset, number))
            for case in [
                *made,
                *(grouped(made, DTYPES[dtype], subset) if i == 0 and (subset == "all" or number == "int4") else ()),
            ]:
                found.setdefault(case.name, case)
    return list(found.values())


def _cases(text: str, dtype: str, act: str, arch: str, subset: str, number: str) -> Iterator[CompileCase]:
    fnuz = act == "fp8_e4m3" and arch == "gfx942"
    codes = "*i8" if act == "int8" else "*fp8e4b8" if fnuz else "*fp8e4nv"
    weight = random_weight(QuantScheme.parse(text), 256, 512, torch.Generator().manual_seed(0), scale_dtype=torch.float16)
    packed = pack(weight, "", fnuz)
    meta = packed.meta
    types = {name: POINTERS[t.dtype] for name in _TENSORS if (t := packed.tensors.get(name)) is not None}
    absent: dict[str, Any] = {name: None for name in _TENSORS if name not in types}
    pointer = DTYPES[dtype]
    for place, tile in enumerate(tiles(FAMILY, arch, meta["bits"])[: 1 if subset == "ci" and number != "int4" else None]):
        split = place % 2 == 0
        real = "zeros" in types and place % 2 == 1
        layout = {
            "KIND": "real" if real else meta["kind"], "BITS": meta["bits"], "OFFSET": float(meta["offset"]), "SCALE": meta["scale"],
            "GROUP": meta["group"], "ROWS": meta["rows"], "S": meta["part"], "SPLIT": split, **dict(tile.sizes), **absent,
        }  # fmt: skip
        io = {"y": "*fp32" if split else pointer, "x": codes, "x_scales": "*fp32", "codes": "*u8", "bias": pointer, **types}
        sizes = "x".join(str(value) for _, value in tile.sizes)
        yield CompileCase(
            f"mixed {text} {dtype} {sizes}{' split' if split else ''}", f"{MODULE}:mixed_gemm", io, layout, dict(tile.options),
            "i8" if act == "int8" else "fp8", unaligned=("m", "units", "splits"),
        )  # fmt: skip
    # The same binaries as of the products of two 8-bit types, so under the same names.
    kind = {"*i8": "int8", "*fp8e4b8": "fnuz", "*fp8e4nv": "fp8"}[codes]
    yield from quantizers("W8A8" if act == "int8" else "Wfp8Afp8", dtype, 0, codes, kind)
