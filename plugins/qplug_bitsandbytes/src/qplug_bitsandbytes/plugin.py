"""What qplug-bitsandbytes offers. Torch-free: code is named here and imported when it is needed."""

from __future__ import annotations

from qplug_core.decl import OPTIMIZED, FormatDecl, KernelDecl, QuantizerDecl
from qplug_core.hookspecs import hookimpl

API = "1.0"

INT8 = "W8A8 channel a:token|token.outlier"
FOUR_BIT = "W{nf4,fp4bnb}A16 g*"


@hookimpl
def qplug_formats() -> list[FormatDecl]:
    """One format with two layouts."""
    return [
        FormatDecl(
            "bitsandbytes",
            impl="qplug_bitsandbytes.loader:BitsAndBytesFormat",
            detects=("bitsandbytes",),
            layouts=("bnb_4bit", "bnb_8bit"),
            schemes=(FOUR_BIT, INT8),
            ops=("linear", "experts", "lm_head"),
            summary="bitsandbytes checkpoints: NF4, FP4, LLM.int8",
        )
    ]


@hookimpl
def qplug_kernels() -> list[KernelDecl]:
    """4-bit codebooks times 16-bit activations."""
    return [
        KernelDecl(
            "bitsandbytes.cpu_wnf4a16",
            impl="qplug_bitsandbytes.kernels.cpu_wnf4a16:CpuWNF4A16",
            ops=("linear", "experts", "lm_head"),
            schemes=(FOUR_BIT,),
            devices=("avx2",),
            rank=OPTIMIZED,
            summary="x86 vector units, codes looked up in registers",
        ),
        KernelDecl(
            "bitsandbytes.triton_wnf4a16",
            impl="qplug_bitsandbytes.kernels.triton_wnf4a16:TritonWNF4A16",
            ops=("linear", "experts", "lm_head"),
            schemes=(FOUR_BIT,),
            devices=("sm_80+", "gfx90a+", "gfx11*", "gfx12*"),
            rank=OPTIMIZED,
            dtypes=("bfloat16", "float16"),
            requires=("triton>=3.6",),
            summary="GPU matrix units, codes looked up in registers",
        ),
    ]


@hookimpl
def qplug_quantizers() -> list[QuantizerDecl]:
    """LLM.int8, whose scales differ from core's (amax / 127.5). NF4 and FP4 are core's round to nearest."""
    return [
        QuantizerDecl(
            "bitsandbytes.llm_int8",
            impl="qplug_bitsandbytes.quantizer:LLMInt8",
            schemes=("W8A16 channel", INT8),
            summary="scale amax / 127, as bitsandbytes",
        )
    ]
