"""auto-round's configs: packings, overrides of single layers, blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_gptq.autoround import AutoRoundFormat
from qplug_gptq.loader import GPTQFormat

from qplug_core.config import LayerQuant, ModuleName, QuantizationConfig
from qplug_core.errors import CannotEncode, ConfigError, DecodeError
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source
from qplug_core.testing import random_weight

FORMAT = AutoRoundFormat()
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
BASE: dict[str, Any] = {
    "bits": 4, "group_size": 128, "sym": True, "data_type": "int", "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq", "autoround_version": "0.16.1", "block_name_to_quantize": "model.layers",
}  # fmt: skip


def parse(config: dict[str, Any], stored: tuple[str, ...] = ()) -> QuantizationConfig:
    """``stored``: names of int32 tensors in the file."""
    infos = MemorySource({name: torch.zeros(32, 16, dtype=torch.int32) for name in stored}).tensors
    return FORMAT.parse(Source(Path("memory"), {"quantization_config": config}, config, "config.json", {}, infos, {}))


def quant(config: dict[str, Any], name: str = UP, stored: tuple[str, ...] = ()) -> LayerQuant | None:
    return parse(config, stored).quant_for(ModuleName((name,)))


def scheme(config: dict[str, Any], name: str = UP, stored: tuple[str, ...] = ()) -> str | None:
    found = quant(config, name, stored)
    return None if found is None else str(found.scheme)


@pytest.mark.parametrize(
    ("packing", "layout"),
    [
        ("auto_round:auto_gptq", "gptq"),
        ("auto_round:gptq:exllamav2", "gptq"),
        ("auto_round:gptqmodel", "gptq_v2"),
        ("auto_round", "gptq_v2"),
        ("auto_round:auto_awq", "awq_gemm"),
        ("auto_round:llm_compressor", "pack-quantized"),
        (None, "gptq"),
    ],
)
def test_packing(packing: str | None, layout: str) -> None:
    found = quant({**BASE, "packing_format": packing})
    assert found is not None
    assert found.layout == layout
    assert str(found.scheme) == "W4A16_g128"


@pytest.mark.parametrize("name", ["auto-round", "auto_round", "intel/auto-round"])
def test_names_of_the_method(name: str) -> None:
    assert scheme({**BASE, "quant_method": name}) == "W4A16_g128"


def test_blocks_imply_that_the_head_stays_16_bit() -> None:
    found = parse(BASE)
    assert found.quant_for(ModuleName(("lm_head",))) is None
    assert found.quant_for(ModuleName(("model.embed_tokens",), "Embedding")) is None
    assert found.quant_for(ModuleName(("visual.layers.0.mlp.up_proj",))) is None
    assert [rule for rule in found.rules if rule.implicit]


@pytest.mark.parametrize("key", ["block_name_to_quantize", "to_quant_block_names"])
@pytest.mark.parametrize(
    "value", ["model.layers,visual.blocks", ["model.layers", "visual.blocks"], [["model.layers.0"], ["visual.blocks"]]]
)
def test_lists_of_blocks(key: str, value: Any) -> None:
    config = {**BASE, "block_name_to_quantize": None, key: value}
    assert scheme(config) == "W4A16_g128"
    assert scheme(config, "visual.blocks.3.fc1") == "W4A16_g128"
    assert scheme(config, "audio.blocks.3.fc1") is None


def test_block_ends_at_a_dot() -> None:
    config = {**BASE, "block_name_to_quantize": "model.layers.1"}
    assert scheme(config, DOWN) == "W4A16_g128"
    assert scheme(config, "model.layers.10.mlp.down_proj") is None


def test_block_that_is_a_common_beginning() -> None:
    """auto-round stores the common beginning of a list of blocks: that of layers 10 and 11 ends within a number."""
    config = {**BASE, "block_name_to_quantize": "model.layers.1"}
    stored = ("model.layers.10.mlp.down_proj.qweight", "model.layers.11.mlp.down_proj.qweight")
    assert scheme(config, "model.layers.11.mlp.down_proj", stored) == "W4A16_g128"
    assert any("begins so" in text for text in parse(config, stored).inferred)


def test_no_blocks_mean_every_layer_but_the_head() -> None:
    config = {key: value for key, value in BASE.items() if key != "block_name_to_quantize"}
    assert scheme(config, "anything.at.all") == "W4A16_g128"
    assert scheme(config, "lm_head") is None


def test_overrides_of_single_layers() -> None:
    extra = {
        UP: {"bits": 8, "group_size": 32},
        DOWN: {"bits": 16, "data_type": "float", "act_bits": 16},
        r".*\.k_proj": {"bits": 2, "sym": False},
    }
    config = {**BASE, "extra_config": extra}
    assert scheme(config) == "W8A16_g32"
    assert scheme(config, DOWN) is None
    assert scheme(config, "model.layers.3.self_attn.k_proj") == "W2A16_g128_asym"
    assert scheme(config, "model.layers.3.self_attn.q_proj") == "W4A16_g128"


def test_own_entry_wins_over_a_pattern_that_comes_before() -> None:
    config = {**BASE, "extra_config": {r".*up_proj": {"bits": 16}, UP: {"bits": 8}}}
    assert scheme(config) == "W8A16_g128"
    assert scheme(config, "model.layers.7.mlp.up_proj") is None


def test_auto_round_769_name_that_is_no_module_is_a_pattern() -> None:
    """``shared_experts: {bits: 16}`` means every module with that in its name: auto-round searches what names no module."""
    config = {**BASE, "extra_config": {"shared_experts": {"bits": 16}}}
    module = "model.layers.1.mlp.shared_experts.up_proj"
    assert scheme(config, module, (f"{UP}.qweight", f"{module}.weight")) is None
    assert scheme(config, UP, (f"{UP}.qweight", f"{module}.weight")) == "W4A16_g128"


def test_vllm_49137_quantized_head() -> None:
    """vLLM took lm_head for 16 bit in every auto-round file, though extra_config and the tensors say otherwise."""
    extra = {"extra_config": {"lm_head": {"bits": 8, "group_size": 64, "sym": True, "data_type": "int", "act_bits": 16}}}
    assert scheme({**BASE, **extra}, "lm_head") == "W8A16_g64"
    found = parse(BASE, ("lm_head.qweight",))
    assert found.quant_for(ModuleName(("lm_head",))) is not None
    assert any("lm_head.qweight" in text for text in found.inferred)


def test_vllm_48905_negative_scales() -> None:
    """auto-round's symmetric scales carry a sign; kernels that assumed a positive one failed, a decoder must not."""
    weight = random_weight(QuantScheme.parse("W4A16_g128"), 16, 256)
    weight.scales[::3].neg_()
    stored = GPTQFormat().encode(weight, LayerQuant(weight.scheme, "gptq"))
    found = FORMAT.decode(stored, LayerQuant(weight.scheme, "gptq"), 16, 256)
    assert found.equal(weight)
    assert torch.equal(found.dequantize()[0], weight.codes[0].float() * weight.scales[0].repeat_interleave(128))


