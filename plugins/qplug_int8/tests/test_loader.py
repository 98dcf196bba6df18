"""The format: shapes that are taken, configs, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_int8.loader import Int8Format

from qplug_core.config import LayerQuant, ModuleName
from qplug_core.errors import CannotEncode, ConfigError, DecodeError
from qplug_core.scheme import QuantScheme
from qplug_core.source import Source
from qplug_core.testing import random_weight

FORMAT = Int8Format()


def quant(name: str) -> LayerQuant:
    return LayerQuant(QuantScheme.parse(name), "int8")


def parse(config: dict[str, Any]) -> Any:
    return FORMAT.parse(Source(Path("memory"), {}, config, "config.json", {}, {}, {}))


def test_value_is_code_times_scale() -> None:
    stored = {"weight": torch.tensor([[-128, 127], [1, 0]], dtype=torch.int8), "weight_scale": torch.tensor([0.5, 2.0])}
    assert FORMAT.decode(stored, quant("W8A16"), 2, 2).dequantize().tolist() == [[-64.0, 63.5], [2.0, 0.0]]


def test_zero_points_are_subtracted_first() -> None:
    stored = {
        "weight": torch.tensor([[0, 255]], dtype=torch.uint8),
        "weight_scale": torch.tensor([0.5]),
        "weight_zero_point": torch.tensor([200], dtype=torch.uint8),
    }
    assert FORMAT.decode(stored, quant("W8A16_asym"), 1, 2).dequantize().tolist() == [[-100.0, 27.5]]


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("W8A16_tensor", [(), (1,), (1, 1)]),
        ("W8A16", [(6,), (6, 1)]),
        ("W8A16_g32", [(6, 3)]),
    ],
)
def test_scale_shapes(name: str, shapes: list[tuple[int, ...]]) -> None:
    weight = random_weight(QuantScheme.parse(name), 6, 70)
    scale = next(t for t in FORMAT.tensors(quant(name)) if t.name == "weight_scale")
    for shape in shapes:
        assert scale.match(shape, {"N": 6, "K": 70}) is not None
        stored = {"weight": weight.codes, "weight_scale": weight.scales.reshape(shape)}
        assert FORMAT.decode(stored, quant(name), 6, 70).equal(weight)
    assert scale.match((2, 3), {"N": 6, "K": 70}) is None


def test_static_activation_scales() -> None:
    names = {t.name for t in FORMAT.tensors(quant("W8A8_a:tensor.static.asym"))}
    assert names == {"weight", "weight_scale", "input_scale", "input_zero_point"}
    assert {t.name for t in FORMAT.tensors(quant("W8A8"))} == {"weight", "weight_scale"}


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_activation_scale_that_is_none_is_refused(bad: float) -> None:
    stored = FORMAT.encode(random_weight(QuantScheme.parse("W8A8_static"), 4, 8), quant("W8A8_static"))
    with pytest.raises(DecodeError, match="input_scale"):
        FORMAT.decode({**stored, "input_scale": torch.tensor(bad)}, quant("W8A8_static"), 4, 8)


def test_rules() -> None:
    config = parse({"scheme": "W8A8C8", "ignore": ["lm_head", "re:.*embed"], "layers": {"a.b": "W8A16_g128"}})
    found = {name: config.quant_for(ModuleName((name,))) for name in ("a.b", "a.c", "lm_head", "model.embed_tokens")}
    assert found == {"a.b": quant("W8A16_g128"), "a.c": quant("W8A8"), "lm_head": None, "model.embed_tokens": None}
    assert config.kv == QuantScheme.parse("W8A8C8").kv


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "scheme: None"),
        ({"scheme": 8}, "scheme: 8"),
        ({"scheme": "W4A16_g128"}, "W8A16 or W8A8"),
        ({"scheme": "W8Afp8"}, "W8A16 or W8A8"),
        ({"scheme": "W8A16_b128x128"}, "W8A16 or W8A8"),
        ({"scheme": "W8A16", "ignore": "lm_head"}, "ignore"),
        ({"scheme": "W8A16", "layers": ["a"]}, "layers"),
        ({"scheme": "W8A16", "layers": {"a": "W4A16"}}, "says a: 'W4A16'"),
        ({"scheme": "W8A16", "ignore": ["a"], "layers": {"a": "W8A8"}}, "both ignore and layers"),
        ({"scheme": "W8A16", "bits": 8}, "'bits'"),
    ],
)
def test_config_that_is_not_understood_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(config)


@pytest.mark.parametrize("name", ["W4A16_g128", "Wfp8Afp8", "W8A16_b128x128", "Wnvfp4A16"])
def test_foreign_weight_has_no_layout(name: str) -> None:
    with pytest.raises(CannotEncode, match="choose another format"):
        FORMAT.quant_for_scheme(random_weight(QuantScheme.parse(name), 32, 128))


def test_written_config_says_every_layer() -> None:
    layers = {"a": quant("W8A8"), "b": quant("W8A8"), "c": quant("W8A16_g32_asym"), "lm_head": None}
    written = FORMAT.quantization_config(layers)
    assert written["scheme"] == "W8A8"
    config = parse(written)
    assert {name: config.quant_for(ModuleName((name,))) for name in layers} == layers
