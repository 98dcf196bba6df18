"""auto-round checkpoints: ``quant_method: auto-round``, whose ``packing_format`` says which tool's tensors they hold.

========================== ========================================================================================
auto_round:auto_gptq       GPTQ tensors, zero points minus one (v1); also what a config without ``packing_format`` means
auto_round, :gptqmodel     GPTQ tensors, zero points as they are (v2)
auto_round:auto_awq        AWQ tensors (layout ``awq_gemm``)
auto_round:llm_compressor  compressed-tensors (layout ``pack-quantized``)
========================== ========================================================================================

``extra_config`` overrides single layers: a key that is a module means that module, any other is a regular expression that
is searched for in names. ``block_name_to_quantize`` (or ``to_quant_block_names``) names the blocks that are quantized, so
that everything outside of them, lm_head too, stays 16 bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qplug_core.config import LayerQuant, QuantizationConfig, Rule
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.keys import says_nothing
from qplug_core.match import Matcher
from qplug_core.weight import OpaqueWeight, QuantWeight

from . import activation, headers
from .config import producer, skipped, writes_whole_words
from .keys import METADATA, check, layer_quant, numbers
from .loader import GPTQFormat

if TYPE_CHECKING:
    from qplug_core.source import Source

PACKINGS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_awq": "awq_gemm",
    "auto_round:awq": "awq_gemm",
    "auto_round:llm_compressor": "pack-quantized",
}
"""Layout of each packing."""

METHODS = ("auto-round", "auto_round", "intel/auto-round")
KEYS = ("packing_format", "extra_config", "to_quant_block_names", "block_name_to_quantize", "quant_block_list")
BITS = {"awq_gemm": (4,), "pack-quantized": (2, 3, 4, 8)}
OVERRIDES = ("bits", "group_size", "sym", "data_type", *activation.KEYS)
WIDE = (16, 32)
"""Bits of a layer that is not quantized."""

NOT_WRITTEN = "the auto-round format is read and not written; store the weights as gptq, which the same engines read"


class AutoRoundFormat(GPTQFormat):
    """The config of auto-round, over layouts of this plugin and others."""

    name = "auto-round"

    def parse(self, source: Source) -> QuantizationConfig:
        """See :func:`parse`."""
        return parse(source)

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """Refused.

        :raises CannotEncode: always.
        """
        raise CannotEncode(NOT_WRITTEN)

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """Refused.

        :raises CannotEncode: always.
        """
        raise CannotEncode(NOT_WRITTEN)

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """Refused.

        :raises CannotEncode: always.
        """
        raise CannotEncode(NOT_WRITTEN)


def parse(source: Source) -> QuantizationConfig:
    """Rules, in the order in which they decide: 16-bit embeddings, ``extra_config``, ignore lists, then blocks or all layers.

    :raises ConfigError: for a key that is not understood, or values the headers contradict.
    """
    raw = source.quant_config
    if raw is None:
        raise ConfigError(
            "there is no quantization_config with quant_method 'auto-round'; fetch the config.json that belongs to the weights"
        )
    check(raw, KEYS, "auto-round")
    if not says_nothing(raw.get("dynamic")):
        raise ConfigError(
            "the auto-round config has dynamic rules, which belong to quant_method 'gptq'; name the tool that wrote the file"
        )
    base = numbers(raw, METHODS)
    inferred: list[str] = []
    layout = _layout(raw, inferred)
    if base.get("checkpoint_format", layout) != layout:
        raise ConfigError(
            f"the auto-round config says checkpoint_format: {base['checkpoint_format']!r} and packing_format: "
            f"{raw.get('packing_format')!r}, which is {layout}; remove checkpoint_format, which auto-round does not read"
        )
    opts = headers.stored_opts(source, inferred) if layout in ("gptq", "gptq_v2") else {}
    if layout == "gptq" and writes_whole_words({**raw, "provider": "auto-round"}):
        opts["whole_words"] = True
    if base.get("sym") is None:
        inferred.append("sym is not said: planned with zero points, which also holds symmetric weights")

    def make(overrides: Mapping[str, Any]) -> LayerQuant:
        values = {**raw, **base, **overrides}
        return _quant(values, layout, opts)

    default = make({})
    rules = [Rule(Matcher("Embedding", "class"), None, implicit=True, origin="embeddings are not quantized by auto-round")]
    rules += _extra(raw.get("extra_config") or {}, make, source)
    rules += skipped(raw.get("modules_to_not_convert"), source, inferred)
    rules += _blocks(raw, default, source, inferred)
    headers.check(source, rules)
    metadata = {key: value for key, value in raw.items() if key in METADATA - set(KEYS) or says_nothing(value)}
    ignorable = {}
    if raw.get("data_type") == "fp8_to_int_sym":
        ignorable["w_bf16_to_fp8_scale"] = "the FP8 step that weights took on their way to integers; scales hold it already"
    return QuantizationConfig(
        "auto-round", rules, producer=producer({"provider": "auto-round", **raw}), inferred=inferred, metadata=metadata,
        ignorable=ignorable,
    )  # fmt: skip


def _layout(raw: Mapping[str, Any], inferred: list[str]) -> str:
    packing = raw.get("packing_format")
    if says_nothing(packing):
        inferred.append("packing_format is not said: GPTQ tensors with zero points minus one, auto-round's default")
        return "gptq"
    # Kernels are named after a further colon in older files: auto_round:gptq:exllamav2.
    layout = PACKINGS.get(":".join(str(packing).split(":")[:2]))
    if layout is None:
        raise ConfigError(
            f"the auto-round config says packing_format: {packing!r}; {' or '.join(PACKINGS)} was needed, so export the model in "
            "one of them"
        )
    return layout


def _quant(values: Mapping[str, Any], layout: str, opts: Mapping[str, Any]) -> LayerQuant:
    kind = values.get("data_type") or "int"
    if kind not in ("int", "fp8_to_int_sym"):
        raise ConfigError(
            f"the auto-round config says data_type: {kind!r}; 'int' was needed in this packing, so export the model with format "
            "llm_compressor, which names its layouts"
        )
    act = activation.read(values, values.get("bits"))
    if layout in ("gptq", "gptq_v2"):
        return layer_quant(values, layout, opts, act)
    if act is not None:
        raise ConfigError(
            f"the auto-round config quantizes activations in the packing of {layout}, which is not understood; export the model "
            "with format llm_compressor"
        )
    if values.get("bits") not in BITS[layout]:
        raise ConfigError(
            f"the auto-round config says bits: {values.get('bits')!r}; {' or '.join(map(str, BITS[layout]))} was needed in layout "
            f"{layout}, so correct it"
        )
    plain = layer_quant({**values, "desc_act": None}, "gptq", {})
    return LayerQuant(plain.scheme, layout)


def _extra(entries: Any, make: Any, source: Source) -> list[Rule]:
    """Rules of ``extra_config``: modules first, then patterns, as auto-round lets a module's own entry win."""
    if not isinstance(entries, dict):
        raise ConfigError(
            f"the auto-round config says extra_config: {entries!r}; an object of layers was needed, so correct it"
        )
    modules, patterns = [], []
    stored = {name.rpartition(".")[0] for name in source.tensors}
    for name, overrides in entries.items():
        overrides = overrides or {}
        for key, value in overrides.items():
            if key not in OVERRIDES and key not in METADATA and not says_nothing(value):
                raise ConfigError(
                    f"the auto-round extra_config entry {name!r} overrides {key!r} ({value!r}), which may change the numbers; "
                    f"{', '.join(OVERRIDES)} are understood, so use a newer qplug-gptq"
                )
        origin = f"extra_config {name}"
        wide = overrides.get("bits") in WIDE
        quant = None if wide else make({key: overrides[key] for key in OVERRIDES if overrides.get(key) is not None})
        is_pattern = name not in stored and (bool(stored) or re.escape(name) != name.replace(".", r"\.").replace("-", r"\-"))
        if is_pattern:
            patterns.append(Rule(Matcher(name, "search"), quant, origin=origin))
        else:
            modules.append(Rule(Matcher(name, "exact"), quant, origin=origin))
    return modules + patterns


