"""What qplug-fp8 offers. Torch-free: code is named here and imported when it is needed."""

from __future__ import annotations

from qplug_core.decl import FormatDecl, QuantizerDecl
from qplug_core.hookspecs import hookimpl
from qplug_core.layer import Op

API = "1.0"

OPS: tuple[Op, ...] = ("linear", "experts", "lm_head")
BLOCKS = ("Wfp8Afp8 b128x128 a:g128", "Wfp8Afp8 b64x32 a:g32", "Wmxfp8Afp8 b128x128 a:g128")
"""Blocks of any extent are read and written; these stand for them. The last has E8M0 scales."""


@hookimpl
def qplug_formats() -> list[FormatDecl]:
    """Plain FP8 under the names of five tools, and the two whose config or tensors are unlike the others."""
    return [
        FormatDecl(
            "fp8",
            impl="qplug_fp8.loader:FP8Format",
            detects=("fp8", "w8a8_fp8"),
            layouts=("fp8", "fp8_block", "fp8_inv", "fp8_scale", "mistral_fp8", "trt_fp8", "fp8_experts"),
            schemes=(
                "Wfp8A{16,fp8} tensor|channel a:token|tensor.static",
                "Wfp8e5m2Afp8 tensor|channel a:token|tensor.static",
                *BLOCKS,
                "Wfp8A16 b128x128",
            ),
            ops=(*OPS, "embedding"),
            summary="DeepSeek, transformers, vLLM, SGLang, RTP-LLM, TensorRT-LLM: tensor, channel or block scales",
        ),
        FormatDecl(
            "fbgemm_fp8",
            impl="qplug_fp8.fbgemm:FbgemmFP8Format",
            detects=("fbgemm_fp8",),
            layouts=("fbgemm_fp8",),
            schemes=("Wfp8Afp8 channel a:token rules=ub1200",),
            ops=OPS,
            summary="FBGEMM row-wise FP8, activation extremes bounded from above",
        ),
        FormatDecl(
            "fastdeploy_fp8",
            impl="qplug_fp8.fastdeploy:FastDeployFP8Format",
            detects=("block_wise_fp8", "tensor_wise_fp8", "wfp8afp8"),
            layouts=("fastdeploy_fp8",),
            schemes=BLOCKS[:2],
            ops=OPS,
            summary="FastDeploy block_wise_fp8 in Paddle's orientation",
        ),
    ]


@hookimpl
def qplug_quantizers() -> list[QuantizerDecl]:
    """Load-time quantization by the scale rules of serving engines; amax / 448 by division is core's."""
    block = "Wfp8A{16,fp8} b128x128 a:g128"
    return [
        QuantizerDecl(
            "fp8.reciprocal",
            impl="qplug_fp8.quantizer:Reciprocal",
            schemes=("Wfp8A{16,fp8} b* a:g*",),
            summary="codes w * (448 / amax), scale 1 / (448 / amax), as transformers and FastDeploy quantize",
        ),
        QuantizerDecl(
            "fp8.deepgemm",
            impl="qplug_fp8.quantizer:DeepGemm",
            schemes=(block,),
            summary="codes w * (448 / amax), scale amax / 448, amax at least 1e-4, as DeepGEMM, vLLM and RTP-LLM quantize",
        ),
        QuantizerDecl(
            "fp8.ue8m0",
            impl="qplug_fp8.quantizer:UE8M0",
            schemes=("Wmxfp8A{16,fp8,mxfp8} b128x128 a:g128 rules=ceil",),
            summary="scales that are powers of two, 2**ceil(log2(amax / 448)), as DeepGEMM needs them on Blackwell",
        ),
        QuantizerDecl(
            "fp8.floored",
            impl="qplug_fp8.quantizer:Floored",
            schemes=("Wfp8A{16,fp8} tensor|channel a:token|tensor",),
            summary="amax / 448 with a smallest scale, as RTP-LLM quantizes at load",
        ),
    ]
