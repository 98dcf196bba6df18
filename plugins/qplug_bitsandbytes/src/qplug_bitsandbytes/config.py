"""The ``quantization_config`` of bitsandbytes checkpoints: read, with what the headers say, and written."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qplug_core.config import LayerQuant, QuantizationConfig, Rule
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.keys import list_of_names, says_nothing, take
from qplug_core.match import Matcher
from qplug_core.scheme import QuantScheme
from qplug_core.source import ITEM_BYTES

if TYPE_CHECKING:
    from qplug_core.source import Source

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What bitsandbytes makes. 64 is its default; it was 128 on AMD devices."""

STORAGE = {"uint8": "U8", "int8": "I8", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""``bnb_4bit_quant_storage``: the dtype under which the bytes of packed codes are stored (FSDP wants that of the model)."""

SCHEMES = {"nf4": "WNF4A16", "fp4": "Wfp4bnbA16"}
KEYS = (
    "load_in_4bit", "_load_in_4bit", "load_in_8bit", "_load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
    "bnb_4bit_quant_storage", "llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_has_fp16_weight", "quant_method",
)  # fmt: skip
METADATA = ("bnb_4bit_compute_dtype", "llm_int8_enable_fp32_cpu_offload")
_STATE = re.compile(r"^(?P<module>.+)\.weight\.quant_state\.bitsandbytes__(?P<kind>nf4|fp4)$")
REMEDY = "correct the quantization config"


def parse(source: Source) -> QuantizationConfig:
    """One quantization for all linear layers, without those of ``llm_int8_skip_modules``; the headers say which blocksize.

    Without a list of skipped modules, the output embedding stays 16 bit, as transformers leaves it.

    :raises ConfigError: for an unknown key, no width, or a type that is not the one of the stored tensors.
    """
    raw = source.quant_config or {}
    said = {key: value for key, value in raw.items() if not says_nothing(value)}
    values = take(said, dict.fromkeys(KEYS), METADATA, "the bitsandbytes config", "qplug-bitsandbytes")
    if _flag(values, "llm_int8_has_fp16_weight"):
        raise ConfigError(
            "the bitsandbytes config says llm_int8_has_fp16_weight: true, which is training on 16-bit weights; load the 16-bit "
            "checkpoint with quantize='W8A8_a:outlier=6'"
        )
    found = _stored(source, values)
    inferred: list[str] = []
    default = _default(values, found, inferred)
    common = Counter(found.values()).most_common(1)[0][0] if found else default
    if found and common.scheme.weight != default.scheme.weight:
        assert common.scheme.weight is not None
        inferred.append(f"blocks of {common.scheme.weight.block[1]} values: read off the shapes of weight and absmax")
    skip = list_of_names(values["llm_int8_skip_modules"], "the bitsandbytes config says llm_int8_skip_modules")
    rules = [Rule(Matcher(name, "component"), None, origin="llm_int8_skip_modules") for name in skip]
    for module, quant in found.items():
        if quant != common or module.rsplit(".", 1)[-1] == "lm_head":
            rules.append(Rule(Matcher(module, "exact"), quant, implicit=True, origin="its tensors"))
    rules.append(Rule(Matcher("Embedding", "class"), None, implicit=True, origin="transformers replaces linear layers only"))
    if not skip:
        origin = "llm_int8_skip_modules names nothing, so the output embedding is skipped"
        rules.append(Rule(Matcher("lm_head", "suffix"), None, implicit=True, origin=origin))
    rules.append(Rule(Matcher("", "all"), common, origin="load_in_4bit" if _bits(common) == 4 else "load_in_8bit"))
    metadata = {key: raw[key] for key in METADATA if key in raw}
    return QuantizationConfig("bitsandbytes", rules, producer="bitsandbytes", inferred=inferred, metadata=metadata)


def write(layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
    """The config that says ``layers``.

    :raises CannotEncode: where layers need different widths, types or thresholds: one config has one of each.
    """
    quants = [quant for quant in layers.values() if quant is not None]
    if not quants:
        raise CannotEncode("no layer is quantized; write a 16-bit checkpoint without a quantization config")
    # The blocksize is no key of the config: each layer says its own.
    plain = {(q.scheme.act, q.scheme.weight and replace(q.scheme.weight, block=(1, 0)), q.opts) for q in quants}
    if len(plain) > 1:
        schemes = " and ".join(sorted({str(quant.scheme) for quant in quants}))
        raise CannotEncode(f"{schemes} were given; one bitsandbytes checkpoint has one type, so quantize all layers alike")
    first = quants[0]
    part, act = first.scheme.weight, first.scheme.act
    assert part is not None
    four = _bits(first) == 4
    config: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four}
    if four:
        names = {dtype: name for name, dtype in STORAGE.items()}
        config["bnb_4bit_quant_type"] = "nf4" if part.dtype == "nf4" else "fp4"
        config["bnb_4bit_use_double_quant"] = False
        config["bnb_4bit_quant_storage"] = names[first.opt("storage", "U8")]
    else:
        config["llm_int8_threshold"] = act.outlier if act else 0.0
    config["llm_int8_skip_modules"] = [name for name, quant in layers.items() if quant is None] or None
    return config


def _default(values: Mapping[str, Any], found: Mapping[str, LayerQuant], inferred: list[str]) -> LayerQuant:
    """What the config says of every layer."""
    four, eight = (_flag(values, f"load_in_{b}bit") or _flag(values, f"_load_in_{b}bit") for b in (4, 8))
    if four and eight:
        raise ConfigError(
            f"the bitsandbytes config says both load_in_4bit and load_in_8bit; one of them was needed, so {REMEDY}"
        )
    if not four and not eight:
        if not found:
            raise ConfigError(
                f"the bitsandbytes config says neither load_in_4bit nor load_in_8bit, and no tensor shows which; {REMEDY}"
            )
        four = _bits(next(iter(found.values()))) == 4
        inferred.append(f"load_in_{'4' if four else '8'}bit: read off the names of the tensors")
    wrong = next((module for module, quant in found.items() if (_bits(quant) == 4) != four), None)
    if wrong is not None:
        width = 4 if four else 8
        raise ConfigError(
            f"the bitsandbytes config says load_in_{width}bit and {wrong} is stored with {12 - width} bits; {REMEDY}"
        )
    return _four_bit(values, found, inferred) if four else _eight_bit(values, inferred)


def _eight_bit(values: Mapping[str, Any], inferred: list[str]) -> LayerQuant:
    threshold = values["llm_int8_threshold"]
    if threshold is None:
        threshold = 6.0
        inferred.append("llm_int8_threshold is not said: 6.0, the default of bitsandbytes")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < math.inf:
        raise ConfigError(
            f"the bitsandbytes config says llm_int8_threshold: {threshold!r}; a number from 0 was needed, so {REMEDY}"
        )
    return int8_quant(float(threshold))


def int8_quant(threshold: float) -> LayerQuant:
    """LLM.int8 with columns from ``threshold`` on at 16 bit."""
    scheme = QuantScheme.parse("W8A8")
    assert scheme.act is not None
    return LayerQuant(replace(scheme, act=replace(scheme.act, outlier=threshold)), "bnb_8bit")


def _four_bit(values: Mapping[str, Any], found: Mapping[str, LayerQuant], inferred: list[str]) -> LayerQuant:
    stored = next(iter(found.values()), None)
    kind = values["bnb_4bit_quant_type"]
    if kind is None:
        if stored is None:
            inferred.append("bnb_4bit_quant_type is not said: fp4, the default of bitsandbytes")
        kind = _kind(stored) if stored else "fp4"
    if kind not in SCHEMES:
        raise ConfigError(f"the bitsandbytes config says bnb_4bit_quant_type: {kind!r}; nf4 or fp4 was needed, so {REMEDY}")
    wrong = next((module for module, quant in found.items() if _kind(quant) != kind), None)
    if wrong is not None:
        raise ConfigError(
            f"the bitsandbytes config says bnb_4bit_quant_type: {kind!r} and {wrong} is stored as {_kind(found[wrong])}; {REMEDY}"
        )
    double = _flag(values, "bnb_4bit_use_double_quant")
    if stored is not None and bool(stored.opt("double")) != double:
        double = not double
        inferred.append(f"double quantization: {'yes' if double else 'no'}, as the tensors show; the config says otherwise")
    storage = values["bnb_4bit_quant_storage"] or "uint8"
    if storage not in STORAGE:
        raise ConfigError(
            f"the bitsandbytes config says bnb_4bit_quant_storage: {storage!r}; {', '.join(STORAGE)} are read, so convert the file "
            "with bitsandbytes"
        )
    dtype = stored.opt("storage", "U8") if stored else STORAGE[storage]
    if dtype != STORAGE[storage]:
        inferred.append(f"codes are stored as {dtype}, as the tensors show; the config says {storage}")
    return _quant(kind, 64, double, dtype)


def _stored(source: Source, values: Mapping[str, Any]) -> dict[str, LayerQuant]:
    """The quantization of every module whose tensors are those of bitsandbytes."""
    found: dict[str, LayerQuant] = {}
    threshold = values["llm_int8_threshold"]
    for name in source.tensors:
        state = _STATE.match(name)
        module = state["module"] if state else name.removesuffix(".SCB")
        weight = source.tensors.get(f"{module}.weight")
        if weight is None or module == name:
            continue
        if state is None:
            valid = isinstance(threshold, int | float) and threshold >= 0
            found[module] = int8_quant(float(threshold) if valid else 6.0)
            continue
        absmax = source.tensors.get(f"{module}.weight.absmax")
        blocks = math.prod(absmax.shape) if absmax else 0
        codes = 2 * math.prod(weight.shape) * ITEM_BYTES[weight.dtype]
        fitting = [size for size in BLOCKSIZES if -(-codes // size) == blocks]
        # One block of a small layer fits several sizes, which then mean the same.
        size = 64 if 64 in fitting or not fitting else fitting[0]
        found[module] = _quant(state["kind"], size, f"{module}.weight.nested_absmax" in source.tensors, weight.dtype)
    return found


def _quant(kind: str, size: int, double: bool, dtype: str) -> LayerQuant:
    opts: tuple[tuple[str, Any], ...] = (("double", True),) if double else ()
    if dtype != "U8":
        opts += (("storage", dtype),)
    return LayerQuant(QuantScheme.parse(f"{SCHEMES[kind]}_g{size}"), "bnb_4bit", opts)


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values[key]
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"the bitsandbytes config says {key}: {value!r}; true or false was needed, so {REMEDY}")
    return bool(value)


def _bits(quant: LayerQuant) -> int:
    return 8 if quant.layout == "bnb_8bit" else 4


def _kind(quant: LayerQuant) -> str:
    assert quant.scheme.weight is not None
    return "nf4" if quant.scheme.weight.dtype == "nf4" else "fp4"
