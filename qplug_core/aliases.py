"""Names that engines have for a quantization at load, and what each means here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .errors import SchemeError
from .layer import Op
from .scheme import QuantScheme

SCHEME_WORDS = {
    # RTP-LLM --quantization
    "int8": "W8A16",
    "fp8": "Wfp8Afp8_tensor",
    "fp8_dynamic_per_tensor": "Wfp8Afp8_tensor_a:tensor",
    "fp8_per_block": "Wfp8Afp8_b128x128",
    "fp8_per_channel_compressed": "Wfp8Afp8",
    "fp8_per_channel_quark": "Wfp8Afp8",
    "int4": "W4A16_g128",
    "quarkmxfp4": "Wmxfp4Amxfp4",
    "w4a8_int4_per_channel": "W4Afp8_g128",
    "w4a8_int4_per_channel_compressed": "W4Afp8_g32",
    # vLLM --quantization
    "fp8_per_tensor": "Wfp8Afp8_tensor",
    "fp8_per_channel": "Wfp8Afp8",
    "ptpc_fp8": "Wfp8Afp8",
    "int8_per_channel_weight_only": "W8A16",
    "nvfp4_per_token": "Wnvfp4Anvfp4",
    "mxfp8": "Wmxfp8Amxfp8",
    "mxfp4": "Wmxfp4A16",
    "modelopt_fp4": "Wnvfp4Anvfp4",
    "bitsandbytes": "WNF4A16",
    "nf4": "WNF4A16",
    # SGLang and TensorRT-LLM, where the word is numerics alone
    "w8a8_int8": "W8A8",
    "w8a8_fp8": "Wfp8Afp8",
    "nvfp4_online": "Wnvfp4Anvfp4",
    "nvfp4": "Wnvfp4Anvfp4",
    "w4a16_nvfp4": "Wnvfp4A16",
    "w4a16_mxfp4": "Wmxfp4A16",
    "fp8_block_scales": "Wfp8Afp8_b128x128",
    "fp8_per_channel_per_token": "Wfp8Afp8",
    # FastDeploy --quantization
    "wint8": "W8A16",
    "wint4": "W4A16_channel",
    "weight_only_int8": "W8A16",
    "weight_only_int4": "W4A16_channel",
    "block_wise_fp8": "Wfp8Afp8_b128x128",
}
"""Method name, lower case, to a scheme name."""

BY_OP = {"mix_quant": "linear=W8A16,experts=W4A16_channel", "experts_int8": "experts=W8A16"}
"""Methods that treat linear layers and experts differently."""

_STORED = "is a kind of file, which says itself how it is quantized, so leave the option out; for a 16-bit file"
_ALGORITHM = "chooses weights with calibration data, which no load has; for its numbers, rounded to nearest,"
NO_SCHEME = {
    **dict.fromkeys(
        ("compressed_tensors", "torchao", "gguf", "quark", "hqq", "modelopt", "modelopt_mixed", "auto_round", "inc", "quanto", "fbgemm_fp8"),
        f"{_STORED} name a scheme such as W8A16",
    ),
    **dict.fromkeys(("gptq", "gptq_marlin", "auto_gptq", "w4a16_gptq"), f"{_ALGORITHM} write W4A16_g128"),
    **dict.fromkeys(("awq", "awq_marlin", "auto_awq", "w4a16_awq"), f"{_ALGORITHM} write W4A16_g128_asym"),
    "w4a8_awq": f"{_ALGORITHM} write W4Afp8_g128",
    **dict.fromkeys(("smooth_quant", "smoothquant", "omni_quant", "pertensor_quant"), f"{_ALGORITHM} write W8A8"),
    "weight_only": "leaves out the bits; write weight_only_int8 or weight_only_int4",
    "kvcache": "is about the KV cache alone; write --kv-cache int8",
    "online": "leaves out the numbers; write a scheme such as Wfp8Afp8",
    "rtn": "is an algorithm, the one that loading takes; write a scheme such as W8A16",
    "wint2": "is a convolutional code that its makers fit with calibration data: such files are read and not made; write wint4",
    "tensor_wise_fp8": "multiplies weights that a Hadamard matrix rotated, which no load makes; write fp8_per_tensor",
}  # fmt: skip
"""Words of engines that are no numerics which a load can make, with what they are and what to write."""

ONLINE_OPS: tuple[Op, ...] = ("linear", "experts")


def online_schemes(text: str | QuantScheme | None) -> tuple[dict[Op, QuantScheme], str]:
    """What a quantization at load means: a scheme for each operation, and one sentence where ``text`` is another word for it.

    ``text``: a scheme name, a method name of an engine, or ``linear=W8A16,experts=W4A16_g128``.

    :raises SchemeError: for what is none of these.
    """
    if text is None:
        return {}, ""
    if isinstance(text, QuantScheme):
        return dict.fromkeys(ONLINE_OPS, text), ""
    word = text.strip().lower()
    body = BY_OP.get(word, text)
    if "=" in body and not word.startswith("w"):
        schemes = {op: parse_word(scheme) for op, scheme in (_operation(part, text) for part in body.split(","))}
    else:
        schemes = dict.fromkeys(ONLINE_OPS, parse_word(body))
    shown = {str(scheme) for scheme in schemes.values()}
    meaning = next(iter(shown)) if len(schemes) == len(ONLINE_OPS) and len(shown) == 1 else _by_op(schemes)
    return schemes, "" if word == meaning.lower() else f"{text!r} means {meaning}"


def parse_word(text: str) -> QuantScheme:
    """A scheme by its own name or by an engine's method name.

    :raises SchemeError: as :meth:`QuantScheme.parse`, with the nearest word; for a word of an engine that is no scheme, saying what it is.
    """
    word = text.strip().lower().replace("-", "_").replace(" ", "_")
    if word in NO_SCHEME:
        raise SchemeError(f"{text!r} {NO_SCHEME[word]}")
    try:
        return QuantScheme.parse(SCHEME_WORDS.get(word, text))
    except SchemeError as error:
        raise SchemeError(f"{error}{did_you_mean(word, [*SCHEME_WORDS, *BY_OP, *NO_SCHEME])}") from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'wint8'?`` where a known word is near, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.75)
    return f"; did you mean {near[0]!r}?" if near else ""


def _operation(part: str, text: str) -> tuple[Op, str]:
    op, _, scheme = part.partition("=")
    for known in ONLINE_OPS:
        if op.strip() == known:
            return known, scheme
    raise SchemeError(
        f"{text!r} names the operation {op.strip()!r}; linear or experts was needed, as in linear=W8A16,experts=W4A16"
    )


def _by_op(schemes: dict[Op, QuantScheme]) -> str:
    return ",".join(f"{op}={scheme}" for op, scheme in schemes.items())
