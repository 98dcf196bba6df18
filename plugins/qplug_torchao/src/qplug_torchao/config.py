"""The ``quantization_config`` of torchao checkpoints and the metadata of their files: read."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qplug_core.config import LayerQuant, ModuleName, QuantizationConfig, Rule
from qplug_core.errors import ConfigError
from qplug_core.keys import list_of_names, take
from qplug_core.match import Matcher

from .schemes import of_config, of_tensor, typed

if TYPE_CHECKING:
    from qplug_core.source import Source

KEYS = ("quant_method", "quant_type", "modules_to_not_convert", "include_input_output_embeddings", "untie_embedding_weights")
METADATA = ("quant_type_kwargs", "torchao_version")
PARTS = ("qdata", "scale", "zero_point", "act_pre_scale")


def parse(source: Source) -> QuantizationConfig:
    """Rules in the order in which they decide: names that are not converted, what the metadata of the file says of a layer
    where it differs from the config, the config's own names and patterns, its default.

    Without ``modules_to_not_convert``, the output embedding stays 16 bit, as transformers leaves it.

    :raises ConfigError: for a key, a config or a tensor class that is not known.
    """
    raw = source.quant_config or {}
    values = take(raw, dict.fromkeys(KEYS), METADATA, "the torchao config", "qplug-torchao")
    skip = list_of_names(values["modules_to_not_convert"], "the torchao config says modules_to_not_convert")
    first = [Rule(Matcher(name, "component"), None, origin="modules_to_not_convert") for name in skip]
    embeddings = bool(values["include_input_output_embeddings"])
    if not embeddings:
        origin = "include_input_output_embeddings is not set"
        first.append(Rule(Matcher("Embedding", "class"), None, implicit=True, origin=origin))
    if not embeddings and not skip:
        origin = "modules_to_not_convert names nothing, so the output embedding is not converted"
        first.append(Rule(Matcher("lm_head", "suffix"), None, implicit=True, origin=origin))
    own = _rules(values["quant_type"])
    inferred: list[str] = []
    rules = [*_from_metadata(source, first, own, inferred), *first, *own]
    metadata = {key: raw[key] for key in METADATA if key in raw}
    return QuantizationConfig("torchao", rules, producer="torchao", inferred=inferred, metadata=metadata)


def _rules(quant_type: Any) -> list[Rule]:
    """The rules of ``quant_type``: one config for all, or configs by name, pattern (``re:``, the whole name) and default."""
    if not isinstance(quant_type, Mapping) or set(quant_type) != {"default"}:
        raise ConfigError(
            f"the torchao config says quant_type: {quant_type!r}; an object with the one key 'default' was needed, so save the "
            "checkpoint again with transformers 5 and torchao 0.15 or newer"
        )
    config = quant_type["default"]
    kind, data = typed(config, "quant_type")
    if kind not in ("FqnToConfig", "ModuleFqnToConfig"):
        return [Rule(Matcher("", "all"), _quant(config, "quant_type"), origin="quant_type")]
    by_name = data.get("fqn_to_config") or data.get("module_fqn_to_config") or {}
    if not isinstance(by_name, Mapping) or not by_name:
        raise ConfigError(f"{kind} names no module; an object of names and configs was needed, so correct the config")
    exact, patterns, default = [], [], []
    for name, value in by_name.items():
        quant = None if value is None else _quant(value, f"{kind} of {name}")
        if name == "_default":
            default.append(Rule(Matcher("", "all"), quant, origin="_default"))
        elif name.startswith("re:"):
            # A pattern may mean the parameter instead of the module.
            pattern = re.sub(r"\\?\.weight\$?$", "", name[3:])
            patterns.append(Rule(Matcher(rf"(?:{pattern})$", "regex"), quant, origin=kind))
        else:
            exact.append(Rule(Matcher(name.removesuffix(".weight"), "exact"), quant, origin=kind))
    return [*exact, *patterns, *default]


def _quant(config: Any, where: str) -> LayerQuant:
    return LayerQuant(of_config(config, where), "torchao")


def _from_metadata(source: Source, first: list[Rule], own: list[Rule], inferred: list[str]) -> list[Rule]:
    """A rule for each layer of which the metadata says another scheme than the config, whose rules are ``first`` and ``own``."""
    meant, decided = QuantizationConfig("torchao", own), QuantizationConfig("torchao", [*first, *own])
    rules: list[Rule] = []
    for name, text in source.metadata.items():
        module = name.removesuffix(".weight")
        stored = source.tensors.get(f"{module}._weight_qdata")
        if module == name or (stored is None and '"_type": "Tensor"' in text):
            continue
        try:
            entry = json.loads(text)
        except ValueError:
            entry = text
        kind, _ = typed(entry, f"metadata of {name}")
        quant = meant.quant_for(ModuleName((module,)))
        shape, dtype = (stored.shape, stored.dtype) if stored else ((), "")
        scheme = of_tensor(entry, name, shape, dtype, quant.scheme if quant else None)
        if foreign := set(entry.get("_tensor_data_names", ())) - set(PARTS):
            raise ConfigError(f"{name} is a {kind} with {sorted(foreign)[0]}, which is not read; quantize again without it")
        said = decided.quant_for(ModuleName((module,)))
        if said is None or said.scheme != scheme:
            origin = "metadata of the file"
            rules.append(Rule(Matcher(module, "exact"), LayerQuant(scheme, "torchao"), implicit=True, origin=origin))
    for rule in decided.rules:
        rule.matcher.hits = 0
    found = Counter(str(rule.quant.scheme) for rule in rules if rule.quant)
    inferred += [
        f"{count} layers are {scheme} in the metadata of the file, whatever the config says"
        for scheme, count in found.items()
    ]
    return rules
