"""The keys of a GPTQ config: which change the numbers, which do not, and what a layer's values mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qplug_core.config import LayerQuant
from qplug_core.errors import ConfigError
from qplug_core.keys import check_keys, check_values, resolve_aliases
from qplug_core.scheme import QuantScheme, TensorQuant

from . import activation

BITS = {"gptq": (2, 3, 4, 8), "gptq_v2": (2, 3, 4, 8), "gptq_p": (2, 3, 4, 5, 6, 7, 8), "marlin": (4,), "marlin_24": (4, 8)}
"""Widths of each layout."""

METHODS = {
    "gptq": None, "gptq_marlin": None, "auto_gptq": None,
    "marlin": "marlin", "gptq_marlin_24": "marlin_24", "marlin_24": "marlin_24",
}  # fmt: skip
"""Values of ``quant_method``, with the layout that each implies. ``gptq_marlin`` and ``auto_gptq`` are kernels of vLLM, by which
some files are called; they hold plain GPTQ tensors."""

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
    "data_type": ("int", "fp8_to_int_sym"),
    "pack_dtype": ("int32",),
    "is_marlin_format": (True, False),
    "rotation": (),
    "adapter": (),
    "zero_point": (True,),
}
"""Keys that change the numbers, with the values that are understood. Empty values say nothing and are always understood."""

RULES = ("dynamic", "lm_head", "modules_in_block_to_quantize", "modules_to_not_convert")
"""Keys that say which layers are quantized, and how."""

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
    "seqlen", "static_groups", "super_bits", "super_group_size", "telemetry", "tokenizer", "true_sequential", "uri",
    "use_cuda_fp16", "use_exllama", "use_exllama_v2", "v2", "v2_alpha", "version", "vllm_backend",
    "wait_for_submodule_finalizers",
}  # fmt: skip
"""Keys that say how the numbers were found, or how some engine is to run them: they change none of them."""

OVERRIDES = ("bits", "group_size", "desc_act", "sym")
"""Keys that a rule for single layers may set."""


def check(raw: Mapping[str, Any], more: Iterable[str] = (), kind: str = "GPTQ") -> None:
    """Refuse every key that is not known and every value that is not understood.

    ``more``: further keys that the caller reads. ``kind``: what the config is called in messages.

    :raises ConfigError: naming the key.
    """
    known = {*ALIASES, *(alias for aliases in ALIASES.values() for alias in aliases), *FIXED, *METADATA, *RULES}
    known |= {*activation.KEYS, *more}
    check_keys(raw, known, f"the {kind} config", "qplug-gptq")
    check_values(raw, FIXED, f"the {kind} config")


def numbers(raw: Mapping[str, Any], methods: Iterable[str] = METHODS) -> dict[str, Any]:
    """Values of the keys that change the numbers, one for each key and its aliases.

    :raises ConfigError: for aliases that contradict each other, or a ``quant_method`` that is not one of ``methods``.
    """
    values = resolve_aliases(raw, ALIASES, "the GPTQ config")
    method = values.get("quant_method", "gptq")
    if str(method).lower() not in methods:
        raise ConfigError(
            f"the GPTQ config says quant_method: {method!r}; {' or '.join(map(repr, methods))} was needed, so use the plugin of "
            "that method"
        )
    return values


def layout_of(values: Mapping[str, Any], raw: Mapping[str, Any], inferred: list[str]) -> tuple[str, bool]:
    """The layout, and whether the config names it: where it does not, zero points decide between v1 and v2.

    :raises ConfigError: for a format that is unknown, or two keys that name different ones.
    """
    named = {"checkpoint_format": values.get("checkpoint_format")}
    named["quant_method"] = METHODS.get(str(values.get("quant_method", "gptq")).lower())
    if raw.get("is_marlin_format"):
        named["is_marlin_format"] = "marlin"
    said = {key: layout for key, layout in named.items() if layout}
    # A 2:4 file is a Marlin file too, and says both.
    if set(said.values()) == {"marlin", "marlin_24"}:
        return "marlin_24", True
    if len(set(said.values())) > 1:
        text = " and ".join(f"{key} ({layout})" for key, layout in said.items())
        raise ConfigError(f"the GPTQ config names different layouts by {text}; keep the one that the file was made with")
    layout = next(iter(said.values()), None)
    if layout is None and values.get("bits") in (5, 6, 7):
        inferred.append(f"checkpoint_format is not said: gptq_p, because {values['bits']} bits are stored in no other")
        return "gptq_p", True
    if layout is None:
        inferred.append(
            "checkpoint_format is not said: v1 (zero points minus one), unless the zero points of a layer prove v2"
        )
        return "gptq", False
    if layout not in BITS:
        raise ConfigError(
            f"the GPTQ config says checkpoint_format: {layout!r}; {' or '.join(BITS)} was needed, so convert the file with "
            "GPTQModel"
        )
    return str(layout), True


def layer_quant(
    values: Mapping[str, Any], layout: str, opts: Mapping[str, Any], act: TensorQuant | None = None
) -> LayerQuant:
    """The quantization that values of the keys of :data:`ALIASES` mean.

    :raises ConfigError: for a value that the layout does not have.
    """
    bits, group = values.get("bits"), values.get("group_size", -1)
    if type(bits) is not int or bits not in BITS[layout]:
        raise ConfigError(
            f"the GPTQ config says bits: {bits!r}; {_one_of(BITS[layout])} was needed in the format {layout}, so correct it"
            + (", or set checkpoint_format to 'gptq_p'" if bits in (5, 6, 7) else "")
        )
    if type(group) is not int or (group < 1 and group != -1):
        raise ConfigError(
            f"the GPTQ config says group_size: {group!r}; a positive number, or -1 for one group, was needed, so correct it"
        )
    for key in ("desc_act", "sym"):
        if not isinstance(values.get(key), bool | None):
            raise ConfigError(f"the GPTQ config says {key}: {values[key]!r}; true or false was needed, so correct it")
    packed = layout in ("marlin", "marlin_24")
    if packed and values.get("sym") is False:
        raise ConfigError(
            f"the GPTQ config says sym: false, and the format {layout} holds no zero points; correct one of them"
        )
    # With one group for the whole row there is no order to keep.
    act_order = values.get("desc_act") is True and group != -1
    if act_order and packed:
        raise ConfigError(
            f"the GPTQ config says desc_act: true, and the format {layout} holds no g_idx; correct one of them"
        )
    if act_order and opts.get("g_idx") is False:
        raise ConfigError(
            "the GPTQ config says desc_act: true and the file has no g_idx tensors; act order needs them, so correct the config"
        )
    symmetric = packed or values.get("sym") is True
    part = TensorQuant(f"int{bits}", (1, 0) if group == -1 else (1, group), symmetric=symmetric)
    scheme = QuantScheme(part, act, act_order=act_order, sparsity="2:4" if layout == "marlin_24" else "")
    kept = {} if packed else dict(opts)
    if layout != "gptq" or symmetric:
        kept.pop("whole_words", None)
    if act is None or act.dynamic is not False:
        kept.pop("act_scale", None)
    return LayerQuant(scheme, layout, tuple(sorted(kept.items())))


def _one_of(values: Iterable[int]) -> str:
    return "one of " + ", ".join(map(str, values))
