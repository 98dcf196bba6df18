"""The ``quantization_config`` of GPTQ checkpoints, or ``quantize_config.json``: read and written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qplug_core.config import LayerQuant, QuantizationConfig, Rule
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.match import Matcher
from qplug_core.scheme import QuantScheme, TensorQuant

if TYPE_CHECKING:
    from qplug_core.source import Source

BITS = (2, 3, 4, 8)
LAYOUTS = ("gptq", "gptq_v2")

ALIASES = {
    "bits": ("w_bit", "wbits"),
    "group_size": ("q_group_size", "groupsize"),
    "checkpoint_format": ("format",),
    "quant_method": ("method",),
    "desc_act": (),
    "sym": (),
}
"""Keys that change the numbers, with the other names under which they are seen."""

FIXED: dict[str, tuple[Any, ...]] = {
    "data_type": ("int",),
    "pack_dtype": ("int32",),
    "is_marlin_format": (False,),
    "rotation": (),
    "adapter": (),
    "zero_point": (True,),
}
"""Keys that change the numbers, with the values that are understood. Empty values say nothing and are always understood."""

METADATA = {
    "act_group_aware", "amp", "auto_forward_data_parallel", "autoround_version", "awq_gemm_checkpoint", "backend",
    "batch_size", "block_name_to_quantize", "cache_block_outputs", "cache_examples_on_gpu", "damp_auto_increment",
    "damp_percent", "dataset", "dense_vram_strategy", "dense_vram_strategy_devices", "device", "device_map",
    "disable_exllama", "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input", "exllama_config",
    "failsafe", "fallback", "foem", "gc_mode", "gptaq", "gptaq_alpha", "gradient_accumulate_steps", "hessian",
    "is_mixed_int", "iters", "low_gpu_mem_usage", "lr", "max_input_length", "meta", "minmax_lr", "mock_quantization",
    "model_file_base_name", "model_name_or_path", "model_seqlen", "module_name_preceding_first_block",
    "moe_vram_strategy", "moe_vram_strategy_devices", "mse", "nsamples", "offload_to_disk", "offload_to_disk_path",
    "pack_impl", "pad_token_id", "parallel_packing", "producer", "provider", "quant_log", "quantizer", "scale_dtype",
    "seqlen", "static_groups", "telemetry", "tokenizer", "true_sequential", "uri", "use_cuda_fp16", "use_exllama",
    "use_exllama_v2", "v2", "v2_alpha", "version", "wait_for_submodule_finalizers",
}  # fmt: skip
"""Keys that say how the numbers were found, or how some engine is to run them: they change none of them."""

OVERRIDES = ("bits", "group_size", "desc_act", "sym")


def parse(source: Source) -> QuantizationConfig:
    """Rules, in the order in which they decide: 16-bit embeddings, ``dynamic`` (first match wins), then all linear layers.

    Whether there are g_idx tensors, and a quantized lm_head, is read from the headers.

    :raises ConfigError: for a key that is not understood, two that contradict each other, or values the headers contradict.
    """
    raw = source.quant_config
    if raw is None:
        raise ConfigError(
            "there is neither a quantization_config in config.json nor a quantize_config.json; add one with bits and "
            "group_size"
        )
    _check_keys(raw)
    base = _numbers(raw)
    for name, other in source.files.items():
        if name == "quantize_config.json" and isinstance(other, dict) and other is not raw:
            _check_agreement(base, _numbers(other), name)
    inferred: list[str] = []
    layout = _layout(base, inferred)
    if base.get("sym") is None:
        inferred.append("sym is not said: planned with zero points, which also holds symmetric weights")
    if base.get("desc_act") is None:
        inferred.append("desc_act is not said: taken as false; a g_idx that says otherwise is obeyed")
    # An engine may ask before it knows any tensor; every producer that is in use today writes g_idx.
    indexed = not source.tensors or any(name.endswith(".g_idx") for name in source.tensors)
    if not indexed:
        inferred.append("no g_idx tensors: columns belong to groups by position")
    default = _quant({**base, "bits": base.get("bits")}, layout, indexed)
    dynamic = _dynamic(raw.get("dynamic") or {}, base, layout, indexed)
    rules = [Rule(Matcher("Embedding", "class"), None, implicit=True, origin="embeddings are not quantized by GPTQ")]
    if not _head_quantized(raw, dynamic, source, inferred):
        rules.append(Rule(Matcher("lm_head", "suffix"), None, implicit=True, origin="lm_head is false or not said"))
    rules += dynamic
    allowed = _allowed(raw.get("modules_in_block_to_quantize"))
    if allowed is None:
        rules.append(Rule(Matcher("", "all"), default, origin="bits and group_size"))
    else:
        rules += [Rule(Matcher(text, "substring"), default, origin="modules_in_block_to_quantize") for text in allowed]
        if raw.get("lm_head"):
            rules.append(Rule(Matcher("lm_head", "suffix"), default, origin="lm_head"))
    _check_headers(source, rules)
    metadata = {key: value for key, value in raw.items() if key in METADATA or _says_nothing(value)}
    return QuantizationConfig("gptq", rules, producer=_producer(raw), inferred=inferred, metadata=metadata)


def write(layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
    """The config that says ``layers``: the commonest quantization as the default, every other as a ``dynamic`` rule.

    :raises CannotEncode: where layers need both zero-point conventions.
    """
    quants = [quant for quant in layers.values() if quant is not None]
    if not quants:
        raise CannotEncode("no layer is quantized; write a 16-bit checkpoint without a quantization config")
    layouts = sorted({quant.layout for quant in quants})
    if len(layouts) > 1:
        raise CannotEncode(
            f"layouts {' and '.join(layouts)} were given; one GPTQ checkpoint has one checkpoint_format, so quantize "
            "every layer "
            "with zero points, or every layer without"
        )
    common = Counter(quant.scheme for quant in quants).most_common(1)[0][0]
    config = {"quant_method": "gptq", **_said(common), "checkpoint_format": layouts[0], "pack_dtype": "int32"}
    heads = {name for name in layers if name.rsplit(".", 1)[-1] == "lm_head"}
    config["lm_head"] = any(layers[name] is not None for name in heads)
    dynamic: dict[str, dict[str, Any]] = {}
    for name, quant in layers.items():
        if quant is None and name not in heads:
            dynamic[f"-:{re.escape(name)}$"] = {}
        elif quant is not None and quant.scheme != common:
            dynamic[f"+:{re.escape(name)}$"] = _said(quant.scheme)
    if dynamic:
        config["dynamic"] = dynamic
    return config


def _said(scheme: QuantScheme) -> dict[str, Any]:
    part = scheme.weight
    assert part is not None
    return {"bits": part.bits, "group_size": part.block[1] or -1, "desc_act": scheme.act_order, "sym": part.symmetric}


def _says_nothing(value: Any) -> bool:
    return value is None or value == "" or value == {} or value == []


def _check_keys(raw: Mapping[str, Any]) -> None:
    known = {*ALIASES, *(alias for aliases in ALIASES.values() for alias in aliases), *FIXED, *METADATA}
    known |= {"dynamic", "lm_head", "modules_in_block_to_quantize"}
    for key, value in raw.items():
        if _says_nothing(value):
            continue
        if key not in known:
            raise ConfigError(
                f"the GPTQ config has the key {key!r} ({value!r}), which this version does not know and which may change "
                "the numbers; "
                "remove it if it does not, or use a newer qplug-gptq"
            )
        if key in FIXED and value not in FIXED[key]:
            understood = " or ".join(repr(v) for v in FIXED[key]) or "no value"
            raise ConfigError(
                f"the GPTQ config says {key}: {value!r}; {understood} is understood, because others change the numbers: "
                "use a plugin that knows them"
            )


def _numbers(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the keys that change the numbers, one for each key and its aliases."""
    values: dict[str, Any] = {}
    for key, aliases in ALIASES.items():
        said = {name: raw[name] for name in (key, *aliases) if not _says_nothing(raw.get(name))}
        if len({repr(value) for value in said.values()}) > 1:
            text = " and ".join(f"{name}: {value!r}" for name, value in said.items())
            raise ConfigError(
                f"the GPTQ config says {text}, which contradict each other; keep the one that the file was made with"
            )
        if said:
            values[key] = next(iter(said.values()))
    method = values.get("quant_method", "gptq")
    if method != "gptq":
        raise ConfigError(
            f"the GPTQ config says quant_method: {method!r}; 'gptq' was needed, so use the plugin of that method"
        )
    return values


