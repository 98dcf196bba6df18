"""One cell of the compile matrix: a Triton kernel, compiled for one GPU that need not be here, and what its machine code holds."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..device import Device
from ..kernels.triton_launch import CompileCase

REPORTED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
"""The GPUs of ``list-methods`` that have the matrix units: what the CI subset compiles for."""
TARGETS = (*REPORTED, "sm_87", "sm_103", "sm_110", "sm_121", "gfx1200")
"""Architectures of the matrix, with the relatives of those in embedded boards and in other models."""

_NVIDIA = re.compile(r"\b((?:wgmma\.mma_async|mma\.sync|mma|tcgen05\.mma)\.[\w.:]+)")
_AMD = re.compile(r"\b(v_mfma_\w+|v_wmma_\w+)")
_TYPES = {
    "f16": (r"\.f16\.f16|kind::f16", r"(_|x\d+)f16$"),
    "bf16": (r"\.bf16\.bf16|kind::f16", r"(_|x\d+)bf16(_1k)?$"),
    "i8": (r"\.s8\.s8|kind::i8", r"(_|x\d+)iu?8$"),
    "fp8": (r"\.e4m3\.e4m3|kind::f8f6f4", r"fp8_fp8\b|_f8f6f4\b"),
    "nvf4": (r"kind::mxf4nvf4\.block_scale\.(block16|scale_vec::4X)", r"(?!)"),
    "mxf4": (r"kind::mxf4(nvf4)?\.block_scale\.(block32|scale_vec::2X)", r"_scale_f32_\w+f8f6f4"),
    "mxf8": (r"kind::mxf8f6f4\.block_scale", r"_scale_f32_\w+f8f6f4"),
}
"""What the name of a matrix instruction holds for a type of operands: in PTX, and in AMD's instructions."""
_WIDE = {"sm_90": "wgmma"}
"""Architectures where the older instructions run at a fraction of the rate: the one that is needed."""


@dataclass
class Cell:
    """What came of one case on one target. ``failed``: why there is no machine code; ``problem``: what must not be, empty where all holds."""

    case: str
    target: str
    failed: str = ""
    problem: str = ""
    registers: int = 0
    spill: int = 0
    shared: int = 0
    seconds: float = 0.0
    matrix: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def compile_cell(case: CompileCase, arch: str) -> Cell:
    """Compile and look; :func:`problem_of` judges. Whatever the compiler raises is kept in ``failed``."""
    import time

    start = time.perf_counter()
    cell = Cell(case.name, arch)
    try:
        compiled = _compile(case, arch)
    except Exception as error:
        while error.__cause__ is not None or error.__context__ is not None:
            error = error.__cause__ or error.__context__  # type: ignore[assignment]
        lines = str(error).strip().splitlines() or [""]
        cell.failed = f"does not compile: {type(error).__name__}: {lines[-1][:200]}"
    else:
        _look(cell, compiled, arch)
    cell.seconds = round(time.perf_counter() - start, 2)
    return cell


def _compile(case: CompileCase, arch: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = case.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    signature, attributes = {}, {}
    for i, argument in enumerate(function.arg_names):
        if argument in case.constants:
            signature[argument] = "constexpr"
            continue
        signature[argument] = case.types.get(argument, "i32")
        # As the launcher finds it: torch aligns tensors to 16 bytes, and sizes of layers are multiples of 16.
        if argument not in case.unaligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    constants = {(function.arg_names.index(argument),): value for argument, value in case.constants.items()}
    source = ASTSource(function, signature, constexprs=constants, attrs=attributes)
    if arch.startswith("sm_"):
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return triton.compile(source, target=target, options=dict(case.options))


def _look(cell: Cell, compiled: Any, arch: str) -> None:
    """Fill in what the machine code uses."""
    cell.shared = compiled.metadata.shared
    if arch.startswith("sm_"):
        cell.matrix = sorted(set(_NVIDIA.findall(compiled.asm["ptx"])))
        used = _resources(compiled.asm["cubin"])
        cell.registers, cell.spill = int(used["REG"]), int(used["STACK"])
        return
    text = compiled.asm["amdgcn"]
    cell.matrix = sorted(set(_AMD.findall(text)))
    numbers = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text))
    cell.registers, cell.spill = int(numbers["vgpr_count"]), int(numbers["private_segment_fixed_size"])


def _resources(cubin: bytes) -> dict[str, str]:
    """Registers and bytes of stack, from the cuobjdump that Triton brings. LOCAL stays 0 where registers spill: STACK tells."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout))


def problem_of(cell: Cell, case: CompileCase) -> str:
    """What is wrong with a cell, an empty string where nothing is."""
    if cell.failed:
        return cell.failed
    arch = cell.target
    limit = Device.from_name(arch).shared_memory
    if cell.shared > limit:
        return f"uses {cell.shared} bytes of shared memory; {arch} has {limit}"
    if cell.spill > case.spill:
        return f"spills {cell.spill} bytes of registers to memory; {case.spill} are allowed"
    if not case.matrix:
        return ""
    pattern = _TYPES[case.matrix][0 if arch.startswith("sm_") else 1]
    right = [name for name in cell.matrix if re.search(pattern, name) and _WIDE.get(arch, "") in name]
    if not right:
        return f"has no {_WIDE.get(arch, 'matrix')} instruction for {case.matrix}; found {', '.join(cell.matrix) or 'none'}"
    wrong = sorted(set(cell.matrix) - set(right))
    return f"also has {', '.join(wrong)}; only {case.matrix} was meant" if wrong else ""
