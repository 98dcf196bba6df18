"""What qplug-int8 offers. Torch-free: code is named here and imported when it is needed."""

from __future__ import annotations

from qplug_core.decl import OPTIMIZED, FormatDecl, KernelDecl, QuantizerDecl
from qplug_core.hookspecs import hookimpl

from . import declarations
from .paddle import declarations as paddle

API = "1.0"

W8A16 = "W8A16 tensor|channel|g* sym|asym"
ACTIVATIONS = "a:token|token.asym|tensor.static|tensor.static.asym rules=127|127.5"


@hookimpl
def qplug_formats() -> list[FormatDecl]:
    """The plain INT8 format, and those of serving engines."""
    return [
        FormatDecl(
            "int8",
            impl="qplug_int8.loader:Int8Format",
            detects=("int8",),
            layouts=("int8",),
            schemes=(W8A16, f"W8A8 tensor|channel|g* {ACTIVATIONS}"),
            ops=("linear", "experts", "embedding", "lm_head"),
            summary="one byte for each weight, scales beside it",
        ),
        *declarations.FORMATS,
        *paddle.FORMATS,
    ]


@hookimpl
def qplug_kernels() -> list[KernelDecl]:
    """INT8 weights times 16-bit or INT8 activations."""
    return [
        KernelDecl(
            "int8.cpu_w8a16",
            impl="qplug_int8.kernels.cpu_w8a16:CpuW8A16",
            ops=("linear", "experts", "lm_head"),
            schemes=(W8A16,),
            devices=("avx2",),
            rank=OPTIMIZED,
            summary="x86 vector units, weights widened in registers",
        ),
        KernelDecl(
            "int8.cpu_w8a8",
            impl="qplug_int8.kernels.cpu_w8a8:CpuW8A8",
            ops=("linear", "experts", "lm_head"),
            schemes=(f"W8A8 tensor|channel {ACTIVATIONS}",),
            devices=("avx2",),
            rank=OPTIMIZED,
            summary="x86 integer dot products, exact in int32",
        ),
        KernelDecl(
            "int8.cpu_w8a8_group",
            impl="qplug_int8.kernels.cpu_w8a8_group:CpuW8A8Group",
            ops=("linear", "experts", "lm_head"),
            schemes=(f"W8A8 g* {ACTIVATIONS}", "W8A8 channel|g*|b* a:g*"),
            devices=("avx2",),
            rank=OPTIMIZED,
            mode="emulated",
            summary="x86 vector units, INT8 codes multiplied as bfloat16 or float32",
        ),
        KernelDecl(
            "int8.cpu_wint2",
            impl="qplug_int8.kernels.cpu_wint2:CpuWINT2",
            ops=("linear", "experts", "lm_head"),
            schemes=("Wccq2A16 g64",),
            devices=("avx2",),
            rank=OPTIMIZED,
            summary="x86 vector units, 2-bit codes decoded in registers",
        ),
        KernelDecl(
            "int8.triton_w8a16",
            impl="qplug_int8.kernels.triton_w8a16:TritonW8A16",
            ops=("linear", "experts", "lm_head"),
            schemes=(W8A16,),
            devices=("sm_80+", "gfx90a+", "gfx11*", "gfx12*"),
            rank=OPTIMIZED,
            dtypes=("bfloat16", "float16"),
            requires=("triton>=3.6",),
            summary="GPU matrix units, weights widened in registers",
        ),
        KernelDecl(
            "int8.triton_w8a8",
            impl="qplug_int8.kernels.triton_w8a8:TritonW8A8",
            ops=("linear", "experts", "lm_head"),
            schemes=(f"W8A8 tensor|channel {ACTIVATIONS} 2:4", "W8A8 tensor|channel a:tensor rules=127|127.5 2:4"),
            devices=("sm_80+", "gfx90a+", "gfx11*", "gfx12*"),
            rank=OPTIMIZED,
            dtypes=("bfloat16", "float16"),
            requires=("triton>=3.6",),
            summary="GPU integer matrix units, exact in int32; 2:4 sparse weights are made dense in registers",
        ),
        KernelDecl(
            "int8.triton_w8a8_group",
            impl="qplug_int8.kernels.triton_w8a8_group:TritonW8A8Group",
            ops=("linear", "experts", "lm_head"),
            schemes=(
                "W8A8 g* sym|asym a:token|tensor|tensor.static rules=127|127.5",
                "W8A8 tensor|channel asym a:token|tensor|tensor.static rules=127|127.5",
            ),
            devices=("sm_80+", "gfx90a+", "gfx11*", "gfx12*"),
            rank=OPTIMIZED,
            dtypes=("bfloat16", "float16"),
            requires=("triton>=3.6",),
            summary="GPU integer matrix units, sums of each group exact in int32",
        ),
        KernelDecl(
            "int8.triton_wint2",
            impl="qplug_int8.kernels.triton_wint2:TritonWINT2",
            ops=("linear", "experts"),
            schemes=("Wccq2A16 g64",),
            devices=("sm_80+", "gfx90a+", "gfx11*", "gfx12*"),
            rank=OPTIMIZED,
            dtypes=("bfloat16", "float16"),
            requires=("triton>=3.6",),
            summary="GPU matrix units, the convolutional code decoded in registers",
        ),
    ]


@hookimpl
def qplug_quantizers() -> list[QuantizerDecl]:
    """Round to nearest by the rules of serving engines; the common rule is core's."""
    return [*declarations.QUANTIZERS, *paddle.QUANTIZERS]
