"""The ``quantization_config`` of AMD Quark checkpoints: read and written.

Quark decides for each layer: ``exclude`` first, then the first pattern of ``layer_quant_config``, then
``layer_type_quant_config`` by class, then ``global_quant_config``. Names are those of the stored modules.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qplug_core.config import LayerQuant, QuantizationConfig, Rule
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.keys import check_keys, list_of_names
from qplug_core.match import Matcher
from qplug_core.scheme import QuantScheme, TensorQuant

from .spec import input_quant, spec_of, weight_quant

if TYPE_CHECKING:
    from qplug_core.source import Source

KEYS = (
    "quant_method",
    "global_quant_config",
    "layer_quant_config",
    "layer_type_quant_config",
    "exclude",
    "export",
    "kv_cache_quant_config",
)
METADATA = (
    "algo_config",
    "kv_cache_post_rope",
    "quant_mode",
    "version",
    "log_severity_level",
    "pre_quant_opt_config",
    "softmax_quant_spec",
)
"""Keys that say how the numbers were found; what some of them must not say is checked."""
EXPORT = {
    "kv_cache_group": None,
    "min_kv_scale": None,
    "pack_method": ("reorder", "order"),
    "weight_format": ("real_quantized",),
    "weight_merge_groups": (),
}
"""Keys of ``export``: None takes any value, a tuple lists those that are understood beside null."""
LAYER = ("weight", "input_tensors", "output_tensors", "bias", "target_device")
LAYOUTS = {"fp8_e4m3": "quark_fp8", "int8": "quark_int8", "fp4_e2m1": "quark_mxfp4"}
INTERNAL = "weight_quantizer.scale"
"""Transformers 5 saves Quark's own parameter names, where every other export has ``weight_scale``."""


def parse(source: Source) -> QuantizationConfig:
    """Rules in Quark's order; embeddings stay 16 bit unless their class is named.

    Whether tensors have Quark's internal names is read from the headers.

    :raises ConfigError: for a key that is not understood, and for what no layout stores.
    """
    raw = source.quant_config or {}
    _check_keys(raw)
    inferred: list[str] = []
    opts: tuple[tuple[str, Any], ...] = ()
    if any(name.endswith((INTERNAL, "weight_quantizer.0.scale")) for name in source.tensors):
        opts = (("names", "internal"),)
        inferred.append("scales have Quark's internal names, weight_quantizer.scale: the file was saved by transformers 5")
    groups = list_of_names(raw.get("export", {}).get("kv_cache_group"), "the Quark config says export.kv_cache_group")
    excluded = list_of_names(raw.get("exclude"), "the Quark config says exclude")
    rules = [Rule(_pattern(text), None, origin="exclude") for text in excluded]
    outputs: list[Any] = []
    for name, config in _object(raw, "layer_quant_config").items():
        # An entry that is the KV cache's says what its projections' outputs are, beside their weights.
        of_cache = name in groups or name in _object(raw, "kv_cache_quant_config")
        quant, output = _layer(config, f"layer_quant_config[{name!r}]", opts, of_cache)
        outputs += [output] if output else []
        rules.append(Rule(_pattern(name), quant, origin="layer_quant_config"))
    for name, config in _object(raw, "layer_type_quant_config").items():
        rules.append(
            Rule(
                Matcher(name, "class"),
                _layer(config, f"layer_type_quant_config[{name!r}]", opts)[0],
                origin="layer_type_quant_config",
            )
        )
    rules.append(Rule(Matcher("Embedding", "class"), None, implicit=True, origin="Quark quantizes embeddings only by class"))
    default = _layer(raw.get("global_quant_config") or {}, "global_quant_config", opts)[0]
    rules.append(Rule(Matcher("", "all"), default, implicit=default is None, origin="global_quant_config"))
    for name, config in _object(raw, "kv_cache_quant_config").items():
        output = _layer(config, f"kv_cache_quant_config[{name!r}]", opts, True)[1]
        outputs += [output] if output else []
    if outputs and not raw.get("kv_cache_post_rope"):
        inferred.append(
            "KV-cache scales were found before the rotary embedding (kv_cache_post_rope) and are used after it, as engines do"
        )
    quants = [rule.quant for rule in rules if rule.quant is not None]
    if any(quant.scheme.act is not None and not quant.scheme.act.symmetric for quant in quants):
        inferred.append(
            "Quark adds activation zero points after rounding, here they are added before: ties may fall to the other code"
        )
    if groups and not outputs:
        raise ConfigError(
            f"the Quark config says kv_cache_group: {groups} and no layer_quant_config entry of that name has output_tensors; export it again"
        )
    metadata = {key: raw[key] for key in METADATA if raw.get(key)}
    return QuantizationConfig(
        "quark",
        rules,
        kv=_kv(outputs),
        producer=f"quark {raw['version']}" if raw.get("version") else "quark",
        inferred=inferred,
        metadata=metadata,
    )


