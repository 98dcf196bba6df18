"""The KV cache in a plan: what a user asks for, what a checkpoint says, and which stored scales that claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from .config import QuantizationConfig
from .cover import Cover
from .errors import SchemeError
from .format import CheckpointFormat
from .layer import LayerSpec
from .quant_plan import CacheDecision
from .scheme import QuantScheme, TensorQuant

Wanted = TensorQuant | Literal["16bit"] | None


def kv_scheme(text: str | None) -> Wanted:
    """What ``--kv-cache`` means: None (or ``auto``) is the checkpoint's own, ``16bit`` none, else ``fp8``, ``int8``, ``int4``,
    ``nvfp4``, ``C8``, with suffixes such as ``fp8.head`` or ``int4.g32``.

    :raises SchemeError: for a word that is none of these.
    """
    if text is None or text.lower() == "auto":
        return None
    word, _, suffixes = text.lower().replace("fp8_e", "fp8e").partition(".")
    if word in ("16bit", "16", "bf16", "bfloat16", "fp16", "float16"):
        return "16bit"
    word = {"fp8e4m3": "fp8", "8": "int8", "4": "int4"}.get(word.removeprefix("c"), word.removeprefix("c"))
    try:
        kv = QuantScheme.parse(f"W16A16C{word}" + (f"_c:{suffixes}" if suffixes else "")).kv
    except SchemeError:
        raise SchemeError(
            f"KV cache {text!r} was asked for; auto, 16bit, fp8, fp8_e5m2, int8, int4 or nvfp4 was needed (C8 and the like too)"
        ) from None
    assert kv is not None
    return kv


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
