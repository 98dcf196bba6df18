"""The ``quantization_config`` of plain FP8 checkpoints: read and written.

Tools say little there: ``{"quant_method": "fp8", "bits": 8}`` is a whole config. What is left out is read from the headers and
told in ``inferred``; without headers, blocks are as ``weight_block_size`` says, and everything else has tensor scales and
dynamic activations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from qplug_core.config import LayerQuant, QuantizationConfig, Rule
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.keys import check_keys, check_values, list_of_names, says_nothing
from qplug_core.match import Matcher
from qplug_core.scheme import QuantScheme, TensorQuant

from .headers import Found, ModuleSet, block_of, modules_meant, split_expert_scales, survey
from .layouts import BLOCKS, LAYOUTS
from .match import ignored

if TYPE_CHECKING:
    from qplug_core.source import Source

KEYS = {
    "quant_method", "activation_scheme", "weight_block_size", "fmt", "scale_fmt", "bits", "modules_to_not_convert",
    "ignored_layers", "exclude", "modules_to_convert", "dequantize", "kv_cache_scheme",
}  # fmt: skip
FIXED: dict[str, tuple[Any, ...]] = {"expert_dtype": ("fp8",), "bits": (8,), "group_size": (0,)}
"""Keys that change the numbers, with the values that are understood. Empty values say nothing and are always understood."""
METADATA = {"producer", "version", "transformers_version", "is_checkpoint_fp8_serialized", "kv_cache_quant_targets"}
FORMATS = {
    "e4m3": "fp8_e4m3",
    "e4m3fn": "fp8_e4m3",
    "float8_e4m3fn": "fp8_e4m3",
    "e5m2": "fp8_e5m2",
    "float8_e5m2": "fp8_e5m2",
}
SCALE_FORMATS = ("float", "float32", "ue8m0")
KV_SUFFIXES = (".k_scale", ".v_scale", ".kv_scale", ".k_proj.output_scale", ".v_proj.output_scale")


@dataclass(frozen=True)
class Said:
    """What a config says; None where it says nothing."""

    static: bool | None = None
    block: tuple[int, int] | None = None
    dtype: str | None = None
    ue8m0: bool = False
    weight_only: bool = False


def parse(source: Source) -> QuantizationConfig:
    """Rules, in the order in which they decide: ignore lists, converted embeddings, layers that differ, then all others.

    :raises ConfigError: for a key that is not understood, two that contradict each other, or values the headers contradict.
    """
    raw = source.quant_config or {}
    method = str(raw.get("quant_method") or "fp8").lower()
    _check_keys(raw)
    said = _said(raw)
    inferred: list[str] = []
    if count := split_expert_scales(source):
        inferred.append(
            f"{count} tensors hold the scales of all experts of a layer, as transformers 5 saves them: read one by one"
        )
    found = survey(source.tensors)
    rules = ignored(raw, "FP8")
    converted = _converted(raw)
    rules += [Rule(m, _embedding(said), origin="modules_to_convert") for m in converted]
    listed = set(modules_meant(found, [rule.matcher for rule in rules]))
    layers = [f for f in found if f.module not in listed]
    said = _complete(said, layers, inferred)
    quants = {f.module: _quant(f, said) for f in layers}
    default = _default(quants, said, "channel" if method == "w8a8_fp8" else "tensor", inferred)
    rules += _exceptions(quants, default, inferred)
    rules.append(Rule(Matcher("Embedding", "class"), None, implicit=True, origin="embeddings only by modules_to_convert"))
    if any(module.endswith("lm_head") for module in quants):
        inferred.append("lm_head is quantized: the file holds its FP8 weight")
    else:
        rules.append(Rule(Matcher("lm_head", "suffix"), None, implicit=True, origin="the output embedding stays 16 bit"))
    rules.append(Rule(Matcher("", "all"), default, origin="quant_method"))
    metadata = {key: value for key, value in raw.items() if key in METADATA or (key not in KEYS and key not in FIXED)}
    kv = _kv(raw, source, inferred)
    return QuantizationConfig(
        method, rules, kv=kv, producer=str(raw.get("producer") or ""), inferred=inferred, metadata=metadata
    )


def write(layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
    """The config that says ``layers``, with the keys that transformers, vLLM and SGLang read.

    :raises CannotEncode: where no layer is quantized, or layers differ: these tools have one scheme for all of them.
    """
    quants = {quant for quant in layers.values() if quant is not None}
    if not quants:
        raise CannotEncode("no layer is quantized; write a 16-bit checkpoint without a quantization config")
    if len(quants) > 1:
        names = " and ".join(sorted({f"{quant.scheme} as {quant.layout}" for quant in quants}))
        raise CannotEncode(f"layers of {names} were given; an FP8 config has one scheme for all, so use compressed-tensors")
    scheme = next(iter(quants)).scheme
    part, act = scheme.weight, scheme.act
    assert part is not None
    if (
        act is not None
        and act.dynamic
        and act != _activation(Said(block=_block(part), ue8m0=act.scale_dtype == "e8m0"), False)
    ):
        raise CannotEncode(
            f"activations of {scheme} were given; an FP8 config means one scale for each token, or for {part.block[1] or 'g'} "
            "columns of it where weights have blocks, so use compressed-tensors"
        )
    static = act is not None and not act.dynamic
    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "static" if static else "dynamic"}
    config["fmt"] = part.dtype.removeprefix("fp8_")
    config["weight_block_size"] = None if _block(part) is None else list(part.block)
    if act is None:
        config["dequantize"] = True
    elif act.scale_dtype == "e8m0":
        config["scale_fmt"] = "ue8m0"
    config["modules_to_not_convert"] = [name for name, quant in layers.items() if quant is None] or None
    return config


def _check_keys(raw: Mapping[str, Any]) -> None:
    # Tools write false for options that they did not use.
    said = {key: value for key, value in raw.items() if value is not False}
    check_values(said, FIXED, "the FP8 config")
    check_keys(said, (*KEYS, *FIXED, *METADATA), "the FP8 config", "qplug-fp8")


def _said(raw: Mapping[str, Any]) -> Said:
    scheme = str(raw.get("activation_scheme") or "").lower()
    if scheme not in ("", "static", "dynamic"):
        raise ConfigError(f"the FP8 config says activation_scheme: {raw['activation_scheme']!r}; write static or dynamic")
    block = raw.get("weight_block_size")
    if block is not None:
        whole = isinstance(block, (list, tuple)) and len(block) == 2
        if not whole or not all(type(extent) is int and extent > 0 for extent in block):
            raise ConfigError(
                f"the FP8 config says weight_block_size: {block!r}; two positive numbers [rows, columns] were needed, so correct it"
            )
    fmt = str(raw.get("fmt") or "").lower()
    if "fnuz" in fmt:
        raise ConfigError(
            f"the FP8 config says fmt: {fmt!r}; each byte of that type is half of what it is in e4m3fn, and safetensors has no name "
            "for it, so convert the checkpoint to e4m3fn on the machine that wrote it"
        )
    if fmt and fmt not in FORMATS:
        raise ConfigError(f"the FP8 config says fmt: {raw['fmt']!r}; {', '.join(FORMATS)} are understood, so correct it")
    scale_fmt = str(raw.get("scale_fmt") or "float").lower()
    if scale_fmt not in SCALE_FORMATS:
        raise ConfigError(
            f"the FP8 config says scale_fmt: {raw['scale_fmt']!r}; {', '.join(SCALE_FORMATS)} are understood, so correct it"
        )
    return Said(
        {"static": True, "dynamic": False}.get(scheme),
        None if block is None else (block[0], block[1]),
        FORMATS.get(fmt),
        scale_fmt == "ue8m0",
        bool(raw.get("dequantize")),
    )


def _complete(said: Said, layers: list[Found], inferred: list[str]) -> Said:
    """``said``, with what the headers say of static activations and blocks; refuses what they contradict."""
    static = [f for f in layers if f.static]
    if said.static is None and static:
        inferred.append(f"activations are static: {len(static)} of {len(layers)} FP8 layers have an activation scale")
    if said.static is False and static and not said.weight_only:
        raise ConfigError(
            f"the FP8 config says activation_scheme: dynamic, and {static[0].module} has a static activation scale; both cannot "
            "be, so set activation_scheme to static, or remove the scales"
        )
    if said.static and layers and not static:
        raise ConfigError(
            f"the FP8 config says activation_scheme: static, and none of {len(layers)} FP8 layers has an activation scale; set "
            "activation_scheme to dynamic, or fetch the checkpoint with its scales"
        )
    if said.block is None and (block := block_of(layers)) is not None:
        inferred.append(f"weight_block_size is not said: {list(block)}, read from the shapes of all scales")
        said = replace(said, block=block)
    dtypes = {f.dtype for f in layers}
    if said.dtype is not None and dtypes - {said.dtype}:
        wrong = next(f for f in layers if f.dtype != said.dtype)
        raise ConfigError(
            f"the FP8 config says fmt: {said.dtype.removeprefix('fp8_')}, and {wrong.module} is stored as "
            f"{wrong.dtype.removeprefix('fp8_')}; correct fmt"
        )
    return said


def _quant(found: Found, said: Said) -> LayerQuant:
    """The quantization of one matrix of the file."""
    granularity = found.granularity(said.block)
    layout = next((x for x in found.family if granularity in x.granularities), found.family[0])
    block = {"tensor": (0, 0), "channel": (1, 0)}.get(granularity) or said.block or (128, 128)
    blocks = block if granularity == "block" else None
    part = TensorQuant(found.dtype, block, scale_dtype="e8m0" if found.e8m0 else "float")
    static = found.static if said.static is None else said.static
    return LayerQuant(QuantScheme(part, _activation(replace(said, block=blocks), static)), layout.name)


def _default(quants: Mapping[str, LayerQuant], said: Said, granularity: str, inferred: list[str]) -> LayerQuant:
    """The commonest quantization of the file; without headers, what the config and its defaults say."""
    if quants:
        default = Counter(quants.values()).most_common(1)[0][0]
        part = default.scheme.weight
        assert part is not None
        if said.block is None:
            inferred.append(
                f"weight scales are by {part.granularity}: read from the shapes of {LAYOUTS[default.layout].scale}"
            )
        if part.scale_dtype == "e8m0":
            inferred.append("weight scales are powers of two: read from their dtype")
        return default
    block = said.block or ((0, 0) if granularity == "tensor" else (1, 0))
    part = TensorQuant(said.dtype or "fp8_e4m3", block)
    layout = "fp8" if said.block is None else "fp8_block"
    return LayerQuant(QuantScheme(part, _activation(said, bool(said.static))), layout)


def _exceptions(quants: Mapping[str, LayerQuant], default: LayerQuant, inferred: list[str]) -> list[Rule]:
    """One rule for each quantization of the file that is not the default."""
    modules: dict[LayerQuant, list[str]] = {}
    for module, quant in quants.items():
        if quant != default:
            modules.setdefault(quant, []).append(module)
    rules = []
    for quant, names in modules.items():
        inferred.append(f"{len(names)} layers are {quant.scheme} as {quant.layout}: read from their tensors")
        rules.append(Rule(ModuleSet.of(names), quant, implicit=True, origin="headers"))
    return rules


def _activation(said: Said, static: bool) -> TensorQuant | None:
    """Static: one stored scale. Dynamic: for each token, or for each ``bk`` columns of a token where weights have blocks."""
    if said.weight_only:
        return None
    if static:
        return TensorQuant("fp8_e4m3", (0, 0))
    if said.block is None:
        return TensorQuant("fp8_e4m3", (1, 0), dynamic=True)
    if said.ue8m0:
        # DeepSeek-V3.1 and later: 2**ceil(log2(amax / 448)) for activations too.
        return TensorQuant("fp8_e4m3", (1, said.block[1]), dynamic=True, scale_dtype="e8m0", rule="ceil")
    return TensorQuant("fp8_e4m3", (1, said.block[1]), dynamic=True)


def _block(part: TensorQuant) -> tuple[int, int] | None:
    return part.block if part.granularity in BLOCKS else None


def _converted(raw: Mapping[str, Any]) -> list[Matcher]:
    names = list_of_names(raw.get("modules_to_convert"), "the FP8 config says modules_to_convert")
    return [Matcher(name, "suffix") for name in names]


def _embedding(said: Said) -> LayerQuant:
    """Tables that are looked up: one scale for the tensor, and nothing to quantize in the input."""
    return LayerQuant(QuantScheme(TensorQuant(said.dtype or "fp8_e4m3", (0, 0))), "fp8")


def _kv(raw: Mapping[str, Any], source: Source, inferred: list[str]) -> TensorQuant | None:
    """``kv_cache_scheme``: ``"static"`` (AutoFP8) or an object as compressed-tensors writes it; else as the headers say."""
    value = raw.get("kv_cache_scheme")
    scheme = TensorQuant("fp8_e4m3", (0, 0))
    if says_nothing(value):
        scales = [name for name in source.tensors if name.endswith(KV_SUFFIXES)]
        if not scales:
            return None
        inferred.append(f"the KV cache is FP8: the file holds its scales, such as {scales[0]}")
        by_head = prod(source.tensors[scales[0]].shape) > 1
        return replace(scheme, block=(-1, 0)) if by_head else scheme
    if value == "static":
        return scheme
    if isinstance(value, dict):
        known = {"num_bits": 8, "type": "float", "dynamic": False, "strategy": "tensor", "symmetric": True}
        wrong = [k for k, v in value.items() if not says_nothing(v) and known.get(k) != v]
        if not wrong and value.get("num_bits") == 8:
            return scheme
    raise ConfigError(
        f"the FP8 config says kv_cache_scheme: {value!r}; 'static' or 8-bit float, static, by tensor was needed, so load it with a "
        "KV cache scheme of your own"
    )
