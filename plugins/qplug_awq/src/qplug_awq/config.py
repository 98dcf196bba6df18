"""The ``quantization_config`` of AWQ checkpoints, or ``quant_config.json``: read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qplug_core.config import LayerQuant, QuantizationConfig, Rule
from qplug_core.errors import ConfigError
from qplug_core.keys import check_agreement, check_keys, check_values, list_of_names, resolve_aliases, says_nothing
from qplug_core.match import Matcher
from qplug_core.scheme import QuantScheme, TensorQuant

from .activations import KEYS as ACT_KEYS
from .activations import act_of
from .headers import check_headers, choose_layout, has_tensor, quantized_modules
from .layouts import part_of

if TYPE_CHECKING:
    from qplug_core.source import Source

ALIASES = {
    "bits": ("w_bit", "wbits"),
    "group_size": ("q_group_size", "groupsize"),
    "zero_point": ("has_zero_point",),
    "sym": (),
    "version": ("format", "checkpoint_format", "packing_format"),
    "modules_to_not_convert": (),
    "quant_method": ("method",),
}
"""Keys that change the numbers, with the other names under which they are seen."""

FIXED: dict[str, tuple[Any, ...]] = {
    "data_type": ("int",),
    "desc_act": (False,),
    "pack_dtype": ("int32", "int16"),
    "rotation": (),
    "adapter": (),
    "super_bits": (),
    "super_group_size": (),
}
"""Keys that change the numbers, with the values that are understood. Empty values say nothing and are always understood."""

METADATA = {
    "act_group_aware", "amp", "apply_clip", "auto_forward_data_parallel", "autoround_version", "backend", "batch_size",
    "block_name_to_quantize", "calib_data", "cache_block_outputs", "damp_auto_increment", "damp_percent", "dataset",
    "device", "do_fuse", "duo_scaling", "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input",
    "exllama_config", "export_compatible", "failsafe", "fallback", "fuse_max_seq_len", "gradient_accumulate_steps",
    "is_mixed_int", "iters", "low_gpu_mem_usage", "lr", "max_input_length", "max_calib_samples", "max_calib_seq_len", "meta",
    "minmax_lr", "model_seqlen", "modules_to_fuse", "mse", "n_parallel_calib_samples", "nsamples", "offload_to_disk",
    "offload_to_disk_path", "pack_impl", "pad_token_id", "parallel_packing", "producer", "provider", "quantizer",
    "scale_dtype", "seqlen", "split", "static_groups", "text_column", "tokenizer", "true_sequential", "uri",
    "wait_for_submodule_finalizers",
}  # fmt: skip
"""Keys that say how the numbers were found, or how some engine is to run them: they change none of them."""

OTHERS = ("dynamic", "extra_config", "exclude_modules", "lm_head", "pre_quant_scale", "kv_cache_quant_algo", *ACT_KEYS)
METHODS = ("awq", "auto-round")
OVERRIDES = ("bits", "group_size", "zero_point", "sym")
KV = {
    "FP8": TensorQuant("fp8_e4m3", (0, 0)),
    "INT8": TensorQuant("int8", (0, 0)),
}


def parse(source: Source) -> QuantizationConfig:
    """Rules, in the order in which they decide: 16-bit embeddings and lm_head, the skip lists, per-module overrides, the rest.

    The packing, and a quantized lm_head, are read from the headers where there are any.

    :raises ConfigError: for a key that is not understood, two that contradict each other, or values the headers contradict.
    """
    raw = source.quant_config
    if raw is None:
        raise ConfigError(
            "there is neither a quantization_config in config.json nor a quant_config.json; add one with bits and group_size"
        )
    _check_keys(raw)
    base = _numbers(raw)
    for name, other in source.files.items():
        if (
            name in ("quant_config.json", "quantize_config.json", "quantization_config.json")
            and isinstance(other, dict)
            and other is not raw
        ):
            check_agreement(base, _numbers(other), name)
    inferred: list[str] = []
    for key, usual in (("bits", 4), ("group_size", 128)):
        if key not in base:
            base[key] = usual
            inferred.append(f"{key} is not said: taken as {usual}, AutoAWQ's default")
    layout, opts = choose_layout(base.get("version"), source, inferred)
    act = act_of(raw, source, inferred)
    if raw.get("pre_quant_scale") or has_tensor(source, "pre_quant_scale"):
        opts = (*opts, ("pre_quant_scale", True))
    if layout == "awq_marlin":
        _check_marlin(base)
    elif base.get("zero_point") is None and base.get("sym") is None:
        inferred.append("zero_point is not said: planned with zero points, which also holds symmetric weights")

    def quant(overrides: Mapping[str, Any]) -> LayerQuant:
        return _quant({**base, **overrides}, layout, act, opts, inferred)

    default = quant({})
    overrides = [*_dynamic(raw.get("dynamic") or {}, quant), *_extra(raw.get("extra_config") or {}, quant)]
    rules = [Rule(Matcher("Embedding", "class"), None, implicit=True, origin="embeddings are not quantized by AWQ")]
    if not _head_quantized(raw, overrides, source, inferred):
        rules.append(Rule(Matcher("lm_head", "suffix"), None, implicit=True, origin="lm_head is false or not said"))
    rules += _skipped(raw, source, inferred)
    rules += overrides
    rules.append(Rule(Matcher("", "all"), default, origin="bits and group_size"))
    check_headers(source, rules)
    if part_of(default).bits == 8:
        inferred.append("8-bit codes are taken in RTP-LLM's order, 0, 2, 4, 6, 1, 3, 5, 7 over two words")
    metadata = {key: value for key, value in raw.items() if key in METADATA or says_nothing(value)}
    return QuantizationConfig(
        "awq",
        rules,
        kv=_kv(raw.get("kv_cache_quant_algo")),
        producer=_producer(raw),
        inferred=list(dict.fromkeys(inferred)),
        metadata=metadata,
    )


def _check_keys(raw: Mapping[str, Any]) -> None:
    known = {*ALIASES, *(alias for aliases in ALIASES.values() for alias in aliases), *FIXED, *METADATA, *OTHERS}
    check_keys(raw, known, "the AWQ config", "qplug-awq")
    check_values(raw, FIXED, "the AWQ config")


def _numbers(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the keys that change the numbers, one for each key and its aliases."""
    values = resolve_aliases(raw, ALIASES, "the AWQ config", _spelled)
    method = values.get("quant_method", "awq")
    if method not in METHODS:
        raise ConfigError(
            f"the AWQ config says quant_method: {method!r}; 'awq' was needed, so use the plugin of that method"
        )
    return values


