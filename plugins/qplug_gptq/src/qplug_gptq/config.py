"""The ``quantization_config`` of GPTQ checkpoints, or ``quantize_config.json``, as rules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qplug_core.config import QuantizationConfig, Rule
from qplug_core.errors import ConfigError
from qplug_core.keys import check_agreement, list_of_names, says_nothing
from qplug_core.match import Matcher
from qplug_core.scheme import TensorQuant

from . import activation, headers
from .keys import METADATA, OVERRIDES, check, layer_quant, layout_of, numbers

if TYPE_CHECKING:
    from qplug_core.config import LayerQuant
    from qplug_core.source import Source


def parse(source: Source) -> QuantizationConfig:
    """Rules, in the order in which they decide.

    16-bit embeddings, ``modules_to_not_convert``, ``dynamic`` (first match wins), then all linear layers, or those of
    ``modules_in_block_to_quantize``. Which layers have a g_idx, and whether lm_head is quantized, is read from the headers.

    :raises ConfigError: for a key that is not understood, two that contradict each other, or values the headers contradict.
    """
    raw = source.quant_config
    if raw is None:
        raise ConfigError(
            "there is neither a quantization_config in config.json nor a quantize_config.json; add one with bits and "
            "group_size"
        )
    check(raw)
    base = numbers(raw)
    for name, other in source.files.items():
        if name in ("quantize_config.json", "quantization_config.json") and isinstance(other, dict) and other is not raw:
            check_agreement(base, numbers(other), name)
    inferred: list[str] = []
    layout, said = layout_of(base, raw, inferred)
    make = _Maker(base, layout, activation.read(raw, base.get("bits")), headers.stored_opts(source, inferred))
    if layout == "gptq":
        # auto-round writes asymmetric GPTQ files as v1 and says so nowhere.
        if not said and not (base.get("sym") is False and producer(raw).startswith("auto-round")):
            make.opts["version"] = "unsaid"
        if writes_whole_words(raw):
            make.opts["whole_words"] = True
    if layout not in ("marlin", "marlin_24"):
        if base.get("sym") is None:
            inferred.append("sym is not said: planned with zero points, which also holds symmetric weights")
        if base.get("desc_act") is None:
            inferred.append("desc_act is not said: taken as false; a g_idx that says otherwise is obeyed")
    if make.act is not None and make.act.dtype == "int8" and make.act.dynamic:
        inferred.append("activation scales are amax / 127: the config says int8 and no rule")
    default = make({})
    rules = [Rule(Matcher("Embedding", "class"), None, implicit=True, origin="embeddings are not quantized by GPTQ")]
    dynamic = _dynamic(raw.get("dynamic") or {}, make)
    named = raw.get("lm_head") or any(rule.quant is not None and "lm_head" in rule.matcher.text for rule in dynamic)
    if not (named or headers.head_quantized(source, inferred)):
        rules.append(Rule(Matcher("lm_head", "suffix"), None, implicit=True, origin="lm_head is false or not said"))
    rules += skipped(raw.get("modules_to_not_convert"), source, inferred)
    rules += dynamic
    allowed = _names(raw, "modules_in_block_to_quantize")
    if not allowed:
        rules.append(Rule(Matcher("", "all"), default, origin="bits and group_size"))
    else:
        rules += [Rule(Matcher(text, "substring"), default, origin="modules_in_block_to_quantize") for text in allowed]
        if raw.get("lm_head"):
            rules.append(Rule(Matcher("lm_head", "suffix"), default, origin="lm_head"))
        for end in headers.left_out(source, allowed, inferred):
            rules.append(Rule(Matcher(end, "suffix"), default, implicit=True, origin="the file holds it packed"))
    headers.check(source, rules)
    metadata = {key: value for key, value in raw.items() if key in METADATA or says_nothing(value)}
    ignorable = dict(headers.IGNORABLE) if layout in ("marlin", "marlin_24") else {}
    if raw.get("data_type") == "fp8_to_int_sym":
        ignorable["w_bf16_to_fp8_scale"] = "the FP8 step that weights took on their way to integers; scales hold it already"
    return QuantizationConfig(
        "gptq", rules, producer=producer(raw), inferred=inferred, metadata=metadata, ignorable=ignorable
    )


class _Maker:
    """Makes the quantization of layers that differ from the defaults of the config in a few keys."""

    def __init__(self, base: Mapping[str, Any], layout: str, act: TensorQuant | None, opts: dict[str, Any]) -> None:
        self.base, self.layout, self.act, self.opts = base, layout, act, opts

    def __call__(self, overrides: Mapping[str, Any]) -> LayerQuant:
        return layer_quant({**self.base, **overrides}, self.layout, self.opts, self.act)


def producer(raw: Mapping[str, Any]) -> str:
    """What the config says of its maker: ``gptqmodel:7.6.0``, ``auto-round:0.16.1``, or nothing."""
    meta = raw.get("meta")
    made_by = meta.get("quantizer") if isinstance(meta, dict) else raw.get("quantizer")
    if isinstance(made_by, list):
        made_by = ", ".join(map(str, made_by))
    if made_by:
        return str(made_by)
    provider = raw.get("provider") or ("auto-round" if raw.get("autoround_version") else "")
    return f"{provider}:{raw.get('autoround_version', '')}".rstrip(":") if provider else ""


def writes_whole_words(raw: Mapping[str, Any]) -> bool:
    """True for producers that store zero points minus one by subtracting from whole words, so that a borrow can be undone.

    GPTQModel in every version that writes asymmetric v1 files, and auto-round since the packing that 0.16 has.
    """
    for name in producer(raw).lower().split(", "):
        tool, _, version = name.partition(":")
        numbers_ = tuple(int(word) for word in re.findall(r"\d+", version)[:2])
        if (tool == "gptqmodel" and numbers_ >= (0, 9)) or (tool == "auto-round" and numbers_ >= (0, 16)):
            return True
    return False


def skipped(entries: Any, source: Source, inferred: list[str], key: str = "modules_to_not_convert") -> list[Rule]:
    """Rules of an ignore list: substrings, as vLLM and transformers match it.

    Where the file holds packed codes for a module that an entry means only as a part of a word (``gate`` in ``gate_proj``), the
    entry means whole components.

    :raises ConfigError: for a list of anything but names.
    """
    rules = []
    packed = headers.quantized(source)
    for text in _names({key: entries}, key):
        swallowed = next((module for module in packed if text in module), None)
        if swallowed is None:
            rules.append(Rule(Matcher(text, "substring"), None, origin=key))
        else:
            inferred.append(f"{key} entry {text!r} means whole parts of names: the file holds {swallowed} packed")
            rules.append(Rule(Matcher(text, "component"), None, origin=key))
    return rules


def _dynamic(rules: Any, make: _Maker) -> list[Rule]:
    if not isinstance(rules, dict):
        raise ConfigError(
            f"the GPTQ config says dynamic: {rules!r}; an object of patterns and overrides was needed, so correct it"
        )
    made = []
    for pattern, overrides in rules.items():
        origin = f"dynamic {pattern}"
        overrides = overrides or {}
        if pattern.startswith("-:") or overrides.get("bits") in (16, 32):
            made.append(Rule(Matcher(pattern.removeprefix("-:").removeprefix("+:"), "regex"), None, origin=origin))
            continue
        for key, value in overrides.items():
            if key not in OVERRIDES and key not in METADATA and not says_nothing(value):
                raise ConfigError(
                    f"the GPTQ rule {pattern!r} overrides {key!r} ({value!r}), which may change the numbers; "
                    f"{', '.join(OVERRIDES)} are understood, so use a newer qplug-gptq"
                )
        values = {key: overrides[key] for key in OVERRIDES if key in overrides}
        made.append(Rule(Matcher(pattern.removeprefix("+:"), "regex"), make(values), origin=origin))
    return made


def _names(raw: Mapping[str, Any], key: str) -> list[str]:
    """A list of names, flattened; empty where it is not said."""
    entries = raw.get(key)
    if says_nothing(entries):
        return []
    flat: list[Any] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        flat += entry if isinstance(entry, list) else [entry]
    return list_of_names(flat, f"the GPTQ config says {key}")
