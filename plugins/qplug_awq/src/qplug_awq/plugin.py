"""What qplug-awq offers. Torch-free: code is named here and imported when it is needed."""

from __future__ import annotations

from qplug_core.decl import OPTIMIZED, FormatDecl, KernelDecl
from qplug_core.hookspecs import hookimpl

API = "1.0"

W4A16 = "W{4,8}A16 channel|g* sym|asym"
W4A8 = "W4A{8,fp8} channel|g* sym|asym a:token|tensor.static"


@hookimpl
def qplug_formats() -> list[FormatDecl]:
    """The format, in one layout for each packing that AutoAWQ calls a version."""
    return [
        FormatDecl(
            "awq",
            impl="qplug_awq.loader:AWQFormat",
            detects=("awq",),
            files=("quant_config.json",),
            layouts=("awq_gemm", "awq_gemv", "awq_gemv_fast", "awq_marlin"),
            schemes=(W4A16, W4A8),
            ops=("linear", "experts", "lm_head"),
            summary="AutoAWQ, GPTQModel and llm-awq checkpoints, 4 and 8 bits",
        )
    ]


@hookimpl
def qplug_kernels() -> list[KernelDecl]:
    """Integer weights times 16-bit activations."""
    return [
        KernelDecl(
            "awq.cpu_w4a16",
            impl="qplug_awq.kernels.cpu_w4a16:CpuW4A16",
            ops=("linear", "experts", "lm_head"),
            schemes=(W4A16,),
            devices=("avx2",),
            # The same code as gptq.cpu_wna16, which takes more schemes and goes first where both are installed.
            rank=OPTIMIZED - 1,
            summary="x86 vector units, codes unpacked in registers",
        ),
        KernelDecl(
            "awq.triton_w4a16",
            impl="qplug_awq.kernels.triton_w4a16:TritonW4A16",
            ops=("linear", "experts", "lm_head"),
            schemes=(W4A16,),
            devices=("sm_80+", "gfx90a+", "gfx11*", "gfx12*"),
            # The same code as gptq.triton_wna16, as on the CPU.
            rank=OPTIMIZED - 1,
            dtypes=("bfloat16", "float16"),
            requires=("triton>=3.6",),
            summary="GPU matrix units, codes unpacked in registers",
        ),
        KernelDecl(
            "awq.triton_w4a8",
            impl="qplug_awq.kernels.triton_w4a8:TritonW4A8",
            ops=("linear", "experts", "lm_head"),
            schemes=("W4A8 channel|g* sym|asym a:token|tensor.static",),
            devices=("sm_80+", "gfx90a+", "gfx11*", "gfx12*"),
            rank=OPTIMIZED - 1,
            dtypes=("bfloat16", "float16"),
            requires=("triton>=3.6",),
            summary="GPU integer matrix units, codes widened in registers, exact in int32",
        ),
        KernelDecl(
            "awq.triton_w4afp8",
            impl="qplug_awq.kernels.triton_w4afp8:TritonW4AFP8",
            ops=("linear", "experts", "lm_head"),
            schemes=("W4Afp8 channel|g* sym|asym a:token|tensor.static",),
            devices=("sm_89+", "gfx942", "gfx950", "gfx12*"),
            rank=OPTIMIZED - 1,
            dtypes=("bfloat16", "float16"),
            requires=("triton>=3.6",),
            summary="FP8 matrix units, codes widened in registers",
        ),
    ]
