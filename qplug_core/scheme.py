"""QuantScheme: which numbers a layer computes with, and nothing about how they are stored or multiplied.

A scheme is frozen, torch-free, and has one canonical name that parses back to an equal scheme. The grammar is
the field's own: ``W<weight>A<activation>C<cache>``, then suffixes. What is left out means 16 bit::

    W4A16_g128            int4 weights, groups of 128 along K, symmetric
    W4A16_g128_asym       the same with zero points          (``zp`` is read too)
    W8A8C8                int8 weights per channel, int8 activations per token, int8 KV cache
    Wfp8Afp8_b128x128     FP8 weights in 128x128 blocks, activations in groups of 128
    WNF4A8C8, W4Afp8, WInt4, "weight-only int4", wint8, W8A16

Parsing ignores case, and takes ``_``, ``-``, ``,`` or a space between suffixes.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from typing import Literal

from .errors import SchemeError


@dataclass(frozen=True)
class NumberType:
    """A storage type of one number: its width in bits and the largest magnitude that it represents."""

    name: str
    bits: int
    kind: Literal["int", "float", "codebook"]
    largest: float


NUMBER_TYPES: dict[str, NumberType] = {
    **{f"int{b}": NumberType(f"int{b}", b, "int", float(2 ** (b - 1) - 1)) for b in range(2, 9)},
    "fp8_e4m3": NumberType("fp8_e4m3", 8, "float", 448.0),
    "fp8_e5m2": NumberType("fp8_e5m2", 8, "float", 57344.0),
    "fp4_e2m1": NumberType("fp4_e2m1", 4, "codebook", 6.0),
    "nf4": NumberType("nf4", 4, "codebook", 1.0),
    "fp4_bnb": NumberType("fp4_bnb", 4, "codebook", 1.0),
    "iq4nl": NumberType("iq4nl", 4, "codebook", 127.0),
    "ccq2": NumberType("ccq2", 2, "codebook", 32.0),
    "fp16": NumberType("fp16", 16, "float", 65504.0),
}
"""``int<b>`` covers both forms of an integer code: signed when symmetric, unsigned with a zero point when not.
``fp16`` stands for "whatever 16-bit type the model has", and is used by sparse weights only. ``ccq2`` is the
convolutional code of WINT2, ``fp4_bnb`` the codebook of bitsandbytes, ``iq4nl`` that of llama.cpp's IQ4_NL and IQ4_XS."""


@dataclass(frozen=True)
class TensorQuant:
    """How one tensor (weights, activations or KV cache) is quantized.

    block
        Extent ``(rows, columns)`` that shares one scale; 0 means the whole extent. Weights: ``(0, 0)`` tensor,
        ``(1, 0)`` channel, ``(1, g)`` group, ``(bn, bk)`` block. Activations: ``(1, 0)`` token, ``(1, g)`` group
        of one token, ``(0, 0)`` tensor. KV cache: ``(0, 0)`` tensor, ``(-1, 0)`` head, ``(1, 0)`` token and head.
    symmetric
        False means that there are zero points.
    dynamic
        True: scales are computed from each input; False: they are stored; ``"local"``: a stored global scale and
        computed block scales (NVFP4).
    scale_dtype
        ``"float"`` (a stored 16- or 32-bit float), ``"e8m0"`` (a power of two), or ``"e4m3"`` (two levels: an FP8
        scale for each block and one float32 for the tensor).
    rule
        How a scale is computed where producers differ, ``""`` for the common rule. Integer activations:
        ``"127"`` or ``"127.5"`` is the divisor of amax. MX: ``"ct"``, ``"floor"`` or ``"ceil"`` chooses the exponent.
        FP8 activations: ``"ub1200"`` bounds amax from above (FBGEMM).
        Another rule is another function, so a kernel must name the rules that it implements.
    outlier
        Activation columns whose magnitude exceeds this stay 16 bit (LLM.int8); 0 means none.
    """

    dtype: str
    block: tuple[int, int] = (1, 0)
    symmetric: bool = True
    dynamic: bool | Literal["local"] = False
    scale_dtype: Literal["float", "e8m0", "e4m3"] = "float"
    rule: str = ""
    outlier: float = 0.0

    def __post_init__(self) -> None:
        if self.dtype not in NUMBER_TYPES:
            raise SchemeError(f"number type {self.dtype!r} is unknown; known are {', '.join(NUMBER_TYPES)}")
        if not self.symmetric and NUMBER_TYPES[self.dtype].kind != "int":
            raise SchemeError(f"{self.dtype} has no zero points; write the scheme without 'asym'")

    @property
    def bits(self) -> int:
        """Width of one code in bits."""
        return NUMBER_TYPES[self.dtype].bits

    @property
    def granularity(self) -> str:
        """The usual word for ``block`` of a weight: tensor, channel, group or block."""
        rows, columns = self.block
        if rows == 1:
            return "group" if columns else "channel"
        return "tensor" if self.block == (0, 0) else "block"


