"""The KV cache in a plan: what a user asks for, what a checkpoint says, and which stored scales that claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from .aliases import SCHEME_WORDS, did_you_mean
from .config import QuantizationConfig
from .cover import Cover
from .errors import SchemeError
from .format import CheckpointFormat
from .layer import LayerSpec
from .quant_plan import CacheDecision
from .scheme import QuantScheme, TensorQuant

Wanted = TensorQuant | Literal["16bit"] | None

SIXTEEN = ("16bit", "16", "c16", "bf16", "bfloat16", "fp16", "float16", "half", "none")
OWN = ("auto", "16bit", "fp8", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "nvfp4", "c8", "c4")
"""Words that need no explanation."""
CACHE_WORDS = {
    "fp8_e4m3": "fp8", "fp8e4m3": "fp8", "cfp8_e4m3": "fp8", "fp8_e5m2": "fp8e5m2", "cfp8_e5m2": "fp8e5m2", "8": "int8", "c8": "int8",
    "4": "int4", "c4": "int4",
    # FastDeploy kv_cache_quant_type
    "float8_e4m3fn": "fp8", "block_wise_fp8": "fp8", "int8_zp": "int8.asym", "int4_zp": "int4.asym",
    # vLLM, SGLang, llm-compressor, ModelOpt, RTP-LLM
    "fp8_inc": "fp8", "fp4_e2m1": "nvfp4", "fp4": "nvfp4", "float8": "fp8", "e4m3": "fp8", "e5m2": "fp8e5m2",
    "fp8_kv": "fp8", "kv_fp8": "fp8", "fp8_kv_cache": "fp8", "int8_kv_cache": "int8", "nvfp4_kv": "nvfp4",
}  # fmt: skip
"""Words of engines for a KV cache, lower case."""
NO_CACHE = {
    "float8_e4m3fn_zp": "and floats have no zero points; write fp8",
    "fp8_ds_mla": "which keeps a compressed latent that the reference engine has no cache for; write fp8",
}
"""Words of engines that stay unread, with what they are and what to write."""


def kv_scheme(text: str | None) -> Wanted:
    """What ``--kv-cache`` means: None (or ``auto``) is the checkpoint's own, ``16bit`` none, else ``fp8``, ``int8``, ``int4``,
    ``nvfp4``, ``C8``, with suffixes such as ``int8.asym`` or ``int4.g32``; of a whole scheme (``W8A8C8``) its cache.

    :raises SchemeError: for a word that is none of these.
    """
    word = "auto" if text is None else text.strip().lower()
    if word == "auto":
        return None
    if word in SIXTEEN:
        return "16bit"
    if word in NO_CACHE:
        raise SchemeError(f"KV cache {text!r} was asked for, {NO_CACHE[word]}")
    base, _, suffixes = CACHE_WORDS.get(word, word).partition(".")
    base = CACHE_WORDS.get(base, base).removeprefix("c")
    try:
        kv = QuantScheme.parse(f"W16A16C{base}" + (f"_c:{suffixes}" if suffixes else "")).kv
    except SchemeError:
        kv = _cache_of_scheme(word, text)
    return "16bit" if kv is None else kv


def _cache_of_scheme(word: str, text: str | None) -> TensorQuant | None:
    try:
        return QuantScheme.parse(SCHEME_WORDS.get(word, word)).kv
    except SchemeError:
        near = did_you_mean(word, [*OWN, *CACHE_WORDS, *NO_CACHE])
        raise SchemeError(
            f"KV cache {text!r} was asked for; auto, 16bit, fp8, fp8_e5m2, int8, int4 or nvfp4 was needed, or a scheme such as W8A8C8{near}"
        ) from None


def kv_meaning(text: str | None) -> str:
    """One sentence where ``text`` is another word for a cache, else nothing."""
    wanted = kv_scheme(text)
    if text is None or wanted is None or text.strip().lower() in (*OWN, "16bit"):
        return ""
    meant = "16 bit" if wanted == "16bit" else cache_words(wanted)
    return f"KV cache {text!r} means {meant}"


def cache_words(kv: TensorQuant) -> str:
    """A cache that is asked for, in words: ``int8 with zero points, a scale for each token and head``."""
    name = {"fp8_e4m3": "fp8 (e4m3)", "fp8_e5m2": "fp8 (e5m2)"}.get(kv.dtype, kv.dtype)
    if kv.dtype == "fp4_e2m1":
        name = "nvfp4" if kv.scale_dtype == "e4m3" else "fp4"
    channels = {0: "", 1: " and channel"}.get(kv.block[1], f" and group of {kv.block[1]} channels")
    first = "" if kv.dynamic else "the file's scales where it has them, else "
    return f"{name}{'' if kv.symmetric else ' with zero points'}, {first}a scale for each token and head{channels}"


def plan_caches(
    layers: Sequence[LayerSpec], wanted: Wanted, config: QuantizationConfig, fmt: CheckpointFormat | None, cover: Cover
) -> tuple[list[CacheDecision], list[str]]:
    """Claim the scales of every attention layer; say how its keys and values are kept, and what the reader should know."""
    specs = [layer for layer in layers if layer.op == "kv_cache"]
    found = [_claim_scales(layer, fmt, cover) for layer in specs]
    own = config.kv
    for scales in found:
        if len(scales.keys() & {"k_scale", "v_scale"}) == 1:
            cover.mistake(f"{next(iter(scales.values()))} is a KV-cache scale and the one of the other half is not stored")
        if scales and own is None and wanted is None:
            cover.mistake(f"{next(iter(scales.values()))} is a KV-cache scale and the config names no KV-cache scheme")
    if own is not None and not specs:
        return [], [f"the config has a KV-cache scheme, {QuantScheme(kv=own)}, and the engine named no attention layer"]
    scheme = own if wanted is None else wanted
    if scheme is None or scheme == "16bit":
        kept = f"the KV cache stays 16 bit, as was asked, though the checkpoint's is {QuantScheme(kv=own)}"
        return [], [kept] if own is not None else []
    notes = []
    made = [_decide(layer, scheme, own, scales, wanted is not None) for layer, scales in zip(specs, found, strict=True)]
    if any(cache.unit_scale for cache in made):
        notes.append(
            "the config has a KV cache with stored scales and the file holds none: they are 1, as vLLM and TensorRT-LLM take them"
        )
    if any(cache.scheme != scheme for cache in made):
        notes.append("the file holds no KV-cache scales, so they are computed for each token and head")
    return made, notes


def _claim_scales(layer: LayerSpec, fmt: CheckpointFormat | None, cover: Cover) -> dict[str, str]:
    scales: dict[str, str] = {}
    if fmt is None:
        return scales
    for (part,) in layer.alternatives:
        for role, names in fmt.kv_tensors(part.name).items():
            options = (names,) if isinstance(names, str) else names
            name = next((n for n in options if n in cover.tensors), None)
            if name is not None and role not in scales:
                if name not in scales.values():  # AutoFP8 stores one scale for keys and values.
                    cover.claim(name, f"{layer.name} {role}")
                scales[role] = name
    return scales


def _decide(
    layer: LayerSpec, scheme: TensorQuant, own: TensorQuant | None, scales: dict[str, str], asked: bool
) -> CacheDecision:
    """``scheme`` for one layer: with the stored scales where they are this scheme's, else with scales of its own."""
    usable = own is not None and own.dtype == scheme.dtype and {"k_scale", "v_scale"} <= scales.keys()
    if scheme.dynamic is True or usable:
        return CacheDecision(layer.name, scheme, scales if usable else {})
    if not asked:
        return CacheDecision(layer.name, scheme, {}, unit_scale=True)
    return CacheDecision(layer.name, replace(scheme, block=(1, 0), dynamic=True), {})
