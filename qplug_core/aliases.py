"""Names that engines have for a quantization at load, and what each means here."""

from __future__ import annotations

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
    # FastDeploy --quantization
    "wint8": "W8A16",
    "wint4": "W4A16_channel",
    "wint2": "Wccq2A16",
    "block_wise_fp8": "Wfp8Afp8_b128x128",
    "tensor_wise_fp8": "Wfp8Afp8_tensor_static",
}
"""Method name, lower case, to a scheme name."""

BY_OP = {"mix_quant": "linear=W8A16,experts=W4A16_channel", "experts_int8": "experts=W8A16"}
"""Methods that treat linear layers and experts differently."""

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

    :raises SchemeError: as :meth:`QuantScheme.parse`.
    """
    return QuantScheme.parse(SCHEME_WORDS.get(text.strip().lower().replace("-", "_"), text))


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
