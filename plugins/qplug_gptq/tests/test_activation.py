"""W4A8 and W4Afp8: every spelling of activation quantization gives the scheme that it means, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_gptq.loader import GPTQFormat

from qplug_core.config import LayerQuant, ModuleName
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source
from qplug_core.testing import random_weight

FORMAT = GPTQFormat()
MODULE = "model.layers.0.mlp.up_proj"
BASE = {"bits": 4, "group_size": 128, "quant_method": "gptq", "sym": True, "desc_act": False, "checkpoint_format": "gptq"}


def source(config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Source:
    infos = MemorySource(tensors or {}).tensors
    return Source(Path("memory"), {"quantization_config": config}, config, "config.json", {}, infos, {})


def scheme(**keys: Any) -> str:
    found = FORMAT.parse(source({**BASE, **keys})).quant_for(ModuleName((MODULE,)))
    assert found is not None
    return str(found.scheme)


@pytest.mark.parametrize(
    ("keys", "meant"),
    [
        ({}, "W4A16_g128"),
        ({"act_bits": 16, "act_data_type": "float"}, "W4A16_g128"),
        ({"act_bits": 8, "act_data_type": "fp8"}, "W4Afp8_g128"),
        ({"act_bits": 8, "act_data_type": "fp8_sym", "act_dynamic": False}, "W4Afp8_g128_static"),
        ({"act_bits": 8, "act_data_type": "fp8", "act_group_size": 0}, "W4Afp8_g128_a:tensor"),
        ({"act_bits": 8, "act_data_type": "fp8_e5m2"}, "W4Afp8e5m2_g128"),
        ({"act_bits": 8, "act_data_type": "int"}, "W4A8_g128"),
        ({"act_bits": 8, "act_data_type": "int", "act_group_size": 64}, "W4A8_g128_a:g64"),
        ({"act_bits": 8, "act_sym": False}, "W4A8_g128_a:asym"),
        ({"act_bits": 8, "act_data_type": "int", "act_dynamic": False}, "W4A8_g128_static"),
        ({"activation_scheme": "dynamic"}, "W4Afp8_g128"),
        ({"activation_scheme": "static"}, "W4Afp8_g128_static"),
        ({"quant_algo": "W4A16_GPTQ"}, "W4A16_g128"),
        ({"quant_algo": "W4A8_GPTQ"}, "W4Afp8_g128_static"),
        ({"quant_algo": "W4A8_GPTQ", "activation_scheme": "static"}, "W4Afp8_g128_static"),
    ],
)
def test_spelling(keys: dict[str, Any], meant: str) -> None:
    assert scheme(**keys) == meant


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"act_bits": 4}, "act_bits: 4"),
        ({"act_bits": 8, "act_data_type": "mx_fp"}, "mx_fp"),
        ({"act_bits": 8, "act_group_size": -2}, "act_group_size: -2"),
        ({"act_bits": 8, "act_dynamic": "no"}, "act_dynamic: 'no'"),
        ({"act_bits": 8, "act_dynamic": False, "act_sym": False}, "act_sym: false"),
        ({"activation_scheme": "sometimes"}, "'sometimes'"),
        ({"quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
        ({"quant_algo": "W8A16_GPTQ"}, "bits: 4"),
        ({"quant_algo": "W4A8_GPTQ", "activation_scheme": "dynamic"}, "different activation quantizations"),
        ({"quant_algo": "W4A16_GPTQ", "activation_scheme": "dynamic"}, "different activation quantizations"),
    ],
)
def test_spelling_that_is_not_understood_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        scheme(**keys)


@pytest.mark.parametrize("name", ["act_scales", "input_scale"])
@pytest.mark.parametrize("shape", [(1,), ()])
def test_stored_scale_is_read_under_either_name(name: str, shape: tuple[int, ...]) -> None:
    weight = random_weight(QuantScheme.parse("W4Afp8_g128_static"), 16, 256)
    assert weight.act_scale is not None
    stored = FORMAT.encode(weight, LayerQuant(weight.scheme, "gptq"))
    stored[name] = stored.pop("act_scales").reshape(shape)
    names = {f"{MODULE}.{key}": tensor for key, tensor in stored.items()}
    config = FORMAT.parse(source({**BASE, "activation_scheme": "static"}, names))
    quant = config.quant_for(ModuleName((MODULE,)))
    assert quant is not None
    declared = {t.name: t for t in FORMAT.tensors(quant)}
    assert declared.keys() == stored.keys()
    assert declared[name].match(shape, {"N": 16, "K": 256}) is not None
    assert FORMAT.decode(stored, quant, 16, 256).equal(weight)


def test_fp8_step_of_auto_round_is_claimed_and_no_other_tensor() -> None:
    """``w_bf16_to_fp8_scale`` is how the weight came to its integers; ``scales`` is the product of both steps."""
    found = FORMAT.parse(source({**BASE, "data_type": "fp8_to_int_sym", "act_bits": 8, "act_data_type": "fp8_sym"}))
    assert set(found.ignorable) == {"w_bf16_to_fp8_scale"}
    assert not FORMAT.parse(source(BASE)).ignorable


def test_one_file_has_one_activation_quantization() -> None:
    layers = {name: LayerQuant(QuantScheme.parse(name), "gptq") for name in ("W4A16_g128", "W4Afp8_g128")}
    with pytest.raises(CannotEncode, match="compressed-tensors"):
        FORMAT.quantization_config(layers)
