"""Schemes of torchao's configs and tensor classes, which are JSON as ``{"_type": name, "_data": {fields}}``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qplug_core.errors import ConfigError
from qplug_core.scheme import QuantScheme, TensorQuant

CONFIGS = (
    "Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "IntxWeightOnlyConfig",
    "Int8DynamicActivationIntxWeightConfig", "Float8WeightOnlyConfig", "Float8DynamicActivationFloat8WeightConfig",
)  # fmt: skip
CLASSES = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
FREE = (
    "group_size", "granularity", "act_mapping_type", "mapping_type", "weight_dtype", "weight_granularity",
    "weight_mapping_type", "activation_dtype", "activation_value_ub",
)  # fmt: skip
"""Fields that say the scheme."""

FIXED: dict[str, tuple[Any, ...]] = {
    "weight_only_decode": (False, None),
    "reduce_range": (False, None),
    "intx_packing_format": ("UNPACKED_TO_INT8", None),
    "packing_format": ("PLAIN", None),
    "activation_value_lb": (None,),
}
"""Fields with the values that are understood."""

METADATA = (
    "set_inductor_config", "scale_dtype", "weight_scale_dtype", "intx_choose_qparams_algorithm", "mm_config",
    "kernel_preference", "version", "alg_id", "int4_packing_format",
)  # fmt: skip
"""Fields that are about how scales were chosen, or how products are computed."""

_FLOATS = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}
TENSOR, CHANNEL = (0, 0), (1, 0)


def of_config(config: Any, where: str) -> QuantScheme:
    """The scheme of one config.

    :raises ConfigError: for another type of config, or a field that is not understood.
    """
    kind, data = typed(config, where)
    if kind not in CONFIGS:
        raise ConfigError(f"{where} is {kind}; {', '.join(CONFIGS)} are read, so convert the checkpoint with torchao")
    fields = {key: plain(value) for key, value in data.items()}
    for key, value in fields.items():
        if key in FIXED and value not in FIXED[key]:
            raise ConfigError(f"{kind} says {key}: {value!r}; {FIXED[key][0]!r} is read, so quantize again without it")
        if key not in (*FIXED, *FREE, *METADATA) and value is not None:
            raise ConfigError(
                f"{kind} has the field {key!r} ({value!r}), which is not known and may change the numbers; use a newer qplug-torchao"
            )
    act, weight = _granularities(kind, data)
    if "Intx" in kind and weight == TENSOR:
        raise ConfigError(f"{kind} says granularity PerTensor; PerAxis(0) or PerGroup was needed, so quantize again")
    if kind.startswith("Float8"):
        part = TensorQuant(_float8(fields.get("weight_dtype"), where), weight)
        if "Dynamic" not in kind:
            return QuantScheme(part)
        return QuantScheme(part, _float8_act(fields.get("activation_dtype"), act, fields.get("activation_value_ub"), where))
    symmetric = not str(fields.get("mapping_type") or fields.get("weight_mapping_type") or "").startswith("ASYM")
    part = TensorQuant(_integer(fields.get("weight_dtype") or "int8", where), weight, symmetric)
    if "Dynamic" not in kind:
        return QuantScheme(part)
    default = "ASYMMETRIC" if "Intx" in kind else "SYMMETRIC"
    return QuantScheme(part, _int8_act(act, str(fields.get("act_mapping_type") or default)))


def of_tensor(text: Any, where: str, shape: tuple[int, ...], dtype: str, expected: QuantScheme | None) -> QuantScheme:
    """The scheme of one entry of a file's metadata, for codes of ``shape`` and safetensors ``dtype``.

    ``expected``: what the config says of the layer. It alone says whether integers have zero points, and calls one group of
    all columns a group.

    :raises ConfigError: for another class, or an attribute that is not understood.
    """
    kind, data = typed(text, where)
    if kind not in CLASSES:
        raise ConfigError(
            f"{where} is a {kind}; {', '.join(CLASSES)} are read, so quantize again with a config that makes one of these"
        )
    fields = {key: plain(value) for key, value in data.items()}
    if fields.get("reduce_range"):
        raise ConfigError(f"{where} says reduce_range: true; false is read, so quantize again without it")
    part = expected.weight if expected else None
    block = _block(fields.get("block_size") or list(shape), shape, part)
    kwargs = data.get("act_quant_kwargs")
    if kind == "Float8Tensor":
        act = None
        if kwargs:
            said = typed(kwargs, where)[1]
            if said.get("hp_value_lb") is not None:
                raise ConfigError(
                    f"{where} bounds activations from below; no kernel knows this, so quantize again without it"
                )
            act = _float8_act(
                plain(said.get("float8_dtype")), _extent(said["granularity"], where), said.get("hp_value_ub"), where
            )
        return QuantScheme(TensorQuant("fp8_e5m2" if dtype == "F8_E5M2" else "fp8_e4m3", block), act)
    symmetric = part.symmetric if part else kind == "Int8Tensor"
    weight = TensorQuant(_integer(fields.get("target_dtype") or "int8", where), block, symmetric)
    if kind == "Int8Tensor":
        if not kwargs:
            return QuantScheme(weight)
        said = typed(kwargs, where)[1]
        if said.get("reduce_range"):
            raise ConfigError(f"{where} says reduce_range: true of activations; false is read, so quantize again without it")
        return QuantScheme(weight, _int8_act(_extent(said["granularity"], where), str(plain(said["mapping_type"]))))
    said_act = fields.get("activation_quantization")
    if said_act is None:
        return QuantScheme(weight)
    if said_act not in ("int8_asym_per_token", "int8_sym_per_token"):
        raise ConfigError(
            f"{where} says activation_quantization: {said_act!r}; int8_asym_per_token or int8_sym_per_token is read"
        )
    return QuantScheme(weight, _int8_act(CHANNEL, "ASYMMETRIC" if "asym" in said_act else "SYMMETRIC"))


def typed(value: Any, where: str) -> tuple[str, Mapping[str, Any]]:
    """Name and fields of ``{"_type": ..., "_data": {...}}``.

    :raises ConfigError: for anything else.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("_type"), str):
        raise ConfigError(
            f"{where} is {value!r}; a torchao config with _type and _data was needed, so save the checkpoint again with "
            "transformers 5 and torchao 0.15 or newer"
        )
    data = value.get("_data", {})
    return value["_type"], data if isinstance(data, Mapping) else {}


