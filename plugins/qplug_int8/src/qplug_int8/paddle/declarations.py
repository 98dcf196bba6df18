"""What FastDeploy's checkpoints add to qplug-int8. Torch-free: code is named here and imported when it is needed."""

from __future__ import annotations

from qplug_core.decl import FormatDecl, QuantizerDecl

ORDERS = ("", "_sm70", "_nk", "_kn")
"""Endings of the layouts of one weight-only type: the order of its codes, see :mod:`qplug_int8.paddle.orders`."""

METHODS = ("mix_quant", "weight_only", "wint2", "wint4", "wint8", "w4a8", "w4afp8", "w8a8")
"""Values of FastDeploy's key ``quantization``; the FP8 ones are qplug-fp8's."""

FORMATS = (
    FormatDecl(
        "fastdeploy",
        impl="qplug_int8.paddle.weight_only:WeightOnlyFormat",
        detects=METHODS,
        layouts=tuple(f"{kind}{order}" for kind in ("wint8", "wint4") for order in ORDERS),
        schemes=("W8A16 channel", "W4A16 channel"),
        ops=("linear", "experts"),
        summary="FastDeploy: WINT8, WINT4, and MixQuant of these with WINT2, W4A8 and FP8",
    ),
    FormatDecl(
        "fastdeploy_ccq",
        impl="qplug_int8.paddle.wint2:CCQFormat",
        layouts=("ccq2", "ccq2.5"),
        schemes=("Wccq2A16 g64", "W3A16 g64"),
        ops=("experts",),
        writes=False,
        summary="FastDeploy's WINT2 and WINT2.5: a convolutional code, decoded exactly",
    ),
    FormatDecl(
        "fastdeploy_w4a8",
        impl="qplug_int8.paddle.w4a8:W4A8Format",
        layouts=("w4a8", "w4a8_kn"),
        schemes=("W4A8 channel a:tensor.static",),
        ops=("experts",),
        writes=False,
        summary="FastDeploy's experts of 4-bit weights and static INT8 activations",
    ),
)

QUANTIZERS = (
    QuantizerDecl(
        "int8.paddle",
        impl="qplug_int8.paddle.quantizer:PaddleRound",
        schemes=("W{4,8}A16 channel",),
        summary="scale amax / 127 or amax / 7 and codes from the unrounded scale, bit for bit as Paddle at load",
    ),
)
