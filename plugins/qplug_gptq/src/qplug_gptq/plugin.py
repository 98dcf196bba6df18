"""What qplug-gptq offers. Torch-free: code is named here and imported when it is needed."""

from __future__ import annotations

from qplug_core.decl import OPTIMIZED, FormatDecl, KernelDecl
from qplug_core.hookspecs import hookimpl
from qplug_core.layer import Op

API = "1.0"

SCHEMES = ("W{2,3,4,8}A16 channel|g* sym|asym actorder",)
"""What every kernel multiplies; the format holds more."""

PLANAR = ("W{5,6,7}A16 channel|g* sym|asym actorder",)
W4A8 = ("W4A{8,fp8} channel|g* sym|asym a:token|tensor|tensor.static",)
OPS: tuple[Op, ...] = ("linear", "experts", "lm_head")


@hookimpl
def qplug_formats() -> list[FormatDecl]:
    """Zero points stored minus one (v1) or as they are (v2), bit planes, files packed for Marlin, and auto-round's configs."""
    return [
        FormatDecl(
            "gptq",
            impl="qplug_gptq.loader:GPTQFormat",
            detects=("gptq", "auto_gptq", "gptq_marlin"),
            files=("quantize_config.json",),
            layouts=("gptq", "gptq_v2", "gptq_p"),
            schemes=SCHEMES + PLANAR + W4A8,
            ops=OPS,
            summary="AutoGPTQ and GPTQModel checkpoints, 2 to 8 bits, also with FP8 or INT8 activations",
        ),
        FormatDecl(
            "marlin",
            impl="qplug_gptq.marlin:MarlinFormat",
            detects=("marlin",),
            layouts=("marlin",),
            schemes=("W4A16 channel|g128 sym",),
            ops=OPS,
            summary="GPTQ checkpoints packed for the Marlin kernel before they were saved",
        ),
        FormatDecl(
            "gptq_marlin_24",
            impl="qplug_gptq.marlin:Marlin24Format",
            detects=("gptq_marlin_24", "marlin_24"),
            layouts=("marlin_24",),
            schemes=("W{4,8}A16 channel|g* sym 2:4",),
            ops=OPS,
            writes=False,
            summary="2:4 sparse GPTQ checkpoints packed for the sparse Marlin kernel; read, never written",
        ),
        FormatDecl(
            "auto-round",
            impl="qplug_gptq.autoround:AutoRoundFormat",
            detects=("auto-round", "auto_round", "intel/auto-round"),
            schemes=SCHEMES + W4A8,
            ops=OPS,
            writes=False,
            summary="auto-round checkpoints in the packings of GPTQ, AWQ and compressed-tensors",
        ),
    ]


@hookimpl
def qplug_kernels() -> list[KernelDecl]:
    """Integer weights times 16-bit or 8-bit activations."""
    return [
        KernelDecl(
            "gptq.cpu_wna16",
            impl="qplug_gptq.kernels.cpu_wna16:CpuWNA16",
            ops=("linear", "experts", "lm_head"),
            schemes=SCHEMES + PLANAR,
            devices=("avx2",),
            rank=OPTIMIZED,
            summary="x86 vector units, codes unpacked in registers",
        ),
        KernelDecl(
            "gptq.cpu_w4a8",
            impl="qplug_gptq.kernels.cpu_w4a8:CpuW4A8",
            ops=OPS,
            schemes=W4A8,
            devices=("avx2",),
            rank=OPTIMIZED,
            mode="emulated",
            summary="x86 vector units, INT8 and FP8 codes multiplied as bfloat16 or float32",
        ),
        KernelDecl(
            "gptq.triton_wna16",
            impl="qplug_gptq.kernels.triton_wna16:TritonWNA16",
            ops=("linear", "experts", "lm_head"),
            schemes=SCHEMES,
            devices=("sm_80+", "gfx90a+", "gfx11*", "gfx12*"),
            rank=OPTIMIZED,
            dtypes=("bfloat16", "float16"),
            requires=("triton>=3.6",),
            summary="GPU matrix units, codes unpacked in registers",
        ),
        KernelDecl(
            "gptq.triton_w4a8",
            impl="qplug_gptq.kernels.triton_w4a8:TritonW4A8",
            ops=OPS,
            schemes=("W{2,4}A8 channel|g* sym|asym actorder a:token|tensor|tensor.static rules=127|127.5",),
            devices=("sm_80+", "gfx90a+", "gfx11*", "gfx12*"),
            rank=OPTIMIZED,
            dtypes=("bfloat16", "float16"),
            requires=("triton>=3.6",),
            summary="GPU integer matrix units, codes widened in registers, exact in int32",
        ),
        KernelDecl(
            "gptq.triton_w4afp8",
            impl="qplug_gptq.kernels.triton_w4afp8:TritonW4AFP8",
            ops=OPS,
            schemes=("W4Afp8 channel|g* sym|asym actorder a:token|tensor|tensor.static",),
            devices=("sm_89+", "gfx942", "gfx950", "gfx12*"),
            rank=OPTIMIZED,
            dtypes=("bfloat16", "float16"),
            requires=("triton>=3.6",),
            summary="FP8 matrix units, codes widened in registers",
        ),
    ]
