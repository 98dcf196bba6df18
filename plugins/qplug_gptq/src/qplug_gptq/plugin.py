"""What qplug-gptq offers. Torch-free: code is named here and imported when it is needed."""

from __future__ import annotations

from qplug_core.decl import OPTIMIZED, FormatDecl, KernelDecl
from qplug_core.hookspecs import hookimpl

API = "1.0"

SCHEMES = ("W{2,3,4,8}A16 channel|g* sym|asym actorder",)


@hookimpl
def qplug_formats() -> list[FormatDecl]:
    """The format, in its two layouts: zero points stored minus one (v1), or as they are (v2)."""
    return [
        FormatDecl(
            "gptq",
            impl="qplug_gptq.loader:GPTQFormat",
            detects=("gptq",),
            files=("quantize_config.json",),
            layouts=("gptq", "gptq_v2"),
            schemes=SCHEMES,
            ops=("linear", "experts", "lm_head"),
            summary="AutoGPTQ and GPTQModel checkpoints, 2, 3, 4 and 8 bits",
        )
    ]


@hookimpl
def qplug_kernels() -> list[KernelDecl]:
    """Integer weights times 16-bit activations."""
    return [
        KernelDecl(
            "gptq.cpu_wna16",
            impl="qplug_gptq.kernels.cpu_wna16:CpuWNA16",
            ops=("linear", "experts", "lm_head"),
            schemes=SCHEMES,
            devices=("avx2",),
            rank=OPTIMIZED,
            summary="x86 vector units, codes unpacked in registers",
        )
    ]
