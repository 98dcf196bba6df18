"""The two dialects in which a ModelOpt config is written, read into one value, and the agreement between two of them.

``hf_quant_config.json`` is nested: ``{"producer": {...}, "quantization": {"quant_algo", "kv_cache_quant_algo", "group_size",
"exclude_modules", "quantized_layers", ...}}``. Inside of config.json it is flat: ``{"quant_method": "modelopt", "quant_algo",
"kv_cache_scheme", "ignore", "config_groups", "quantized_layers", ...}``, where the exporter leaves group sizes out for
algorithms that compressed-tensors does not know. An exporter writes both; readers disagree on which one wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qplug_core.errors import ConfigError
from qplug_core.keys import check_keys, says_nothing

from .algos import MIXED, NO_QUANT, find

NUMBERS = {
    "quant_algo": (), "group_size": (), "quantized_layers": (), "has_zero_point": (), "pre_quant_scale": (),
    "kv_cache_quant_algo": ("kv_cache_scheme",), "exclude_modules": ("ignore",),
}  # fmt: skip
"""Keys that change the numbers, with their names in the flat dialect."""

LAYER_KEYS = ("quant_algo", "group_size", "has_zero_point", "pre_quant_scale")
METADATA = {
    "producer", "quant_method", "quantization_status", "version", "smoothquant_val", "lora_rank", "format",
    "global_compression_ratio", "awq_block_size",
}  # fmt: skip
FALSE_ONLY = ("use_meta_recipe",)
"""Keys that change the numbers unless they are false."""

IMPLIED = {"modelopt_fp4": "NVFP4", "modelopt_fp8": "FP8", "modelopt_mxfp8": "MXFP8", "modelopt_mixed": MIXED}
"""What a ``quant_method`` says where there is no ``quant_algo``."""

KV_ALGOS = ("FP8", "INT8", "NVFP4")


@dataclass
class Said:
    """What one config says; None and empty values say nothing.

    algo
        Canonical ``quant_algo``: a name of the table, ``MIXED_PRECISION``, or ``NO_QUANT``.
    exclude
        Patterns of modules that stay 16 bit; None where there is no list.
    layers
        ``quantized_layers``: module name to its own keys.
    groups
        ``config_groups`` of the flat dialect.
    """

    origin: str
    algo: str | None = None
    kv: str | None = None
    group_size: int | None = None
    exclude: list[str] | None = None
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    pre_quant_scale: bool | None = None
    producer: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


def read(raw: Mapping[str, Any], origin: str) -> Said:
    """One config in either dialect.

    :raises ConfigError: for a key that is not understood, or one whose value is not of its kind.
    """
    inner = raw.get("quantization")
    nested = isinstance(inner, Mapping)
    body: Mapping[str, Any] = inner if isinstance(inner, Mapping) else raw
    if nested:
        _check_keys({k: v for k, v in raw.items() if k != "quantization"}, set(), origin)
    known = {*NUMBERS, *(alias for aliases in NUMBERS.values() for alias in aliases), "config_groups", *FALSE_ONLY}
    _check_keys(body, known, origin)
    values = {key: _value(body, key, aliases, origin) for key, aliases in NUMBERS.items()}
    said = Said(origin, producer=_producer(raw))
    said.algo = _algo(values["quant_algo"], str(raw.get("quant_method") or "").lower(), origin)
    said.kv = _kv(values["kv_cache_quant_algo"], origin)
    said.group_size = _group_size(values["group_size"], origin)
    said.exclude = _exclude(body, origin)
    said.layers = _layers(values["quantized_layers"], origin)
    said.pre_quant_scale = _flags(values, origin)
    said.groups = _object(body.get("config_groups"), "config_groups", origin)
    said.metadata = {k: v for holder in (raw, body) for k, v in holder.items() if k in METADATA and k != "quant_method"}
    return said


def merge(mine: Said, other: Said) -> Said:
    """Both configs as one, each filling what the other leaves out; ``exclude`` is ``mine``'s where there are two.

    :raises ConfigError: for a key on which they differ.
    """
    for key in ("algo", "kv", "group_size", "layers", "pre_quant_scale"):
        first, second = getattr(mine, key), getattr(other, key)
        if not says_nothing(first) and not says_nothing(second) and first != second:
            shown = {"algo": "quant_algo", "kv": "kv_cache_quant_algo", "layers": "quantized_layers"}.get(key, key)
            first, second = _first_difference(first, second)
            raise ConfigError(
                f"{mine.origin} says {shown}: {first!r} and {other.origin} says {second!r}; correct the one that is wrong, or "
                "remove it"
            )
        if says_nothing(first):
            setattr(mine, key, second)
    mine.exclude = other.exclude if mine.exclude is None else mine.exclude
    mine.groups = mine.groups or other.groups
    mine.producer = mine.producer or other.producer
    mine.metadata = {**other.metadata, **mine.metadata}
    return mine


def _first_difference(first: Any, second: Any) -> tuple[Any, Any]:
    """The first entry in which two objects differ; other values as they are."""
    if not isinstance(first, dict):
        return first, second
    name = next(name for name in [*first, *second] if first.get(name) != second.get(name))
    return {name: first.get(name)}, {name: second.get(name)}


def _check_keys(body: Mapping[str, Any], known: set[str], origin: str) -> None:
    said = {key: value for key, value in body.items() if key not in FALSE_ONLY or value is not False}
    check_keys(said, (known - {*FALSE_ONLY}) | {*METADATA}, origin, "qplug-modelopt")


def _value(body: Mapping[str, Any], key: str, aliases: tuple[str, ...], origin: str) -> Any:
    said = {name: body[name] for name in (key, *aliases) if not says_nothing(body.get(name))}
    if key == "kv_cache_quant_algo":
        said = {name: _kv(value, origin) for name, value in said.items()}
    values = list(said.values())
    same = all(sorted(map(str, v)) == sorted(map(str, values[0])) if isinstance(v, list) else v == values[0] for v in values)
    if not same:
        text = " and ".join(f"{name}: {value!r}" for name, value in said.items())
        raise ConfigError(f"{origin} says {text}, which contradict each other; keep the one that the file was made with")
    return values[0] if values else None


def _algo(value: Any, method: str, origin: str) -> str | None:
    implied = IMPLIED.get(method)
    if value is None:
        return implied
    text = str(value).upper()
    algo = text if text in (MIXED, NO_QUANT) else find(value, origin).name
    # The two older methods name a family: everything with FP8, or with NVFP4 weights.
    family = {"modelopt_fp8": algo.startswith("FP8"), "modelopt_fp4": "NVFP4" in algo}.get(method, algo == implied)
    if implied and not family:
        raise ConfigError(
            f"{origin} says quant_method: {method!r} and quant_algo: {value!r}, which contradict each other; write quant_method: "
            "'modelopt', which leaves it to quant_algo"
        )
    return algo


def _kv(value: Any, origin: str) -> str | None:
    """The KV-cache algorithm, from a name or from an object of the flat dialect."""
    if says_nothing(value):
        return None
    name = value.upper() if isinstance(value, str) else ""
    if isinstance(value, Mapping):
        if value.get("dynamic"):
            raise ConfigError(
                f"{origin} says kv_cache_scheme: {dict(value)!r}; ModelOpt stores static scales, so write dynamic: false or "
                "remove it"
            )
        numbers = (value.get("type"), value.get("num_bits"))
        name = {("float", 8): "FP8", ("int", 8): "INT8", ("float", 4): "NVFP4"}.get(numbers, "")  # type: ignore[arg-type]
    if name in ("NONE", NO_QUANT):
        return None
    if name not in KV_ALGOS:
        raise ConfigError(
            f"{origin} says the KV cache is {value!r}; one of {', '.join(KV_ALGOS)} was needed (a cache with a bias, NVFP4_AFFINE, "
            "is not read), so remove it to keep a 16-bit cache"
        )
    return name


def _group_size(value: Any, origin: str) -> int | None:
    if value is None or value == 0:
        return None  # The exporter writes 0 where a layer has no blocks.
    if type(value) is not int or value < 1:
        raise ConfigError(f"{origin} says group_size: {value!r}; a positive number was needed, so correct it")
    return value


def _exclude(body: Mapping[str, Any], origin: str) -> list[str] | None:
    value = _value(body, "exclude_modules", NUMBERS["exclude_modules"], origin)
    if value is None:
        # An empty list is a list: it says that every layer is quantized.
        return [] if any(body.get(key) == [] for key in ("exclude_modules", "ignore")) else None
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise ConfigError(f"{origin} says exclude_modules: {value!r}; a list of names or patterns was needed, so correct it")
    return list(dict.fromkeys(value))


def _layers(value: Any, origin: str) -> dict[str, dict[str, Any]]:
    layers = _object(value, "quantized_layers", origin)
    for name, entry in layers.items():
        if not isinstance(entry, dict) or not entry.get("quant_algo"):
            raise ConfigError(
                f"{origin} says quantized_layers {name}: {entry!r}; an object with quant_algo was needed, so correct it"
            )
        check_keys(entry, (*LAYER_KEYS, *METADATA), f"{origin}, quantized_layers {name},", "qplug-modelopt")
        _flags(entry, f"{origin}, quantized_layers {name},")
        _group_size(entry.get("group_size"), f"{origin}, quantized_layers {name},")
    return layers


def _object(value: Any, key: str, origin: str) -> dict[str, Any]:
    if says_nothing(value):
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{origin} says {key}: {value!r}; an object was needed, so correct it")
    return value


def _flags(values: Mapping[str, Any], origin: str) -> bool | None:
    """Whether ``pre_quant_scale`` is said. Codes with zero points are in no file of this format."""
    for key in ("has_zero_point", "pre_quant_scale"):
        if not isinstance(values.get(key), bool | None):
            raise ConfigError(f"{origin} says {key}: {values[key]!r}; true or false was needed, so correct it")
    if values.get("has_zero_point"):
        raise ConfigError(
            f"{origin} says has_zero_point: true; ModelOpt stores symmetric codes without zero points, so set it to false if the "
            "file has none"
        )
    return values.get("pre_quant_scale")


def _producer(raw: Mapping[str, Any]) -> str:
    made_by = raw.get("producer")
    if isinstance(made_by, Mapping):
        return ":".join(str(made_by[key]) for key in ("name", "version") if made_by.get(key))
    return str(made_by or "")
