"""The ``quantization_config`` of compressed-tensors checkpoints, read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qplug_core.config import LayerQuant, QuantizationConfig, Rule
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.keys import check_keys, list_of_names, says_nothing
from qplug_core.scheme import QuantScheme, TensorQuant

from .args import PLUGIN, PRESETS, read_args
from .layouts import GONE, LAYOUTS, MICROSCALING, default_layout, holds
from .shapes import file_facts
from .sparsity import sparse_rules
from .targets import matcher

if TYPE_CHECKING:
    from qplug_core.source import Source

KEYS = ("quant_method", "format", "config_groups", "ignore", "kv_cache_scheme", "sparsity_config", "transform_config")
METADATA = ("version", "global_compression_ratio", "quantization_status", "run_compressed", "recipe")
GROUP_KEYS = ("targets", "weights", "input_activations", "output_activations", "format")
METHODS = ("compressed-tensors", "compressed_tensors")
REPLACED = {"fakequant": "dense"}


@dataclass(frozen=True)
class Group:
    """One group of a config: what it targets and how; ``quant`` is None where it leaves layers at 16 bit."""

    name: str
    targets: tuple[str, ...]
    quant: LayerQuant | None


def parse(source: Source) -> QuantizationConfig:
    """Rules in the order in which they decide: ``ignore``, then targets that are names, regular expressions, and classes.

    From the headers: whether odd widths are padded, whether columns have an order, and which modules are 2:4 sparse.

    :raises ConfigError: for a key that is not understood, or two that contradict each other.
    """
    raw = _raw(source)
    _check_keys(raw)
    inferred: list[str] = []
    groups = [_group(name, body, raw, inferred) for name, body in _object(raw, "config_groups").items()]
    quants = file_facts([g.quant for g in groups], source, raw, inferred)
    groups = [replace(group, quant=quant) for group, quant in zip(groups, quants, strict=True)]
    ignore = _names(raw.get("ignore"), "ignore")
    rules = [Rule(matcher(text), None, origin="ignore") for text in ignore] + _target_rules(groups)
    rules = sparse_rules(_object(raw, "sparsity_config"), rules, source, inferred)
    kv = raw.get("kv_cache_scheme")
    version = str(raw.get("version") or "")
    return QuantizationConfig(
        "compressed-tensors",
        rules,
        kv=None if says_nothing(kv) else _cache(kv),
        producer=f"compressed-tensors {version}".strip(),
        inferred=inferred,
        metadata={key: value for key, value in raw.items() if key in METADATA},
    )


def _raw(source: Source) -> dict[str, Any]:
    raw = source.quant_config
    if raw is None:
        raise ConfigError("config.json has no quantization_config; add the one that the checkpoint was made with")
    # Files of before 0.6 nest it beside the sparsity_config.
    inner = raw.get("quantization_config")
    if isinstance(inner, Mapping):
        raw = {**{key: value for key, value in raw.items() if key != "quantization_config"}, **inner}
    return dict(raw)


def _check_keys(raw: Mapping[str, Any]) -> None:
    check_keys(raw, (*KEYS, *METADATA), "the compressed-tensors config", PLUGIN)
    method = raw.get("quant_method") or METHODS[0]
    if str(method).lower() not in METHODS:
        raise ConfigError(
            f"the config says quant_method: {method!r}; {METHODS[0]!r} was needed, so use the plugin of that method"
        )
    transform = _object(raw, "transform_config")
    if not says_nothing(transform.get("config_groups", transform)):
        raise ConfigError(
            "the compressed-tensors config has a transform_config, and activations must go through its rotations at run time, "
            "which no kernel here does; quantize the model again without transforms"
        )


def _object(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key)
    if says_nothing(value):
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"the compressed-tensors config says {key}: {value!r}; an object was needed, so correct it")
    return dict(value)


def _names(value: Any, where: str) -> list[str]:
    return list_of_names(value, f"the compressed-tensors config says {where}")


def _target_rules(groups: list[Group]) -> list[Rule]:
    """Exact names before regular expressions before classes, each in the order of the file."""
    order = {"exact": 0, "regex": 1, "class": 2}
    said: dict[str, Group] = {}
    rules = []
    for group in groups:
        for text in group.targets:
            other = said.setdefault(text, group)
            if other.quant != group.quant:
                raise ConfigError(
                    f"{other.name} and {group.name} both target {text!r} and quantize it in different ways; remove it from one"
                )
            if other is group:
                rules.append(Rule(matcher(text), group.quant, origin=f"{group.name} targets"))
    return sorted(rules, key=lambda rule: order[rule.matcher.dialect])


def _group(name: str, body: Any, raw: Mapping[str, Any], inferred: list[str]) -> Group:
    if isinstance(body, list):
        preset = PRESETS.get(name.upper())
        if preset is None:
            raise ConfigError(
                f"config_groups has a list of targets for {name!r}, which is no preset; known are {', '.join(PRESETS)}, so write "
                "the group out"
            )
        weights, acts = preset
        body = {"targets": body, "weights": weights, "input_activations": acts}
    if not isinstance(body, Mapping):
        raise ConfigError(f"config_groups says {name}: {body!r}; an object was needed, so correct it")
    check_keys(body, GROUP_KEYS, name, PLUGIN)
    targets = tuple(_names(body.get("targets"), f"targets of {name}"))
    if not targets:
        raise ConfigError(f"{name} has no targets; name the layers that it is for, or remove it")
    return Group(name, targets, _quant(name, body, raw, inferred))


def _quant(name: str, body: Mapping[str, Any], raw: Mapping[str, Any], inferred: list[str]) -> LayerQuant | None:
    weights, acts = body.get("weights"), body.get("input_activations")
    if not says_nothing(body.get("output_activations")):
        raise ConfigError(
            f"{name} quantizes output activations, which no kernel here does; quantize the model without them (a KV cache has "
            "kv_cache_scheme)"
        )
    if says_nothing(weights):
        if not says_nothing(acts):
            raise ConfigError(
                f"{name} quantizes input activations and leaves weights at 16 bit, which no kernel here does; quantize both, or "
                "neither"
            )
        return None
    layout = _layout(name, body.get("format"), raw)
    mx = layout in MICROSCALING
    part, act_order = read_args(weights, f"weights of {name}", mx)
    strategy = dict(weights or {}).get("strategy")
    if part.dynamic is not False or part.block[0] < 0 or (part.block == (1, 0) and strategy == "token"):
        raise ConfigError(
            f"weights of {name} have strategy {strategy!r} and dynamic {part.dynamic!r}; weights are static, by "
            "tensor, channel, group or block, so correct it"
        )
    scheme = QuantScheme(part, None if says_nothing(acts) else _activation(acts, name, mx), act_order=act_order)
    if layout is None:
        layout = _said_by_numbers(scheme, name)
        inferred.append(f"format of {name} is not said: {layout}, as its numbers are stored by llm-compressor")
    if not holds(layout, part):
        raise ConfigError(
            f"{name} has format {layout!r} and weights of {part.dtype} with {part.scale_dtype} scales by {part.granularity}, which "
            "that format does not hold; correct one of them"
        )
    return LayerQuant(scheme, layout)


def _layout(name: str, own: Any, raw: Mapping[str, Any]) -> str | None:
    layout = own or raw.get("format") or None
    layout = REPLACED.get(str(layout), layout)
    if layout in GONE:
        raise ConfigError(f"{name} has format {layout!r}, which is not read: {GONE[str(layout)]}")
    if layout in (None, "mixed-precision"):
        return None
    if layout not in LAYOUTS:
        raise ConfigError(f"{name} has format {layout!r}; one of {', '.join(LAYOUTS)} was needed, so use a newer plugin")
    return str(layout)


def _said_by_numbers(scheme: QuantScheme, name: str) -> str:
    try:
        return default_layout(scheme)
    except CannotEncode:
        raise ConfigError(f"{name} has scheme {scheme} and no format; add the format that the file was made with") from None


def _activation(raw: Any, name: str, microscaling: bool) -> TensorQuant:
    where = f"input_activations of {name}"
    act, _ = read_args(raw, where, microscaling)
    by_tensor, by_group = act.block == (0, 0), act.block[0] == 1 and act.block[1] > 0
    two_level = act.scale_dtype == "e4m3"
    token = act.block == (1, 0) and raw.get("strategy") == "token"
    legal = {
        False: by_tensor,
        True: (by_tensor or by_group or token) and not two_level,
        "local": two_level and by_group,
    }
    if not legal[act.dynamic]:
        raise ConfigError(
            f"{where} has strategy {raw.get('strategy')!r} with dynamic {act.dynamic!r}; static scales are by tensor, dynamic ones "
            "by tensor, token or group, and 'local' ones by tensor_group, so correct it"
        )
    if act.dtype == "fp4_e2m1" and act.scale_dtype == "float":
        raise ConfigError(f"{where} has 4-bit floats with plain scales; NVFP4 or MXFP4 was needed, so correct scale_dtype")
    return act


def _cache(raw: Any) -> TensorQuant:
    kv, _ = read_args(raw, "kv_cache_scheme")
    legal = kv.block in ((0, 0), (-1, 0)) or (kv.block == (1, 0) and kv.dynamic is True)
    if not legal or kv.dynamic == "local" or kv.scale_dtype != "float":
        raise ConfigError(
            f"kv_cache_scheme has strategy {raw.get('strategy')!r} with dynamic {kv.dynamic!r}; scales by tensor, attn_head, or "
            "dynamic by token were needed, so correct it"
        )
    return kv
