"""What qplug-bitsandbytes offers. Torch-free: code is named here and imported when it is needed."""

from __future__ import annotations

from qplug_core.decl import FormatDecl, QuantizerDecl
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
