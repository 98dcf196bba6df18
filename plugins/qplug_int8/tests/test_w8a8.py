"""What SGLang reads: w8a8_int8 by channel and token, and blockwise_int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_int8.blockwise import BlockwiseInt8Format
from qplug_int8.w8a8 import W8A8Format
from torch import Tensor

from qplug_core.config import LayerQuant, ModuleName
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.layer import LayerSpec, StoredPart
from qplug_core.method import decode_part
from qplug_core.planner import plan
from qplug_core.reference.linear import ReferenceLinear
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source
from qplug_core.testing import random_weight
from qplug_core.weight import QuantWeight

W8A8 = W8A8Format()
BLOCKS = BlockwiseInt8Format()


def source(tensors: dict[str, Tensor], config: dict[str, Any]) -> Source:
    return Source(Path("memory"), {}, config, "config.json", {}, MemorySource(tensors).tensors, {})


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def layer(n: int = 32, k: int = 48, scales: Tensor | None = None, **more: Tensor) -> dict[str, Tensor]:
    codes = torch.randint(-127, 128, (n, k), generator=torch.Generator().manual_seed(n), dtype=torch.int8)
    stored = {"weight": codes, "weight_scale": torch.linspace(0.01, 0.02, n)[:, None] if scales is None else scales, **more}
    return {f"l.{name}": tensor for name, tensor in stored.items()}


def run(weight: QuantWeight, x: Tensor) -> Tensor:
    kernel = ReferenceLinear()
    return kernel.apply(x, kernel.pack(weight))


STORED = {
    "W8A8": layer(),
    "W8A8_tensor": layer(scales=torch.tensor([0.01])),
    "W8A8_static": layer(input_scale=torch.tensor([0.02])),
    "W8A8_a:tensor.asym.static": layer(
        input_scale=torch.tensor(0.02), input_zero_point=torch.tensor([-5], dtype=torch.int8)
    ),
}


@pytest.mark.parametrize("name", STORED)
def test_scheme_is_read_off_the_headers(name: str) -> None:
    config = W8A8.parse(source(STORED[name], {"quant_method": "w8a8_int8"}))
    assert config.quant_for(ModuleName(("l",))) == LayerQuant(QuantScheme.parse(name), "w8a8_int8")
    assert config.inferred[0].startswith(
        "activations are static" if "static" in name else "activations are quantized per token"
    )
    plan(source(STORED[name], {"quant_method": "w8a8_int8"}), [LayerSpec("l", "linear", 32, 48)], complete=True)


def test_dynamic_layer_is_the_engine_formula() -> None:
    stored = {name.removeprefix("l."): t for name, t in STORED["W8A8"].items()}
    x = torch.randn(9, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = x.abs().amax(1, keepdim=True) / 127
    expected = (torch.round(x / step) @ stored["weight"].double().t()) * step * stored["weight_scale"].double().t()
    weight = W8A8.decode(stored, LayerQuant(QuantScheme.parse("W8A8"), "w8a8_int8"), 32, 48)
    assert relative(run(weight, x), expected) < 1e-6


def test_zero_point_is_taken_off_the_codes() -> None:
    name = "W8A8_a:tensor.asym.static"
    stored = {key.removeprefix("l."): t for key, t in STORED[name].items()}
    x = torch.rand(9, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    codes = torch.round(x / stored["input_scale"].double() - 5).clamp(-128, 127)
    expected = (
        ((codes + 5) @ stored["weight"].double().t()) * stored["input_scale"].double() * stored["weight_scale"].double().t()
    )
    weight = W8A8.decode(stored, LayerQuant(QuantScheme.parse(name), "w8a8_int8"), 32, 48)
    assert relative(run(weight, x), expected) < 1e-6
    dropped = (codes @ stored["weight"].double().t()) * stored["input_scale"].double() * stored["weight_scale"].double().t()
    assert relative(dropped, expected) > 0.05


def test_sglang_28806_unquantized_checkpoint_is_refused() -> None:
    """It booted, passed its health check, and answered every prompt with the same garbage."""
    with pytest.raises(ConfigError, match=r"none of its 1 tensors is an int8 weight.*quantize it first"):
        W8A8.parse(source({"l.weight": torch.zeros(4, 4)}, {"quant_method": "w8a8_int8"}))


def test_sglang_29530_parts_of_a_fused_layer_keep_their_input_scales() -> None:
    """gate and up with different static scales: two weights run, and no scale is dropped or merged."""
    parts = {"gate": 0.02, "up": 0.05}
    tensors = {
        name.replace("l.", f"{part}."): t
        for part, s in parts.items()
        for name, t in layer(input_scale=torch.tensor([s])).items()
    }
    fused = LayerSpec("gate_up", "linear", 64, 48, ((StoredPart("gate", 32), StoredPart("up", 32)),))
    opened = source(tensors, {"quant_method": "w8a8_int8"})
    decision = plan(opened, [fused], complete=True).decisions[0]
    (segment,) = decision.segments
    assert segment.quant is not None
    found = [decode_part(MemorySource(tensors), W8A8, segment.quant, fused, part) for part in segment.parts]
    assert [round(float(w.act_scale), 3) for w in found if w.act_scale is not None] == [0.02, 0.05]


def test_sglang_5120_scale_inverse_belongs_to_blocks() -> None:
    """weight_scale_inv is the name of block scales; a file of channels has weight_scale."""
    tensors = {"l.weight": torch.zeros(32, 48, dtype=torch.int8), "l.weight_scale_inv": torch.ones(32, 1)}
    with pytest.raises(Exception, match=r"l\.weight_scale \(needed by l as w8a8_int8"):
        plan(source(tensors, {"quant_method": "w8a8_int8"}), [LayerSpec("l", "linear", 32, 48)], complete=True)


def test_vllm_experts_int8_is_no_storage() -> None:
    with pytest.raises(ConfigError, match=r"experts_int8, which is no storage format.*quantize='W8A16'"):
        W8A8.parse(source({}, {"quant_method": "experts_int8"}))


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("W8A8", {"activation_scheme": "static"}, "says static activations and no layer stores an input_scale"),
        ("W8A8_static", {"activation_scheme": "dynamic"}, r"says dynamic activations and l\.input_scale is stored"),
        ("W8A8_static", {"is_dynamic": True}, "says dynamic"),
        ("W8A8", {"bits": 4}, "bits: 4"),
        ("W8A8", {"no_such_numerics": 1}, "no_such_numerics"),
    ],
)
def test_config_against_the_headers(name: str, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        W8A8.parse(source(STORED[name], {"quant_method": "w8a8_int8", **config}))


def test_ignore_is_exact_or_a_pattern() -> None:
    raw = {
        "quant_method": "w8a8_int8",
        "ignore": ["model.layers.1.mlp", "re:.*gate$"],
        "packed_modules_mapping": {"a": ["b"]},
    }
    config = W8A8.parse(source({}, raw))
    names = ("model.layers.1.mlp", "model.layers.11.mlp", "model.layers.1.mlp.up_proj", "x.gate", "x.gate_proj", "lm_head")
    quantized = [config.quant_for(ModuleName((name,))) is not None for name in names]
    assert quantized == [False, True, True, False, True, False]
    assert [rule.matcher.text for rule in config.stale()] == []
    assert config.metadata == {"packed_modules_mapping": {"a": ["b"]}}


@pytest.mark.parametrize("name", ["W8A8_asym", "W8A8_g32", "W8A16", "W8A8_a:asym", "W8A8_a:rule=127.5"])
def test_foreign_weight_is_refused(name: str) -> None:
    with pytest.raises(CannotEncode, match="choose another format"):
        W8A8.quant_for_scheme(random_weight(QuantScheme.parse(name), 32, 64))


def test_block_scale_is_a_factor_in_spite_of_its_name() -> None:
    codes = torch.randint(-127, 128, (70, 100), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scales = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) + 0.5
    raw = {
        "quant_method": "blockwise_int8",
        "activation_scheme": "dynamic",
        "weight_block_size": [32, 32],
        "ignored_layers": ["o"],
    }
    tensors = {"l.weight": codes, "l.weight_scale_inv": scales}
    config = BLOCKS.parse(source(tensors, raw))
    quant = config.quant_for(ModuleName(("l",)))
    assert quant == LayerQuant(QuantScheme.parse("W8A8_b32x32"), "blockwise_int8")
    assert config.quant_for(ModuleName(("o",))) is None
    weight = decode_part(MemorySource(tensors), BLOCKS, quant, LayerSpec("l", "linear", 70, 100), StoredPart("l", 70))
    assert isinstance(weight, QuantWeight)
    plain = codes.double() * scales.double().repeat_interleave(32, 0)[:70].repeat_interleave(32, 1)[:, :100]
    assert relative(weight.dequantize(), plain) < 1e-6
    x = torch.randn(5, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = torch.zeros(5, 70, dtype=torch.float64)
    for start in range(0, 100, 32):
        part = x[:, start : start + 32]
        step = part.abs().amax(1, keepdim=True) / 127
        expected += torch.round(part / step) * step @ plain[:, start : start + 32].t()
    assert relative(run(weight, x), expected) < 1e-6


@pytest.mark.parametrize("block", [None, [128], [0, 128], "128x128", [128.0, 128]])
def test_block_size_that_is_none_is_refused(block: Any) -> None:
    with pytest.raises(ConfigError, match="weight_block_size"):
        BLOCKS.parse(source({}, {"quant_method": "blockwise_int8", "weight_block_size": block}))


def test_static_blocks_are_refused() -> None:
    raw = {"quant_method": "blockwise_int8", "activation_scheme": "static", "weight_block_size": [128, 128]}
    with pytest.raises(ConfigError, match="activation_scheme: 'static'"):
        BLOCKS.parse(source({}, raw))