@dataclass(frozen=True)
class Tolerance:
    """How far a right implementation may be from the definition; measured in docs/decisions/0003-tolerance.md.

    weight
        Relative Frobenius distance of decoded weights from a producer that dequantizes in bf16.
    weight_exact
        The same from a producer that dequantizes in float32.
    code_share, code_step, act_scale
        Activation codes against the float32 quantizer: the share that may differ, by how many steps, and the
        relative error of the scales.
    product, product_16bit
        The product on given codes and scales, relative Frobenius, with float32 and with 16-bit output.
    cache
        What the KV cache may change of keys and values that are normally distributed, relative Frobenius; 0 without one.
        Half a step of the codes over heads of up to 256 channels, rounded up.
    """

    weight: float = 2.0**-7
    weight_exact: float = 1e-6
    code_share: float = 0.01
    code_step: int = 1
    act_scale: float = 1e-5
    product: float = 1e-5
    product_16bit: float = 4e-3
    cache: float = 0.0


_CACHE_ERROR = {"int8": 0.012, "int4": 0.15, "fp8_e4m3": 0.03, "fp8_e5m2": 0.06, "fp4_e2m1": 0.12}


@dataclass(frozen=True)
class QuantScheme:
    """The numerics of one layer: weights, activations and KV cache, each 16 bit where it is None.

    ``act_order``: columns of K are assigned to groups by an index instead of by position. ``sparsity``: ``""`` or ``"2:4"``.
    """

    weight: TensorQuant | None = None
    act: TensorQuant | None = None
    kv: TensorQuant | None = None
    act_order: bool = False
    sparsity: Literal["", "2:4"] = ""

    @property
    def tolerance(self) -> Tolerance:
        """Bounds that a kernel or decoder of this scheme is held against."""
        exact = self.weight is None or NUMBER_TYPES[self.weight.dtype].kind == "int"
        return Tolerance(product=1e-5 if exact else 2e-5, cache=0.0 if self.kv is None else _CACHE_ERROR[self.kv.dtype])

    @property
    def weight_only(self) -> bool:
        """True where activations stay 16 bit."""
        return self.act is None

    def without_act(self) -> QuantScheme:
        """The same weights with 16-bit activations."""
        return replace(self, act=None)

    @classmethod
    def parse(cls, text: str) -> QuantScheme:
        """The scheme that a name means; the canonical name of the result is ``str(scheme)``.

        :raises SchemeError: naming the part that was not understood.
        """
        return _parse(text)

    def __str__(self) -> str:
        return _print(self)


_BASE = re.compile(
    r"^w(?P<w>int[2-8]|nvfp4|mxfp4|mxfp8|nf4|iq4nl|fp4bnb|fp4|fp8e5m2|fp8|ccq2|[2-8]|16)"
    r"(?:a(?P<a>int[48]|nvfp4|mxfp4|mxfp8|fp4|fp8e5m2|fp8|4|8|16))?"
    r"(?:c(?P<c>int[48]|nvfp4|fp8e5m2|fp8|4|8|16))?$"
)
_WORDS = re.compile(r"^weight[-_ ]?only[-_ ]+int([2-8])$")
_SEPARATOR = re.compile(r"[\s_,\-]+")


def _weight_part(word: str) -> TensorQuant | None:
    match word:
        case "16":
            return None
        case "nvfp4":
            return TensorQuant("fp4_e2m1", (1, 16), scale_dtype="e4m3")
        case "mxfp4":
            return TensorQuant("fp4_e2m1", (1, 32), scale_dtype="e8m0")
        case "mxfp8":
            return TensorQuant("fp8_e4m3", (1, 32), scale_dtype="e8m0")
        case "nf4":
            return TensorQuant("nf4", (1, 64))
        case "fp4":
            return TensorQuant("fp4_e2m1", (1, 32))
        case "iq4nl":
            return TensorQuant("iq4nl", (1, 32))
        case "fp4bnb":
            return TensorQuant("fp4_bnb", (1, 64))
        case "fp8" | "fp8e5m2":
            return TensorQuant("fp8_e4m3" if word == "fp8" else "fp8_e5m2", (1, 0))
        case "ccq2":
            return TensorQuant("ccq2", (1, 64))
    bits = int(word.removeprefix("int"))
    return TensorQuant(f"int{bits}", (1, 0) if bits == 8 else (1, 128))