def write(layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
    """The config that says ``layers``: the commonest scheme as the global one, every other by name.

    :raises CannotEncode: where no layer is quantized.
    """
    schemes = {name: quant.scheme for name, quant in layers.items() if quant is not None}
    if not schemes:
        raise CannotEncode("no layer is quantized; write a 16-bit checkpoint without a quantization config")
    common = Counter(schemes.values()).most_common(1)[0][0]
    return {
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "global_quant_config": layer_config(common),
        "layer_quant_config": {name: layer_config(scheme) for name, scheme in schemes.items() if scheme != common},
        "layer_type_quant_config": {},
        "kv_cache_quant_config": {},
        "exclude": [name for name, quant in layers.items() if quant is None],
        "export": {"kv_cache_group": [], "min_kv_scale": 0.0, "pack_method": "reorder", "weight_format": "real_quantized"},
    }


def layer_config(scheme: QuantScheme) -> dict[str, Any]:
    """The entry of one scheme."""
    assert scheme.weight is not None
    return {
        "weight": spec_of(scheme.weight, activation=False),
        "input_tensors": None if scheme.act is None else spec_of(scheme.act, activation=True),
        "output_tensors": None,
        "bias": None,
    }


def layout_of(part: TensorQuant) -> str:
    """The layout that stores a weight part."""
    if part.scale_dtype == "e4m3":
        return "quark_nvfp4"
    return (
        "quark_mxfp8"
        if part.dtype == "fp8_e4m3" and part.block == (1, 32) and part.scale_dtype == "e8m0"
        else LAYOUTS[part.dtype]
    )


def _layer(
    config: Any, where: str, opts: tuple[tuple[str, Any], ...], of_cache: bool = False
) -> tuple[LayerQuant | None, Any]:
    """The quantization of one entry, and its output spec where the entry is the KV cache's."""
    if not isinstance(config, dict):
        raise ConfigError(
            f"the Quark config says {where}: {config!r}; an object with weight and input_tensors was needed, so export it again"
        )
    check_keys(config, LAYER, f"the Quark config's {where}", "qplug-rocm")
    if config.get("bias") is not None or (config.get("output_tensors") is not None and not of_cache):
        what = "bias" if config.get("bias") is not None else "output_tensors"
        raise ConfigError(
            f"the Quark config quantizes {what} in {where}; weights, inputs and the KV cache are what engines read, so export without it"
        )
    part = weight_quant(config.get("weight"), f"{where}.weight")
    act = input_quant(config.get("input_tensors"), f"{where}.input_tensors")
    if part is None and act is not None:
        raise ConfigError(
            f"the Quark config quantizes the inputs and not the weight in {where}; no layout stores that, so quantize both"
        )
    if part is None:
        return None, config.get("output_tensors")
    return LayerQuant(QuantScheme(part, act), layout_of(part), opts), config.get("output_tensors")


def _kv(outputs: list[Any]) -> TensorQuant | None:
    if not outputs:
        return None
    if len({json.dumps(_numbers(output), sort_keys=True) for output in outputs}) > 1:
        raise ConfigError(
            "the Quark config quantizes keys and values in different ways; one KV-cache scheme was needed, so export it again"
        )
    kv = input_quant(outputs[0], "the KV cache")
    if kv is None or kv.dtype != "fp8_e4m3" or kv.block != (0, 0) or kv.dynamic:
        raise ConfigError(
            f"the Quark config says {outputs[0].get('dtype')} {outputs[0].get('qscheme')} of the KV cache; stored fp8_e4m3 scales per_tensor are "
            "read, so export with them"
        )
    return kv


def _numbers(spec: Any) -> Any:
    return (
        {key: value for key, value in spec.items() if value is not None and key != "observer_cls"}
        if isinstance(spec, dict)
        else spec
    )


def _pattern(text: str) -> Matcher:
    if text.startswith("re:"):
        return Matcher(text[3:], "regex")
    return Matcher(text, "fnmatch" if any(mark in text for mark in "*?[") else "exact")


def _check_keys(raw: Mapping[str, Any]) -> None:
    check_keys(raw, (*KEYS, *METADATA), "the Quark config", "qplug-rocm")
    if raw.get("softmax_quant_spec"):
        raise ConfigError(
            "the Quark config has a softmax_quant_spec; quantized attention weights are not read, so export without it"
        )
    if "global_quant_config" not in raw and "layer_quant_config" not in raw:
        raise ConfigError(
            "the Quark config has neither global_quant_config nor layer_quant_config; export it with Quark 0.8 or newer"
        )
    for key, value in _object(raw, "export").items():
        if key not in EXPORT:
            raise ConfigError(
                f"the Quark config has the key export.{key}, which is not known; remove it or use a newer qplug-rocm"
            )
        understood = EXPORT[key]
        if understood is not None and value is not None and value not in ([], "") and value not in understood:
            raise ConfigError(
                f"the Quark config says export.{key}: {value!r}; {' or '.join(understood) or 'null'} is understood, so export it again"
            )
    _check_algorithms(raw.get("algo_config"))


def _check_algorithms(algorithms: Any) -> None:
    """Algorithms change weights before export, all but rotations that run with the model."""
    for entry in algorithms if isinstance(algorithms, list) else [algorithms] if algorithms else []:
        if isinstance(entry, dict) and entry.get("name") == "rotation":
            online = [key for key in ("r3", "r4", "online_r1_rotation") if entry.get(key)]
            if online:
                raise ConfigError(
                    f"the Quark config has a rotation with {', '.join(online)}, which turns activations while the model runs; no layout holds that, "
                    "so rotate offline"
                )


def _object(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"the Quark config says {key}: {value!r}; an object was needed, so export it again")
    return value
