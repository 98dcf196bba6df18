"""What the compile matrix compiles of products of all experts: the plain kernels' cases, each inside of its launch for experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .triton_launch import CompileCase

MODULE = "qplug_core.kernels.triton_experts_kernels"
EXPERTS = 128


def grouped(cases: Iterable[CompileCase], result: str, subset: str, module: str = MODULE) -> list[CompileCase]:
    """The products among ``cases`` for :data:`EXPERTS` experts, results of the Triton type ``result``; in the CI subset the first of them.

    ``module``: where the kernels for experts are.
    """
    found = [_grouped(case, result, module) for case in cases if case.function.endswith("_gemm")]
    return found[:1] if subset == "ci" else found


def _grouped(case: CompileCase, result: str, module: str) -> CompileCase:
    name = case.function.partition(":")[2].replace("_gemm", "_experts")
    constants = {key: value for key, value in case.constants.items() if key != "SPLIT"}
    return replace(
        case,
        name=f"experts {case.name.removesuffix(' split')}",
        function=f"{module}:{name}",
        types={**case.types, "y": result, "ends": "*i64"},
        constants={**constants, "E": EXPERTS},
        unaligned=("count", "units", "scale_stride"),
    )
