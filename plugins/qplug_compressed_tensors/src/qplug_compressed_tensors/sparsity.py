"""The ``sparsity_config`` of compressed-tensors checkpoints: which layers are stored as 2:4 sparse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qplug_core.config import LayerQuant, ModuleName, QuantizationConfig, Rule
from qplug_core.errors import ConfigError
from qplug_core.keys import check_keys
from qplug_core.match import Matcher
from qplug_core.scheme import QuantScheme, TensorQuant

from .args import PLUGIN
from .layouts import GONE, SPARSE
from .targets import matcher

if TYPE_CHECKING:
    from qplug_core.source import Source

KEYS = ("format", "targets", "ignore")
METADATA = ("global_sparsity", "sparsity_structure", "registry_requires_subclass")

PLAIN = QuantScheme(TensorQuant("fp16", (0, 0)), sparsity="2:4")
"""Sparse weights of 16 bit."""


def sparse_rules(sparsity: Mapping[str, Any], rules: list[Rule], source: Source, inferred: list[str]) -> list[Rule]:
    """``rules`` with the 2:4 sparse layers among them, which have a layout of their own.

    The headers decide, because a producer leaves layers dense whose weights are not 2:4. An engine that has none yet
    gets the word of the config.

    :raises ConfigError: for sparse layouts that are not read.
    """
    check_keys(sparsity, KEYS + METADATA, "sparsity_config", PLUGIN)
    layout = sparsity.get("format")
    if layout in GONE:
        raise ConfigError(f"sparsity_config has format {layout!r}, which is not read: {GONE[str(layout)]}")
    if layout in (None, "", "dense"):
        return rules
    if layout != SPARSE:
        raise ConfigError(f"sparsity_config has format {layout!r}; {SPARSE!r} or 'dense' was needed, so use a newer plugin")
    if not source.tensors:
        return _as_said(sparsity, rules)
    quants = QuantizationConfig("", rules)
    modules = [name.removesuffix(".bitmask") for name in source.tensors if name.endswith(".bitmask")]
    inferred.append(f"2:4 sparse layers are those with a bitmask in the file: {len(modules)}")
    made = []
    for module in modules:
        quant = quants.quant_for(ModuleName((module,)))
        made.append(Rule(Matcher(module, "exact"), sparse_quant(quant), implicit=True, origin="a bitmask is stored"))
    for rule in rules:
        # Its modules are taken by rules of their own now, so that it meant none is no news.
        rule.implicit = rule.matcher.hits > 0
        rule.matcher.hits = 0
    return made + rules


def sparse_quant(quant: LayerQuant | None) -> LayerQuant:
    """The same numbers, 2:4 sparse.

    :raises ConfigError: for numbers that sparse layouts do not hold.
    """
    if quant is None:
        return LayerQuant(PLAIN, SPARSE)
    part = quant.scheme.weight
    assert part is not None
    if part.dtype not in ("int8", "fp8_e4m3") or part.scale_dtype != "float" or not part.symmetric or quant.scheme.act_order:
        raise ConfigError(
            f"2:4 sparse weights of scheme {quant.scheme} were found; 16 bit, FP8 or symmetric INT8 was needed, so store the pruned "
            "weights dense"
        )
    return LayerQuant(replace(quant.scheme, sparsity="2:4"), SPARSE)


def _as_said(sparsity: Mapping[str, Any], rules: list[Rule]) -> list[Rule]:
    """Every quantized layer is sparse but those that sparsity_config ignores; without quantization, its targets are."""
    ignored = [text for text in sparsity.get("ignore") or [] if isinstance(text, str)]
    targets = [text for text in sparsity.get("targets") or ["Linear"] if isinstance(text, str)]
    quantized = [rule for rule in rules if rule.quant is not None]
    if not quantized:
        made = [Rule(matcher(text), sparse_quant(None), origin="sparsity_config targets") for text in targets]
        return [Rule(matcher(text), None, origin="sparsity_config ignore") for text in ignored] + made
    return [rule if rule.quant is None else replace(rule, quant=sparse_quant(rule.quant)) for rule in rules]