def _spelled(key: str, value: Any) -> Any:
    if key not in ("version", "quant_method"):
        return value
    # AutoAWQ writes GEMM into its own file and gemm into config.json.
    text = str(value).lower().removeprefix("auto_round:auto_")
    # auto-round's packing says which tool's layout it is, and AWQ has one there.
    return "gemm" if key == "version" and text in ("awq", "auto_awq") else text


def _check_marlin(base: dict[str, Any]) -> None:
    if base.get("zero_point") is True or base.get("sym") is False:
        raise ConfigError(
            "the AWQ config says version: 'marlin' with zero points; AutoAWQ's Marlin layout has none, so correct zero_point or "
            "version"
        )
    base["zero_point"], base["sym"] = False, True


def _quant(
    values: Mapping[str, Any],
    layout: str,
    act: TensorQuant | None,
    opts: tuple[tuple[str, Any], ...],
    inferred: list[str],
) -> LayerQuant:
    bits, group = values["bits"], values["group_size"]
    if type(bits) is not int or bits not in (4, 8):
        raise ConfigError(f"the AWQ config says bits: {bits!r}; 4 or 8 was needed, so correct it")
    if bits == 8 and (layout != "awq_gemm" or act is not None):
        what = f"version {layout.removeprefix('awq_')}" if act is None else f"activations of {act.bits} bits"
        raise ConfigError(
            f"the AWQ config says bits: 8 with {what}; 8 bits are stored as gemm with 16-bit activations, so correct it"
        )
    if type(group) is not int or (group < 1 and group != -1):
        raise ConfigError(
            f"the AWQ config says group_size: {group!r}; a positive number, or -1 for one group, was needed, so correct it"
        )
    for key in ("zero_point", "sym"):
        if not isinstance(values.get(key), bool | None):
            raise ConfigError(f"the AWQ config says {key}: {values[key]!r}; true or false was needed, so correct it")
    zero_point, sym = values.get("zero_point"), values.get("sym")
    if zero_point is not None and sym is not None and zero_point == sym:
        # GPTQModel writes its default sym beside AWQ's zero_point.
        inferred.append(
            f"zero_point is {str(zero_point).lower()} and sym too: planned with zero points, which also holds symmetric weights"
        )
        zero_point = True
    symmetric = not zero_point if zero_point is not None else sym is True
    part = TensorQuant(f"int{bits}", (1, 0) if group == -1 else (1, group), symmetric=symmetric)
    return LayerQuant(QuantScheme(part, act), layout, opts)


