"""What qplug-int8 offers. Torch-free: code is named here and imported when it is needed."""

from __future__ import annotations

from qplug_core.decl import OPTIMIZED, FormatDecl, KernelDecl, QuantizerDecl
from qplug_core.hookspecs import hookimpl

API = "1.0"

W8A16 = "W8A16 tensor|channel|g* sym|asym"
ACTIVATIONS = "a:token|token.asym|tensor.static|tensor.static.asym rules=127|127.5"


@hookimpl
def qplug_formats() -> list[FormatDecl]:
    """The plain INT8 format."""
    return [
        FormatDecl(
            "int8",
            impl="qplug_int8.loader:Int8Format",
            detects=("int8",),
            layouts=("int8",),
            schemes=(W8A16, f"W8A8 tensor|channel|g* {ACTIVATIONS}"),
            ops=("linear", "experts", "embedding", "lm_head"),
            summary="one byte for each weight, scales beside it",
        )
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
    ]


@hookimpl
def qplug_quantizers() -> list[QuantizerDecl]:
    """Round to nearest by the scale rules of two serving engines; the common rule is core's."""
    schemes = ("W8A16 channel", "W8A8 channel a:token|token.asym rules=127|127.5")
    return [
        QuantizerDecl(
            "int8.amax128",
            impl="qplug_int8.quantizer:Amax128",
            schemes=schemes,
            summary="scale amax / 128, as RTP-LLM quantizes at load",
        ),
        QuantizerDecl(
            "int8.amax127",
            impl="qplug_int8.quantizer:Amax127",
            schemes=schemes,
            summary="scale amax / 127, as Paddle quantizes at load",
        ),
    ]