def _check_agreement(mine: Mapping[str, Any], other: Mapping[str, Any], name: str) -> None:
    for key in mine.keys() & other.keys():
        if mine[key] != other[key]:
            raise ConfigError(
                f"config.json says {key}: {mine[key]!r} and {name} says {other[key]!r}; correct the one that is wrong, "
                f"or remove {name}"
            )


def _layout(base: Mapping[str, Any], inferred: list[str]) -> str:
    layout = base.get("checkpoint_format")
    if layout is None:
        inferred.append("checkpoint_format is not said: zero points are taken as stored minus one (v1)")
        return "gptq"
    if layout not in LAYOUTS:
        raise ConfigError(
            f"the GPTQ config says checkpoint_format: {layout!r}; {' or '.join(LAYOUTS)} was needed, so convert the file "
            "with GPTQModel"
        )
    return str(layout)


def _quant(values: Mapping[str, Any], layout: str, indexed: bool) -> LayerQuant:
    bits, group = values.get("bits"), values.get("group_size", -1)
    if type(bits) is not int or bits not in BITS:
        raise ConfigError(
            f"the GPTQ config says bits: {bits!r}; one of {', '.join(map(str, BITS))} was needed, so correct it"
        )
    if type(group) is not int or (group < 1 and group != -1):
        raise ConfigError(
            f"the GPTQ config says group_size: {group!r}; a positive number, or -1 for one group, was needed, so correct it"
        )
    for key in ("desc_act", "sym"):
        if not isinstance(values.get(key), bool | None):
            raise ConfigError(f"the GPTQ config says {key}: {values[key]!r}; true or false was needed, so correct it")
    block = (1, 0) if group == -1 else (1, group)
    part = TensorQuant(f"int{bits}", block, symmetric=values.get("sym") is True)
    # With one group for the whole row there is no order to keep.
    act_order = values.get("desc_act") is True and group != -1
    if act_order and not indexed:
        raise ConfigError(
            "the GPTQ config says desc_act: true and the file has no g_idx tensors; act order needs them, so correct "
            "the config"
        )
    return LayerQuant(QuantScheme(part, act_order=act_order), layout, () if indexed else (("g_idx", False),))


