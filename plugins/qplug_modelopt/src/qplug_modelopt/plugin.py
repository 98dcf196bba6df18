"""What qplug-modelopt offers. Torch-free: code is named here and imported when it is needed."""

from __future__ import annotations

from qplug_core.decl import FormatDecl
from qplug_core.hookspecs import hookimpl

API = "1.0"

METHODS = ("modelopt", "modelopt_fp8", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed")
LAYOUTS = (
    "modelopt_fp8", "modelopt_fp8_pc_pt", "modelopt_fp8_pb", "modelopt_nvfp4", "modelopt_int4_awq", "modelopt_w4a8_awq",
    "modelopt_int8_sq", "modelopt_mxfp4", "modelopt_mxfp8",
)  # fmt: skip
# The producer's kernel takes the exponent of MX activations by "ceil".
SCHEMES = (
    "Wfp8Afp8 tensor a:tensor.static|tensor",
    "Wfp8Afp8 channel",
    "Wfp8A16 b128x128|b64x64",
    "Wfp8Afp8 b128x128 a:g128",
    "Wnvfp4A16 g16",
    "Wnvfp4Anvfp4 g16 a:g16.local",
    "Wnvfp4Afp8 g16|g32 a:tensor.static",
    "W4A16 channel|g*",
    "W4Afp8 g* a:tensor.static",
    "W8A16 channel",
    "W8A8 channel a:tensor.static",
    "Wmxfp4A16",
    "Wmxfp4Amxfp4 a:g32 rule=ceil",
    "Wmxfp4Afp8 a:tensor.static",
    "Wmxfp4Amxfp8 a:g32 rule=ceil",
    "Wmxfp8Amxfp8 a:g32 rule=ceil",
)


@hookimpl
def qplug_formats() -> list[FormatDecl]:
    """Unified Hugging Face checkpoints of ModelOpt, as TensorRT-LLM, vLLM and SGLang read them."""
    return [
        FormatDecl(
            "modelopt",
            impl="qplug_modelopt.loader:ModelOptFormat",
            detects=METHODS,
            files=("hf_quant_config.json",),
            layouts=LAYOUTS,
            schemes=SCHEMES,
            ops=("linear", "experts", "lm_head"),
            summary="ModelOpt checkpoints: FP8, NVFP4, MXFP4, MXFP8, INT4 AWQ, INT8 SmoothQuant, mixed precision",
        )
    ]
