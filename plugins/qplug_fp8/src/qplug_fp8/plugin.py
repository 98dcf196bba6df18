"""What qplug-fp8 offers. Torch-free: code is named here and imported when it is needed."""

from __future__ import annotations

from qplug_core.decl import OPTIMIZED, FormatDecl, KernelDecl, QuantizerDecl
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
def qplug_kernels() -> list[KernelDecl]:
    """FP8 weights times 16-bit or FP8 activations."""
    return [
        KernelDecl(
            "fp8.cpu_wfp8a16",
            impl="qplug_fp8.kernels.cpu_wfp8a16:CpuWFP8A16",
            ops=OPS,
            schemes=("W{fp8,fp8e5m2}A16 tensor|channel|g*|b*", "Wmxfp8A16 g32|b128x128"),
            devices=("avx2",),
            rank=OPTIMIZED,
            summary="x86 vector units, codes converted in registers",
        ),
        KernelDecl(
            "fp8.cpu_wfp8afp8",
            impl="qplug_fp8.kernels.cpu_wfp8afp8:CpuWFP8AFP8",
            ops=OPS,
            schemes=(
                "W{fp8,fp8e5m2}Afp8 tensor|channel a:token|tensor|tensor.static rules=ub1200",
                "Wfp8Afp8 channel|g*|b* a:token|g*|tensor.static",
                "Wmxfp8Afp8 b128x128 a:token|g*|tensor.static",
            ),
            devices=("avx2",),
            rank=OPTIMIZED,
            mode="emulated",
            summary="x86 vector units, FP8 codes multiplied as bfloat16 or float32",
        ),
        KernelDecl(
            "fp8.triton_wfp8a16",
            impl="qplug_fp8.kernels.triton_wfp8a16:TritonWFP8A16",
            ops=OPS,
            schemes=("W{fp8,fp8e5m2}A16 tensor|channel|g*|b*", "Wmxfp8A16 g32|b128x128"),
            devices=("sm_80+", "gfx90a+", "gfx11*", "gfx12*"),
            rank=OPTIMIZED,
            dtypes=("bfloat16", "float16"),
            requires=("triton>=3.6",),
            summary="GPU matrix units, FP8 codes decoded from their bits",
        ),
        KernelDecl(
            "fp8.triton_weight_only",
            impl="qplug_fp8.kernels.triton_weight_only:TritonFP8WeightOnly",
            ops=OPS,
            schemes=("W{fp8,fp8e5m2}Afp8 tensor|channel a:token|tensor|tensor.static rules=ub1200", "Wfp8Afp8 b* a:g*"),
            devices=("sm_80-sm_88", "gfx90a", "gfx11*"),
            rank=OPTIMIZED,
            dtypes=("bfloat16", "float16"),
            mode="weight-only",
            requires=("triton>=3.6",),
            summary="as fp8.triton_wfp8a16, where there are no FP8 units",
        ),
        KernelDecl(
            "fp8.triton_wfp8afp8",
            impl="qplug_fp8.kernels.triton_wfp8afp8:TritonWFP8AFP8",
            ops=OPS,
            schemes=(
                "Wfp8Afp8 tensor|channel a:token|tensor|tensor.static rules=ub1200 2:4",
                "Wfp8Afp8 b128x128 a:g128",
                "Wfp8Afp8 b64x32 a:g32",
            ),
            devices=("sm_89+", "gfx942", "gfx950", "gfx12*"),
            rank=OPTIMIZED,
            dtypes=("bfloat16", "float16"),
            requires=("triton>=3.6",),
            summary="FP8 matrix units; 2:4 sparse weights are made dense in registers",
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
