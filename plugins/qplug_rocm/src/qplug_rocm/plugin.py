"""What qplug-rocm offers. Torch-free: code is named here and imported when it is needed."""

from __future__ import annotations

from qplug_core.decl import OPTIMIZED, FormatDecl, KernelDecl, QuantizerDecl
from qplug_core.hookspecs import hookimpl
from qplug_core.layer import Op

API = "1.0"

OPS: tuple[Op, ...] = ("linear", "experts", "lm_head")


@hookimpl
def qplug_formats() -> list[FormatDecl]:
    """Checkpoints of AMD Quark, and FP8 by token and channel."""
    return [
        FormatDecl(
            "quark",
            impl="qplug_rocm.loader:QuarkFormat",
            detects=("quark",),
            layouts=("quark_fp8", "quark_int8", "quark_mxfp4", "quark_mxfp8", "quark_nvfp4"),
            schemes=(
                "Wfp8A16 tensor|channel|b*",
                "Wfp8Afp8 tensor|channel a:token|tensor|tensor.static",
                "Wfp8Afp8 b* a:g128",
                "W8A16 tensor|channel",
                "W8A8 tensor|channel a:tensor.static|tensor.static.asym",
                "W8A8 tensor|channel a:token|tensor rule=127.5",
                "Wmxfp4A16 g32",
                "Wmxfp4Amxfp4 g32 a:g32 rules=floor|up",
                "Wmxfp4Afp8 g32 a:token|tensor.static",
                "Wmxfp8A16 g32",
                *(f"Wmxfp8Amxfp8 g32 a:g32 rule={rule}" for rule in ("even", "floor", "up")),
                "Wnvfp4Anvfp4 g16 a:g16.local",
            ),
            ops=OPS,
            summary="AMD Quark checkpoints: FP8, INT8, MXFP4, MXFP8, NVFP4",
        ),
        FormatDecl(
            "ptpc_fp8",
            impl="qplug_rocm.ptpc:PTPCFormat",
            detects=("ptpc_fp8",),
            layouts=("ptpc_fp8",),
            schemes=("Wfp8Afp8 channel a:token",),
            ops=("linear", "experts"),
            summary="FP8 with a scale for each token and each out channel; e4m3fnuz files too",
        ),
    ]


@hookimpl
def qplug_kernels() -> list[KernelDecl]:
    """FP8 by token and channel on Instinct GPUs."""
    return [
        KernelDecl(
            "rocm.triton_ptpc",
            impl="qplug_rocm.kernels.triton_ptpc:TritonPTPC",
            ops=OPS,
            schemes=("Wfp8Afp8 channel a:token",),
            devices=("gfx942", "gfx950"),
            # The same code as fp8.triton_wfp8afp8, which takes more schemes and goes first where both are installed.
            rank=OPTIMIZED - 1,
            dtypes=("bfloat16", "float16"),
            requires=("triton>=3.6",),
            summary="FP8 matrix units, row-wise; e4m3fnuz on gfx942",
        ),
    ]


@hookimpl
def qplug_quantizers() -> list[QuantizerDecl]:
    """The online PTPC method."""
    return [
        QuantizerDecl(
            "rocm.ptpc_fp8",
            impl="qplug_rocm.ptpc:PTPCFp8",
            schemes=("Wfp8Afp8 channel a:token",),
            summary="scale amax / 448 by row, at least 1e-4 / 448, as RTP-LLM quantizes at load",
        )
    ]