def _dynamic(rules: Any, base: Mapping[str, Any], layout: str, indexed: bool) -> list[Rule]:
    if not isinstance(rules, dict):
        raise ConfigError(
            f"the GPTQ config says dynamic: {rules!r}; an object of patterns and overrides was needed, so correct it"
        )
    made = []
    for pattern, overrides in rules.items():
        origin = f"dynamic {pattern}"
        if pattern.startswith("-:"):
            made.append(Rule(Matcher(pattern[2:], "regex"), None, origin=origin))
            continue
        overrides = overrides or {}
        for key, value in overrides.items():
            if key not in OVERRIDES and key not in METADATA and not _says_nothing(value):
                raise ConfigError(
                    f"the GPTQ rule {pattern!r} overrides {key!r} ({value!r}), which may change the numbers; "
                    f"{', '.join(OVERRIDES)} are understood, "
                    "so use a newer qplug-gptq"
                )
        values = {**base, **{key: overrides[key] for key in OVERRIDES if key in overrides}}
        made.append(Rule(Matcher(pattern.removeprefix("+:"), "regex"), _quant(values, layout, indexed), origin=origin))
    return made


def _head_quantized(raw: Mapping[str, Any], dynamic: list[Rule], source: Source, inferred: list[str]) -> bool:
    if raw.get("lm_head") or any(rule.quant is not None and "lm_head" in rule.matcher.text for rule in dynamic):
        return True
    if any(name.endswith("lm_head.qweight") for name in source.tensors):
        inferred.append("lm_head is quantized: the file holds lm_head.qweight")
        return True
    return False


def _allowed(entries: Any) -> list[str] | None:
    """``modules_in_block_to_quantize``, flattened; None where every linear layer is quantized."""
    if _says_nothing(entries):
        return None
    flat: list[Any] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        flat += entry if isinstance(entry, list) else [entry]
    if not all(isinstance(entry, str) and entry for entry in flat):
        raise ConfigError(
            f"the GPTQ config says modules_in_block_to_quantize: {entries!r}; a list of names was needed, so correct it"
        )
    return list(dict.fromkeys(flat))


def _check_headers(source: Source, rules: list[Rule]) -> None:
    """Refuse a file whose shapes are those of no rule: bits follow from qzeros and scales, groups from their rows."""
    parts = [rule.quant.scheme.weight for rule in rules if rule.quant is not None]
    said = {(part.bits, part.block[1]) for part in parts if part is not None}
    for name, info in source.tensors.items():
        module = name.removesuffix(".qweight")
        zeros, scales = source.tensors.get(f"{module}.qzeros"), source.tensors.get(f"{module}.scales")
        if module == name or zeros is None or scales is None:
            continue
        if any(len(tensor.shape) != 2 for tensor in (info, zeros, scales)) or not scales.shape[1]:
            continue  # The cover names the tensor and the shape that it must have.
        bits = zeros.shape[1] * 32 / scales.shape[1]
        if bits not in {b for b, _ in said}:
            raise ConfigError(
                f"{module} is stored with {bits:g} bits (qzeros {list(zeros.shape)}, scales {list(scales.shape)}); the "
                "config says "
                f"{_listed({b for b, _ in said})}, so correct bits in it"
            )
        columns = info.shape[0] * 32 // int(bits)
        counts = {-(-columns // (group or columns)) for b, group in said if b == bits} if columns else set()
        if columns and scales.shape[0] not in counts:
            raise ConfigError(
                f"{module} has {scales.shape[0]} groups over {columns} columns; the config says group_size "
                f"{_listed({group or -1 for b, group in said if b == bits})}, so correct it"
            )


def _listed(values: set[int]) -> str:
    return " or ".join(map(str, sorted(values)))


def _producer(raw: Mapping[str, Any]) -> str:
    meta = raw.get("meta")
    made_by = meta.get("quantizer") if isinstance(meta, dict) else raw.get("quantizer")
    if isinstance(made_by, list):
        made_by = ", ".join(map(str, made_by))
    if made_by:
        return str(made_by)
    provider = raw.get("provider")
    return f"{provider}:{raw.get('autoround_version', '')}".rstrip(":") if provider else ""