def _blocks(raw: Mapping[str, Any], default: LayerQuant, source: Source, inferred: list[str]) -> list[Rule]:
    """Rules for the layers that are quantized."""
    key = next((k for k in ("block_name_to_quantize", "to_quant_block_names", "quant_block_list") if raw.get(k)), "")
    names = _flat(raw.get(key)) if key else []
    allowed = _flat(raw.get("modules_in_block_to_quantize"))
    rules = []
    if headers.head_quantized(source, inferred) or raw.get("lm_head"):
        rules.append(Rule(Matcher("lm_head", "suffix"), default, implicit=True, origin="lm_head is stored packed, or said"))
    else:
        rules.append(Rule(Matcher("lm_head", "suffix"), None, implicit=True, origin="lm_head lies outside of the blocks"))
    if allowed:
        return rules + [Rule(Matcher(text, "search"), default, origin="modules_in_block_to_quantize") for text in allowed]
    if not names:
        return [*rules, Rule(Matcher("", "all"), default, origin="bits and group_size")]
    packed = headers.quantized(source)
    for name in names:
        cut = next((m for m in packed if m.startswith(name) and not f"{m}.".startswith(f"{name}.")), None)
        if cut is None:
            rules.append(Rule(Matcher(name, "prefix"), default, origin=key))
        else:
            inferred.append(f"{key} {name!r} means every name that begins so: the file holds {cut} packed")
            rules.append(Rule(Matcher(re.escape(name), "regex"), default, origin=key))
    return rules


def _flat(entries: Any) -> list[str]:
    """Names of a string with commas, a list, or a list of lists."""
    if says_nothing(entries):
        return []
    if isinstance(entries, str):
        return [name.strip() for name in entries.split(",") if name.strip()]
    if not isinstance(entries, list):
        raise ConfigError(f"the auto-round config names blocks by {entries!r}; a string or a list was needed, so correct it")
    return list(dict.fromkeys(name for entry in entries for name in _flat(entry)))