def _overridden(entries: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The overrides that one entry says.

    :raises ConfigError: for any that is not understood.
    """
    values = {}
    for key, value in entries.items():
        if key in OVERRIDES:
            values[key] = value
            continue
        harmless = key in METADATA or says_nothing(value) or (key.startswith("act_") and key != "act_bits")
        if not (harmless or (key in FIXED and value in FIXED[key]) or (key == "act_bits" and value == 16)):
            raise ConfigError(
                f"the AWQ config's {where} overrides {key!r} ({value!r}), which may change the numbers; "
                f"{', '.join(OVERRIDES)} are understood, so use a newer qplug-awq"
            )
    if "sym" in values and "zero_point" not in values:
        values["zero_point"] = not values["sym"]
    return values


def _dynamic(entries: Any, quant: Any) -> list[Rule]:
    """GPTQModel's ``dynamic``: patterns with ``-:`` stay at 16 bit, others override; the first match wins."""
    if not isinstance(entries, dict):
        raise ConfigError(
            f"the AWQ config says dynamic: {entries!r}; an object of patterns and overrides was needed, so correct it"
        )
    rules = []
    for pattern, said in entries.items():
        origin = f"dynamic {pattern}"
        if pattern.startswith("-:"):
            rules.append(Rule(Matcher(pattern[2:], "regex"), None, origin=origin))
        else:
            made = quant(_overridden(said or {}, origin))
            rules.append(Rule(Matcher(pattern.removeprefix("+:"), "regex"), made, origin=origin))
    return rules


def _extra(entries: Any, quant: Any) -> list[Rule]:
    """auto-round's ``extra_config``: names with their own bits; 16 and more stay at 16 bit."""
    if not isinstance(entries, dict) or not all(isinstance(said, dict) for said in entries.values()):
        raise ConfigError(
            f"the AWQ config says extra_config: {entries!r}; an object of names and overrides was needed, so correct it"
        )
    rules = []
    for name, said in entries.items():
        origin = f"extra_config {name}"
        plain = isinstance(said.get("bits"), int) and said["bits"] >= 16
        made = None if plain else quant(_overridden(said, origin))
        rules.append(
            Rule(
                Matcher(name, "exact" if name.replace(".", "").replace("_", "").isalnum() else "search"), made, origin=origin
            )
        )
    return rules


def _head_quantized(raw: Mapping[str, Any], overrides: list[Rule], source: Source, inferred: list[str]) -> bool:
    if raw.get("lm_head") or any(rule.quant is not None and "lm_head" in rule.matcher.text for rule in overrides):
        return True
    if any(name.endswith("lm_head.qweight") for name in source.tensors):
        inferred.append("lm_head is quantized: the file holds lm_head.qweight")
        return True
    return False


def _skipped(raw: Mapping[str, Any], source: Source, inferred: list[str]) -> list[Rule]:
    """``modules_to_not_convert`` in AutoAWQ's dialect, and ``exclude_modules`` in TensorRT-LLM's."""
    rules = []
    stored = quantized_modules(source)
    for text in _names(raw, "modules_to_not_convert"):
        dialect: Any = "substring"
        swallowed = [name for name in stored if text in name]
        if swallowed:
            dialect = "component"
            if contradicted := next((name for name in swallowed if f".{text}." in f".{name}."), None):
                raise ConfigError(
                    f"the AWQ config has {text!r} in modules_to_not_convert and the file holds {contradicted}.qweight; the two "
                    "must say the same, so remove the entry or fetch the file again"
                )
            inferred.append(
                f"{text!r} in modules_to_not_convert is taken as a whole name: the file holds {swallowed[0]} and "
                f"{len(swallowed) - 1} more modules with it in their names as quantized"
            )
        rules.append(Rule(Matcher(text, dialect), None, origin="modules_to_not_convert"))
    rules += [Rule(Matcher(text, "fnmatch"), None, origin="exclude_modules") for text in _names(raw, "exclude_modules")]
    return rules


def _names(raw: Mapping[str, Any], key: str) -> list[str]:
    return list_of_names(raw.get(key), f"the AWQ config says {key}")


def _kv(algorithm: Any) -> TensorQuant | None:
    if says_nothing(algorithm):
        return None
    if not isinstance(algorithm, str) or algorithm.upper() not in KV:
        raise ConfigError(
            f"the AWQ config says kv_cache_quant_algo: {algorithm!r}; {' or '.join(KV)} was needed, so correct it or remove it"
        )
    return KV[algorithm.upper()]


def _producer(raw: Mapping[str, Any]) -> str:
    meta = raw.get("meta")
    made_by = meta.get("quantizer") if isinstance(meta, dict) else raw.get("quantizer")
    if isinstance(made_by, list):
        made_by = ", ".join(map(str, made_by))
    if made_by:
        return str(made_by)
    version = raw.get("autoround_version")
    return f"auto-round:{version}" if version else str(raw.get("provider") or "")