_SPARSE_16 = TensorQuant("fp16", (0, 0))
"""Weights of 16 bit of which some are zero: they have no scales."""


def _act_part(word: str | None) -> TensorQuant | None:
    match word:
        case None | "16":
            return None
        case "nvfp4":
            return TensorQuant("fp4_e2m1", (1, 16), dynamic="local", scale_dtype="e4m3")
        case "mxfp4":
            return TensorQuant("fp4_e2m1", (1, 32), dynamic=True, scale_dtype="e8m0")
        case "mxfp8":
            return TensorQuant("fp8_e4m3", (1, 32), dynamic=True, scale_dtype="e8m0")
        case "fp4":
            return TensorQuant("fp4_e2m1", (1, 32), dynamic=True)
        case "fp8" | "fp8e5m2":
            return TensorQuant("fp8_e4m3" if word == "fp8" else "fp8_e5m2", (1, 0), dynamic=True)
    return TensorQuant(f"int{word.removeprefix('int')}", (1, 0), dynamic=True)


def _kv_part(word: str | None) -> TensorQuant | None:
    match word:
        case None | "16":
            return None
        case "fp8":
            return TensorQuant("fp8_e4m3", (0, 0))
        case "fp8e5m2":
            return TensorQuant("fp8_e5m2", (0, 0))
        case "nvfp4":
            return TensorQuant("fp4_e2m1", (1, 16), dynamic=True, scale_dtype="e4m3")
    return TensorQuant(f"int{word.removeprefix('int')}", (1, 0), dynamic=True)


_GRANULARITIES = {"tensor": (0, 0), "channel": (1, 0), "token": (1, 0), "head": (-1, 0)}


def _block_word(word: str) -> tuple[int, int] | None:
    if word in _GRANULARITIES:
        return _GRANULARITIES[word]
    if found := re.fullmatch(r"(?:g|group(?:size)?)(\d+)", word):
        size = int(found[1])
        if size == 0:
            raise SchemeError("group size 0 was found; a group needs at least one value, so write 'channel' for one group")
        return (1, size)
    if found := re.fullmatch(r"(?:b|block)(\d+)x(\d+)", word):
        if not int(found[1]) or not int(found[2]):
            raise SchemeError(f"block {found[1]}x{found[2]} was found; both extents must be at least 1")
        return (int(found[1]), int(found[2]))
    return None


def _apply_word(part: TensorQuant, word: str) -> TensorQuant | None:
    """The tensor with one suffix applied, or None where the suffix is not one."""
    if (block := _block_word(word)) is not None:
        return replace(part, block=block)
    match word:
        case "sym" | "symmetric":
            return replace(part, symmetric=True)
        case "asym" | "asymmetric" | "zp" | "zeropoint":
            return replace(part, symmetric=False)
        case "static":
            return replace(part, dynamic=False)
        case "dynamic":
            return replace(part, dynamic=True)
        case "local":
            return replace(part, dynamic="local")
        case "sfloat" | "se8m0" | "ue8m0" | "se4m3":
            return replace(part, scale_dtype="e8m0" if word == "ue8m0" else word[1:])  # type: ignore[arg-type]
    if word.startswith("rule="):
        return replace(part, rule=word[5:])
    if word.startswith("outlier="):
        return replace(part, outlier=float(word[8:]))
    return None


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> QuantScheme:
    lowered = text.strip().lower()
    if found := _WORDS.match(lowered):
        lowered = f"wint{found[1]}"
    base, *suffixes = [word for word in _SEPARATOR.split(lowered) if word] or [""]
    parts = _BASE.match(base)
    if parts is None:
        raise SchemeError(
            f"{text!r} is not a scheme name; a name such as W4A16_g128, W8A8, Wfp8Afp8, W4Afp8 or WNF4A8C8 was needed: "
            "W<weights>, A<activations>, C<KV cache>, then suffixes"
        )
    weight, act, kv = _weight_part(parts["w"]), _act_part(parts["a"]), _kv_part(parts["c"])
    act_order, sparsity = False, ""
    for suffix in suffixes:
        try:
            if suffix in ("actorder", "descact"):
                act_order = True
            elif suffix in ("2:4", "sparse24"):
                sparsity = "2:4"
            elif suffix.startswith("a:") and act is not None:
                act = _apply_all(act, suffix[2:])
            elif suffix.startswith("c:") and kv is not None:
                kv = _apply_all(kv, suffix[2:])
            elif suffix in ("static", "dynamic", "token"):
                if act is None:
                    raise SchemeError(f"{suffix!r} is about activations, which are 16 bit here")
                # A static scale is one number for the tensor: nobody stores one for each token.
                act = replace(act, dynamic=suffix != "static", block=(0, 0) if suffix == "static" else act.block)
            elif weight is not None:
                weight = _apply_all(weight, suffix)
                if act is not None and weight.granularity == "block" and suffix.startswith("b"):
                    act = replace(act, block=(1, weight.block[1]))
            else:
                raise SchemeError(f"{suffix!r} says something of a tensor that is 16 bit here")
        except SchemeError as error:
            raise SchemeError(f"scheme {text!r}: {error}") from None
    if weight is None and sparsity:
        weight = _SPARSE_16
    return QuantScheme(weight, act, kv, act_order, sparsity)  # type: ignore[arg-type]


