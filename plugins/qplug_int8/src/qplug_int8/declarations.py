"""Formats and algorithms of INT8 engines: what other tools write and other engines read. Torch-free."""

from __future__ import annotations

from qplug_core.decl import FormatDecl, QuantizerDecl
from qplug_core.layer import Op

LAYERS: tuple[Op, ...] = ("linear", "experts")

FORMATS = (
    FormatDecl(
        "smooth_quant",
        impl="qplug_int8.smoothquant:SmoothQuantFormat",
        detects=("smooth_quant", "smoothquant"),
        files=("smoothquant.ini",),
        layouts=("smooth_quant", "smooth_quant_col", "smooth_quant_int8", "smooth_quant_trt", "smooth_quant_lmdeploy"),
        schemes=("W8A8 tensor|channel a:token",),
        ops=LAYERS,
        summary="SmoothQuant as RTP-LLM, FasterTransformer, TensorRT-LLM and LMDeploy store it",
    ),
    FormatDecl(
        "omni_quant",
        impl="qplug_int8.omniquant:OmniQuantFormat",
        detects=("omni_quant",),
        layouts=("omni_quant",),
        schemes=("W8A8 channel a:token",),
        ops=LAYERS,
        summary="OmniQuant W8A8 of RTP-LLM, with smoother and shift",
    ),
    FormatDecl(
        "pertensor_quant",
        impl="qplug_int8.pertensor:PerTensorFormat",
        detects=("pertensor_quant",),
        files=("pertensorquant.ini",),
        layouts=("pertensor_quant",),
        schemes=("W8A8 tensor|channel a:tensor.static",),
        summary="static W8A8 encoders of RTP-LLM",
    ),
    FormatDecl(
        "w8a8_int8",
        impl="qplug_int8.w8a8:W8A8Format",
        detects=("w8a8_int8", "experts_int8"),
        layouts=("w8a8_int8",),
        schemes=("W8A8 tensor|channel a:token|tensor.static|tensor.static.asym",),
        ops=LAYERS,
        summary="W8A8 by channel and token, as SGLang reads it",
    ),
    FormatDecl(
        "blockwise_int8",
        impl="qplug_int8.blockwise:BlockwiseInt8Format",
        detects=("blockwise_int8",),
        layouts=("blockwise_int8",),
        schemes=("W8A8 b128x128 a:g128", "W8A8 b64x32 a:g32"),
        ops=LAYERS,
        summary="W8A8 in blocks, as SGLang reads it",
    ),
)

W8 = ("W8A16 channel", "W8A8 channel a:token|token.asym rules=127|127.5")

QUANTIZERS = (
    QuantizerDecl("int8.amax128", "qplug_int8.quantizer:Amax128", W8, summary="scale amax / 128, as RTP-LLM at load"),
    QuantizerDecl(
        "int8.experts_int8",
        "qplug_int8.quantizer:ExpertsInt8",
        W8,
        summary="scale amax / 127 in the model's dtype, as vLLM's experts_int8 at load",
    ),
)
