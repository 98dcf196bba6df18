"""What says how a quanto checkpoint is quantized: quanto_qmap.json, a QuantoConfig of transformers, or the tensors alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qplug_core.config import LayerQuant, QuantizationConfig, Rule
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.keys import check_keys, list_of_names
from qplug_core.match import Matcher
from qplug_core.scheme import QuantScheme, TensorQuant

if TYPE_CHECKING:
    from qplug_core.source import Source

TYPES = {
    "int8": "int8", "int4": "int4", "int2": "int2", "float8": "fp8_e4m3", "qint8": "int8", "qint4": "int4", "qint2": "int2",
    "qfloat8": "fp8_e4m3", "qfloat8_e4m3fn": "fp8_e4m3", "qfloat8_e5m2": "fp8_e5m2",
}  # fmt: skip
"""Number types, by the words of QuantoConfig and of quanto itself."""

STORED = {"int8": "I8", "fp8_e4m3": "F8_E4M3", "fp8_e5m2": "F8_E5M2"}
"""safetensors dtype of ``weight._data``."""

VALUES = {"int4": 2, "int2": 4}
"""Codes in one byte of ``weight._data._data``."""

GROUPS = (128, 96, 64, 32)
"""Group sizes that quanto tries, the first that divides K; rows of up to 128 columns, and those that none divides, are one group."""

KEYS = ("quant_method", "weights", "activations", "modules_to_not_convert")
NONE = (None, "none")


def parse(source: Source) -> QuantizationConfig:
    """Rules from the first that is there: quanto_qmap.json, the quantization_config, dtypes and shapes. Groups always from shapes.

    :raises ConfigError: for a type that is not known, and where it contradicts the tensors.
    """
    qmap = source.files.get("quanto_qmap.json")
    if qmap is not None:
        return _from_map(source, qmap)
    if source.quant_config is not None:
        return _from_config(source, source.quant_config)
    rules = []
    for module in _modules(source):
        found = next((dtype for dtype in (*STORED, *VALUES) if _holds(source, module, dtype)), None)
        if found is None:
            raise ConfigError(
                f"the tensors of {module} are those of no type of quanto; add quanto_qmap.json, which says what they are"
            )
        rules.append(
            Rule(Matcher(module, "exact"), _quant(source, module, found, None), implicit=True, origin="its tensors")
        )
    inferred = ["there is no quanto_qmap.json: types were read from dtypes and shapes, and activations stay 16 bit"]
    return QuantizationConfig("quanto", rules, producer="optimum-quanto", inferred=inferred)


def write(layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
    """The QuantoConfig that says ``layers``.

    :raises CannotEncode: where layers need different types, or none is quantized.
    """
    parts = {quant.scheme.weight for quant in layers.values() if quant is not None}
    types = {part.dtype for part in parts if part is not None}
    if len(types) != 1:
        what = " and ".join(sorted(types)) or "no quantized layer"
        raise CannotEncode(f"{what} was given; a QuantoConfig says one type for all layers, so choose one")
    word = next(word for word, dtype in TYPES.items() if dtype in types)
    skipped = [name for name, quant in layers.items() if quant is None]
    return {"quant_method": "quanto", "weights": word, "activations": None, "modules_to_not_convert": skipped}


def _from_map(source: Source, qmap: Mapping[str, Any]) -> QuantizationConfig:
    rules, ignorable = [], {}
    inferred: list[str] = []
    for module, said in qmap.items():
        if not isinstance(said, dict) or said.keys() - {"weights", "activations"}:
            raise ConfigError(
                f"quanto_qmap.json says {said!r} of {module}; weights and activations were needed, so save the model again or use a "
                "newer qplug-quanto"
            )
        act = _type(said.get("activations"), module)
        if said.get("weights") in NONE:
            weight = source.tensors.get(f"{module}.weight")
            if weight is not None and len(weight.shape) > 1:
                raise ConfigError(
                    f"quanto_qmap.json says weights 'none' and activations {said.get('activations')!r} of {module}; a 16-bit weight with "
                    "quantized activations is not read, so quantize weights too"
                )
            ignorable[f"{module}.input_scale"] = ignorable[f"{module}.output_scale"] = "outputs of norms are not quantized"
            continue
        dtype = _type(said.get("weights"), module)
        assert dtype is not None
        rules.append(Rule(Matcher(module, "exact"), _quant(source, module, dtype, act), origin="quanto_qmap.json"))
        if act is not None:
            inferred.append(
                "outputs stay 16 bit: quanto quantizes them only where the next operation takes quantized values"
            )
    return QuantizationConfig(
        "quanto", rules, producer="optimum-quanto", inferred=list(dict.fromkeys(inferred)), ignorable=ignorable
    )


def _from_config(source: Source, raw: Mapping[str, Any]) -> QuantizationConfig:
    check_keys(raw, KEYS, "the quanto config", "qplug-quanto")
    dtype, act = _type(raw.get("weights", "int8"), "weights"), _type(raw.get("activations"), "activations")
    if dtype is None:
        raise ConfigError(f"the quanto config says weights: {raw['weights']!r}; {', '.join(TYPES)} are known, so correct it")
    skipped = raw.get("modules_to_not_convert")
    names = list_of_names(skipped, "the quanto config says modules_to_not_convert")
    modules = _modules(source)
    if source.tensors and not modules:
        raise ConfigError(
            f"{source.path} has a quanto config and none of its {len(source.tensors)} tensors is quantized: transformers would do that as "
            "it loads; remove the quantization_config and load with quantize='W8A16' or another scheme"
        )
    origin = "modules_to_not_convert" if skipped is not None else "transformers leaves the output embedding at 16 bit"
    rules = [
        Rule(Matcher(name, "component"), None, implicit=skipped is None, origin=origin)
        for name in (["lm_head"] if skipped is None else names)
    ]
    rules.append(Rule(Matcher("Embedding", "class"), None, implicit=True, origin="quanto does not quantize embeddings"))
    default = _quant(source, "", dtype, act)
    for module in modules:
        if (quant := _quant(source, module, dtype, act)) != default:
            rules.append(
                Rule(Matcher(module, "exact"), quant, implicit=True, origin="the group size that divides its columns")
            )
    rules.append(Rule(Matcher("", "all"), default, origin="weights"))
    return QuantizationConfig("quanto", rules, producer="optimum-quanto")


def _type(word: Any, where: str) -> str | None:
    if word in NONE:
        return None
    if not isinstance(word, str) or word not in TYPES:
        raise ConfigError(
            f"the quanto type {word!r} of {where} is not read; {', '.join(TYPES)} are, so quantize with one of them or use a newer "
            "qplug-quanto"
        )
    return TYPES[word]


def _modules(source: Source) -> list[str]:
    return [name.removesuffix(".weight._scale") for name in source.tensors if name.endswith(".weight._scale")]


def _quant(source: Source, module: str, dtype: str, act: str | None) -> LayerQuant:
    """The quantization of a module, held against its tensors where there are any.

    :raises ConfigError: where they are those of another type.
    """
    if f"{module}.weight._scale" in source.tensors and not _holds(source, module, dtype):
        raise ConfigError(
            f"the tensors of {module} are not those of {dtype} weights, which the config says; correct it, or fetch the file again"
        )
    part = TensorQuant(dtype)
    if dtype in VALUES:
        packed = source.tensors.get(f"{module}.weight._data._data")
        width = GROUPS[0] if packed is None or len(packed.shape) != 2 else packed.shape[1]
        part = replace(part, block=(1, width if width in GROUPS else 0), symmetric=False)
    inputs = None if act is None else TensorQuant(act, (0, 0))
    return LayerQuant(QuantScheme(part, inputs), "quanto")


def _holds(source: Source, module: str, dtype: str) -> bool:
    """True where the tensors of a module are those of weights of ``dtype``."""
    if dtype in STORED:
        data = source.tensors.get(f"{module}.weight._data")
        return data is not None and data.dtype == STORED[dtype]
    packed, scale = (source.tensors.get(f"{module}.weight.{name}") for name in ("_data._data", "_scale"))
    if packed is None or scale is None or not packed.shape or not scale.shape:
        return False
    return packed.dtype == "U8" and packed.shape[0] == -(-scale.shape[0] // VALUES[dtype])