def plain(value: Any) -> Any:
    """``int4`` of ``{"_type": "torch.dtype", "_data": "int4"}``; other values as they are."""
    return value.get("_data") if isinstance(value, Mapping) and not isinstance(value.get("_data"), Mapping) else value


def _granularities(kind: str, data: Mapping[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Blocks of activations and of weights."""
    said = data.get("weight_granularity") or data.get("granularity")
    if group := data.get("group_size"):
        said = {"_type": "PerGroup", "_data": {"group_size": group}}
    if isinstance(said, list):
        return _extent(said[0], kind), _extent(said[1], kind)
    if said is None:
        # Float8 configs compute one scale for the tensor unless they are told otherwise, but for weights alone.
        default = TENSOR if kind == "Float8DynamicActivationFloat8WeightConfig" else CHANNEL
        return default, default
    weight = _extent(said, kind)
    return (TENSOR if weight == TENSOR else CHANNEL), weight


def _extent(said: Any, where: str) -> tuple[int, int]:
    kind, data = typed(said, where)
    group, axis = data.get("group_size"), data.get("axis", data.get("dim", -1))
    if kind == "PerTensor":
        return TENSOR
    if kind in ("PerToken",) or (kind == "PerRow" and axis in (-1, 1)) or (kind == "PerAxis" and axis == 0):
        return CHANNEL
    if kind == "PerGroup" and isinstance(group, int) and group > 0:
        return (1, group)
    raise ConfigError(
        f"{where} says granularity {kind} {dict(data)}; PerTensor, PerRow(-1), PerAxis(0) or PerGroup was needed, so quantize again"
    )


def _block(said: Any, shape: tuple[int, ...], part: TensorQuant | None) -> tuple[int, int]:
    if not isinstance(said, list) or len(said) != len(shape) or len(shape) != 2:
        raise ConfigError(
            f"block_size {said!r} was found for codes {list(shape)}; one extent for each of N and K was needed"
        )
    rows, columns = said
    if part is not None and (rows or shape[0], columns) == part.block:
        return part.block
    if (rows, columns) == shape and (rows != 1 or (part is not None and part.block == TENSOR)):
        return TENSOR
    if rows == 1 and 0 < columns <= shape[1]:
        return CHANNEL if columns == shape[1] else (1, int(columns))
    raise ConfigError(
        f"block_size {said!r} was found for codes {list(shape)}; rows, groups of columns or the whole were needed"
    )


def _integer(dtype: Any, where: str) -> str:
    if dtype not in tuple(f"int{bits}" for bits in range(2, 9)):
        raise ConfigError(f"{where} says codes of {dtype!r}; int2 to int8 are read, so quantize again")
    return str(dtype)


def _float8(dtype: Any, where: str) -> str:
    if (dtype or "float8_e4m3fn") not in _FLOATS:
        raise ConfigError(f"{where} says codes of {dtype!r}; {' or '.join(_FLOATS)} is read, so quantize again")
    return _FLOATS[dtype or "float8_e4m3fn"]


def _float8_act(dtype: Any, block: tuple[int, int], bound: Any, where: str) -> TensorQuant:
    return TensorQuant(_float8(dtype, where), block, dynamic=True, rule=f"ub{bound:g}" if bound else "")


def _int8_act(block: tuple[int, int], mapping: str) -> TensorQuant:
    """Symmetric activations have the scale amax / 127.5."""
    act = TensorQuant("int8", block, symmetric=not mapping.startswith("ASYM"), dynamic=True)
    return replace(act, rule="127.5") if act.symmetric else act