@pytest.mark.parametrize("packing", ["auto_round", "auto_round:auto_gptq"])
def test_auto_round_1857_packing_that_contradicts_the_zero_points_is_refused(packing: str) -> None:
    """A version of auto-round wrote ``auto_round`` over zero points minus one."""
    meant = quant({**BASE, "packing_format": packing})
    assert meant is not None
    other = {"gptq": "gptq_v2", "gptq_v2": "gptq"}[meant.layout]
    weight = random_weight(QuantScheme.parse("W4A16_g128"), 16, 256)
    stored = GPTQFormat().encode(weight, LayerQuant(weight.scheme, other))
    right = {"gptq": "auto_round:auto_gptq", "gptq_v2": "auto_round:gptqmodel"}[other]
    with pytest.raises(DecodeError, match=f"packing_format to '{right}'"):
        FORMAT.decode(stored, meant, 16, 256)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"packing_format": "auto_round:fp8"}, "auto_round:fp8"),
        ({"packing_format": "mlx"}, "'mlx'"),
        ({"data_type": "mx_fp"}, "data_type"),
        ({"bits": 5}, "bits: 5"),
        ({"bits": 8, "packing_format": "auto_round:auto_awq"}, "bits: 8"),
        ({"act_bits": 8, "packing_format": "auto_round:llm_compressor"}, "activations"),
        ({"quant_method": "gptq"}, "'gptq'"),
        ({"checkpoint_format": "gptq_v2"}, "remove checkpoint_format"),
        ({"surprise": 1}, "'surprise'"),
        ({"rotation": {"size": 32}}, "rotation"),
        ({"dynamic": {"-:x": {}}}, "dynamic"),
        ({"extra_config": {UP: {"surprise": 1}}}, "'surprise'"),
        ({"extra_config": {UP: {"bits": 9}}}, "bits: 9"),
        ({"extra_config": {"*": {"bits": 8}}}, "regular expression"),
        ({"extra_config": [UP]}, "extra_config"),
        ({"block_name_to_quantize": 7}, "blocks by 7"),
    ],
)
def test_config_that_is_not_understood_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse({**BASE, **change})


def test_activations_of_the_gptq_packing() -> None:
    config = {**BASE, "data_type": "fp8_to_int_sym", "act_bits": 8, "act_data_type": "fp8_sym", "act_dynamic": False}
    assert scheme(config) == "W4Afp8_g128_static"
    assert "w_bf16_to_fp8_scale" in parse(config).ignorable


def test_nothing_is_written() -> None:
    weight = random_weight(QuantScheme.parse("W4A16_g128"), 16, 256)
    with pytest.raises(CannotEncode, match="store the weights as gptq"):
        FORMAT.quant_for_scheme(weight)
    with pytest.raises(CannotEncode, match="store the weights as gptq"):
        FORMAT.encode(weight, LayerQuant(weight.scheme, "gptq"))
    with pytest.raises(CannotEncode, match="store the weights as gptq"):
        FORMAT.quantization_config({UP: LayerQuant(weight.scheme, "gptq")})