def _apply_all(part: TensorQuant, words: str) -> TensorQuant:
    # A number such as 127.5 holds the separator itself.
    for word in re.split(r"\.(?!\d)", words):
        changed = _apply_word(part, word)
        if changed is None:
            raise SchemeError(
                f"suffix {word!r} is unknown; known are g<size>, channel, tensor, b<rows>x<columns>, sym, asym (zp), static, "
                "dynamic, actorder, 2:4, and a:... or c:... for activations and cache"
            )
        part = changed
    return part


def _weight_word(part: TensorQuant | None) -> str:
    if part is None:
        return "16"
    if part.dtype == "fp4_e2m1":
        return {"e4m3": "nvfp4", "e8m0": "mxfp4", "float": "fp4"}[part.scale_dtype]
    if part.dtype == "fp8_e4m3":
        return "mxfp8" if part.scale_dtype == "e8m0" and part.block == (1, 32) else "fp8"
    return {"nf4": "NF4", "iq4nl": "iq4nl", "fp4_bnb": "fp4bnb", "fp8_e5m2": "fp8e5m2", "ccq2": "ccq2"}.get(
        part.dtype, str(part.bits)
    )


def _differences(part: TensorQuant, default: TensorQuant) -> list[str]:
    """Suffix words that turn ``default`` into ``part``."""
    words = []
    if part.block != default.block:
        rows, columns = part.block
        named = {block: word for word, block in _GRANULARITIES.items() if word != "token"}
        words.append(named.get(part.block) or (f"g{columns}" if rows == 1 else f"b{rows}x{columns}"))
    if part.symmetric != default.symmetric:
        words.append("sym" if part.symmetric else "asym")
    if part.dynamic != default.dynamic:
        words.append("local" if part.dynamic == "local" else "dynamic" if part.dynamic else "static")
    if part.scale_dtype != default.scale_dtype:
        words.append(f"s{part.scale_dtype}")
    if part.rule:
        words.append(f"rule={part.rule}")
    if part.outlier:
        words.append(f"outlier={part.outlier:g}")
    return words


def _print(scheme: QuantScheme) -> str:
    weight_word = _weight_word(scheme.weight)
    name = f"W{weight_word}A{_weight_word(scheme.act)}"
    if scheme.kv is not None:
        name += f"C{_weight_word(scheme.kv)}"
    words: list[str] = []
    if scheme.weight is not None:
        default: TensorQuant | None = _weight_part(weight_word.lower()) or _SPARSE_16
        assert default is not None
        rows, columns = scheme.weight.block
        if scheme.weight.block == default.block and rows == 1 and columns and default.dtype.startswith("int"):
            words.append(f"g{columns}")
        words += _differences(scheme.weight, default)
    if scheme.act is not None:
        default = _act_part(_weight_word(scheme.act).lower())
        assert default is not None
        if scheme.weight is not None and scheme.weight.granularity == "block":
            default = replace(default, block=(1, scheme.weight.block[1]))
        if changes := _differences(scheme.act, default):
            words.append("static" if changes == ["tensor", "static"] else "a:" + ".".join(changes))
    if scheme.kv is not None:
        default = _kv_part(_weight_word(scheme.kv).lower())
        assert default is not None
        # One row of a cache is a token, of a weight a channel.
        if changes := ["token" if word == "channel" else word for word in _differences(scheme.kv, default)]:
            words.append("c:" + ".".join(changes))
    if scheme.act_order:
        words.append("actorder")
    if scheme.sparsity:
        words.append(scheme.sparsity)
    return "_".join([name, *words])
