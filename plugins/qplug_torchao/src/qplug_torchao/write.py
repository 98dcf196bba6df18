"""The config that says which layer was stored how, and the metadata that transformers needs beside it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from qplug_core.config import LayerQuant
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.scheme import QuantScheme, TensorQuant

from .schemes import CHANNEL, TENSOR, of_config

_DTYPES = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}


def check_scheme(scheme: QuantScheme) -> None:
    """Refuse a scheme that no config of torchao means.

    :raises CannotEncode: naming the scheme.
    """
    part = scheme.weight
    try:
        plain = part is not None and not (part.rule or part.outlier) and part.scale_dtype == "float"
        if plain and not scheme.sparsity and not scheme.act_order and of_config(config_of(scheme), "the scheme") == scheme:
            return
    except ConfigError:
        plain = False
    raise CannotEncode(
        f"scheme {scheme} was given; torchao stores W2A16 to W8A16 and Wfp8A16 by tensor, channel or group, W4A8 and W8A8 with "
        "token scales (a:rule=127.5 or a:asym) and Wfp8Afp8 by channel or tensor, so choose another format"
    )


def write(layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
    """The config of ``layers``: one for all, with names where they differ.

    :raises CannotEncode: where no layer is quantized.
    """
    schemes = {name: quant.scheme for name, quant in layers.items() if quant is not None}
    if not schemes:
        raise CannotEncode("no layer is quantized; write a 16-bit checkpoint without a quantization config")
    common = Counter(schemes.values()).most_common(1)[0][0]
    config = config_of(common)
    others = {name: config_of(scheme) for name, scheme in schemes.items() if scheme != common}
    if others:
        config = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": {**others, "_default": config}}}
    return {
        "quant_method": "torchao",
        "quant_type": {"default": config},
        "modules_to_not_convert": [name for name, quant in layers.items() if quant is None] or None,
        "include_input_output_embeddings": any(name.rsplit(".", 1)[-1] == "embed_tokens" for name in schemes),
    }


def config_of(scheme: QuantScheme) -> dict[str, Any]:
    """The config of torchao that makes ``scheme``."""
    part, act = scheme.weight, scheme.act
    assert part is not None
    if part.dtype.startswith("fp8"):
        data: dict[str, Any] = {"weight_dtype": _torch(part), "granularity": _granularity(part)}
        if act is None:
            return _typed("Float8WeightOnlyConfig", data, 2)
        data |= {"activation_dtype": _torch(act), "granularity": [_granularity(act), _granularity(part)]}
        if act.rule.startswith("ub"):
            data["activation_value_ub"] = float(act.rule[2:])
        return _typed("Float8DynamicActivationFloat8WeightConfig", data, 2)
    if part.dtype == "int8" and part.symmetric and part.block in (TENSOR, CHANNEL):
        if act is None:
            return _typed("Int8WeightOnlyConfig", {"granularity": _granularity(part)}, 2)
        data = {"act_mapping_type": _mapping(act), "granularity": [_granularity(act), _granularity(part)]}
        return _typed("Int8DynamicActivationInt8WeightConfig", data, 2)
    rows = {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
    granularity = rows if part.block == CHANNEL else _granularity(part)
    if act is None:
        data = {"weight_dtype": _torch(part), "granularity": granularity, "mapping_type": _mapping(part)}
        return _typed("IntxWeightOnlyConfig", data, 2)
    data = {
        "weight_dtype": _torch(part), "weight_granularity": granularity, "weight_mapping_type": _mapping(part),
        "act_mapping_type": _mapping(act),
    }  # fmt: skip
    return _typed("Int8DynamicActivationIntxWeightConfig", data, 2)


def metadata(
    layers: Mapping[str, tuple[LayerQuant, tuple[int, int]]], others: Mapping[str, str] | None = None
) -> dict[str, str]:
    """``__metadata__`` of a file with ``layers`` (quantization and shape [N, K]) and plain tensors ``others`` (names, any
    value): what transformers restores tensor classes from. qplug reads files without it, by their config."""
    found = {name: json.dumps({"_type": "Tensor"}) for name in others or ()}
    for module, (quant, shape) in layers.items():
        found[f"{module}.weight"] = json.dumps(_tensor(quant.scheme, shape))
    return {"format": "pt", **found, "tensor_names": json.dumps(sorted(found))}


def _tensor(scheme: QuantScheme, shape: tuple[int, int]) -> dict[str, Any]:
    part, act = scheme.weight, scheme.act
    assert part is not None
    rows, columns = part.block
    data: dict[str, Any] = {"block_size": [rows or shape[0], columns or shape[1]], "dtype": _dtype("bfloat16")}
    names = ["qdata", "scale"]
    if part.dtype.startswith("fp8"):
        kwargs: dict[str, Any] | None = None
        if act is not None:
            bound = float(act.rule[2:]) if act.rule else None
            kwargs = {"float8_dtype": _torch(act), "granularity": _granularity(act), "mm_config": None, "hp_value_lb": None}
            kwargs |= {"hp_value_ub": bound, "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"}}
            kwargs = {"_type": "QuantizeTensorToFloat8Kwargs", "_data": kwargs}
        data |= {
            "mm_config": None,
            "act_quant_kwargs": kwargs,
            "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"},
        }
        return {"_type": "Float8Tensor", "_data": data, "_tensor_data_names": names}
    names.append("zero_point")
    if config_of(scheme)["_type"].startswith(("Intx", "Int8DynamicActivationIntx")):
        said = None if act is None else f"int8_{'sym' if act.symmetric else 'asym'}_per_token"
        data |= {"target_dtype": _torch(part), "activation_quantization": said}
        return {"_type": "IntxUnpackedToInt8Tensor", "_data": data, "_tensor_data_names": names}
    kwargs = None
    if act is not None:
        kwargs = {"granularity": _granularity(act), "mapping_type": _mapping(act), "reduce_range": False}
        kwargs = {"_type": "QuantizeTensorToInt8Kwargs", "_data": kwargs}
    return {
        "_type": "Int8Tensor",
        "_data": {**data, "act_quant_kwargs": kwargs, "reduce_range": False},
        "_tensor_data_names": names,
    }


def _typed(kind: str, data: dict[str, Any], version: int) -> dict[str, Any]:
    return {"_type": kind, "_version": version, "_data": data}


def _granularity(part: TensorQuant) -> dict[str, Any]:
    if part.block == TENSOR:
        return {"_type": "PerTensor", "_version": 1, "_data": {}}
    if part.block == CHANNEL:
        return {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
    if part.block[0] != 1:
        raise ConfigError(f"blocks of {part.block} were given")
    return {"_type": "PerGroup", "_version": 1, "_data": {"group_size": part.block[1]}}


def _mapping(part: TensorQuant) -> dict[str, Any]:
    return {"_type": "MappingType", "_data": "SYMMETRIC" if part.symmetric else "ASYMMETRIC"}


def _torch(part: TensorQuant) -> dict[str, Any]:
    return _dtype(_DTYPES.get(part.dtype, part.dtype))


def _dtype(name: str) -> dict[str, Any]:
    return {"_type": "torch.dtype", "_data": name}
