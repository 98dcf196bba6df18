"""The part of FastDeploy's config that says which layers of experts have 4 bits and which have the 2-bit code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qplug_core.config import LayerQuant, Rule
from qplug_core.errors import ConfigError
from qplug_core.match import Matcher

from .types import layer_quant

if TYPE_CHECKING:
    from qplug_core.source import Source

LAST = 6
"""The last layer of 4-bit experts where the config does not say it."""
PARTS = {
    "moe_w4_quant_config": {"quant_type", "quant_granularity", "quant_start_layer", "quant_end_layer"},
    "moe_w2_quant_config": {
        "quant_type", "quant_granularity", "quant_group_size", "quant_start_layer", "quant_end_layer",
    },
}  # fmt: skip


def wint2_rules(values: Mapping[str, Any], source: Source, order: str, inferred: list[str]) -> tuple[list[Rule], LayerQuant]:
    """Rules of the experts, and the type of all other layers.

    FastDeploy looks at one number, the last 4-bit layer: every later layer has the 2-bit code. The other three bounds must agree with
    that, because a file in which they do not was made for another loader.

    :raises ConfigError: for values that FastDeploy ignores and that say something else than it does.
    """
    config = values.get("moe_quant_config") or {}
    w4, w2 = (_part(config, name) for name in PARTS)
    unknown = config.keys() - {"quant_type", *PARTS}
    if unknown:
        raise ConfigError(f"moe_quant_config has the key {sorted(unknown)[0]!r}, which is not known; remove it")
    for said in (values.get("moe_quant_type"), config.get("quant_type")):
        _expect("moe_quant_type", said, ("w4w2",))
    _expect("dense_quant_granularity", values.get("dense_quant_granularity"), ("per_channel",))
    _expect("moe_w4_quant_config.quant_granularity", w4.get("quant_granularity"), ("per_channel",))
    _expect("moe_w2_quant_config.quant_granularity", w2.get("quant_granularity"), ("pp_acc",))
    _expect("moe_w2_quant_config.quant_group_size", w2.get("quant_group_size") or None, (64,))
    _expect("moe_w4_quant_config.quant_type", w4.get("quant_type"), ("wint4", "wint8"))
    _expect("moe_w2_quant_config.quant_type", w2.get("quant_type"), ("wint2", "wint2.5", "weight_only_int2.5"))
    last = w4.get("quant_end_layer")
    if last is None:
        last = LAST
        inferred.append(f"the last layer of 4-bit experts is not said: taken as {LAST}, as FastDeploy does")
    _check_bounds(w4, w2, last, source)
    dense_names = {values.get("dense_quant_type"), values.get("dense_quant_config")} - {None}
    if len(dense_names) > 1:
        raise ConfigError(
            f"dense_quant_type is {values['dense_quant_type']!r} and dense_quant_config is {values['dense_quant_config']!r}; FastDeploy "
            "reads the second, so remove one"
        )
    dense = str(next(iter(dense_names), "wint8"))
    low = layer_quant(str(w4.get("quant_type", "wint4")), "moe_w4_quant_config.quant_type", True, order)
    code = layer_quant(str(w2.get("quant_type", "wint2")), "moe_w2_quant_config.quant_type", True, order)
    if any(name.endswith(".super_scale") for name in source.tensors):
        inferred.append("super scales are called super_scale, by the stored names")
        code = LayerQuant(code.scheme, code.layout, (("super_scales", "super_scale"),))
    first = "|".join(str(i) for i in range(last + 1))
    return [
        Rule(Matcher(rf"(^|\.)layers\.({first})\..*\bexperts\.", "search"), low, origin="moe_w4_quant_config"),
        Rule(Matcher(r"(^|\.)experts\.", "search"), code, origin="moe_w2_quant_config"),
    ], layer_quant(dense, "dense_quant_type", experts=False, order=order)


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = config.get(name) or {}
    if not isinstance(part, Mapping) or part.keys() - PARTS[name]:
        raise ConfigError(
            f"moe_quant_config says {name}: {part!r}; an object of {', '.join(sorted(PARTS[name]))} was needed, so correct it"
        )
    return part


def _expect(key: str, said: Any, known: tuple[Any, ...]) -> None:
    if said is not None and said not in known:
        raise ConfigError(
            f"the wint2 config says {key}: {said!r}; {' or '.join(map(str, known))} was needed, which is all that its kernels do"
        )


def _check_bounds(w4: Mapping[str, Any], w2: Mapping[str, Any], last: Any, source: Source) -> None:
    bounds = [part.get(key) for part in (w4, w2) for key in ("quant_start_layer", "quant_end_layer")]
    if not all(b is None or (isinstance(b, int) and b >= 0) for b in bounds):
        raise ConfigError(
            f"the wint2 config has the layer bounds {bounds}; whole numbers from 0 were needed, so correct them"
        )
    if w4.get("quant_start_layer") or w2.get("quant_start_layer") not in (None, 0, last + 1):
        raise ConfigError(
            f"the wint2 config has 4-bit layers {bounds[0]} to {last} and 2-bit layers from {bounds[2]}; FastDeploy reads every layer up "
            f"to {last} as 4 bit and every later one as 2 bit, so correct the bounds to 0, {last} and {last + 1}"
        )
    count = source.config.get("num_hidden_layers")
    if w2.get("quant_end_layer") and isinstance(count, int) and w2["quant_end_layer"] < count - 1:
        raise ConfigError(
            f"the wint2 config ends at layer {w2['quant_end_layer']} and the model has {count} layers; every layer of experts needs a "
            "type, so correct quant_end_layer"
        )
