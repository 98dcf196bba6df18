"""FastDeploy's configs: which layer has which type, what is read from headers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from qplug_int8.paddle.declarations import FORMATS, QUANTIZERS
from qplug_int8.paddle.types import REFUSED, TYPES
from qplug_int8.paddle.weight_only import WeightOnlyFormat

from qplug_core.config import LayerQuant, ModuleName, QuantizationConfig
from qplug_core.decl import Declarations
from qplug_core.errors import CannotEncode, ConfigError, PluginError
from qplug_core.planner import read_config
from qplug_core.registry import PluginRow, Registry
from qplug_core.scheme import QuantScheme
from qplug_core.source import Source, TensorInfo

FORMAT = WeightOnlyFormat()
ATTENTION = "ernie.layers.3.self_attn.qkv_proj"
SHARED = "ernie.layers.3.mlp.shared_experts.up_gate_proj"
EXPERT = "ernie.layers.3.mlp.experts.5.up_gate_proj"

WINT2: dict[str, Any] = {
    "dense_quant_type": "wint8", "moe_quant_type": "w4w2", "quantization": "wint2",
    "moe_quant_config": {
        "moe_w4_quant_config": {
            "quant_type": "wint4", "quant_granularity": "per_channel", "quant_start_layer": 0, "quant_end_layer": 6,
        },
        "moe_w2_quant_config": {
            "quant_type": "wint2", "quant_granularity": "pp_acc", "quant_group_size": 64, "quant_start_layer": 7, "quant_end_layer": 53,
        },
    },
}  # fmt: skip
"""The documented config of ERNIE-4.5-300B-A47B with 2 bits."""


def source(config: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]] | None = None, **model: Any) -> Source:
    infos = {name: TensorInfo(name, dtype, shape, Path("f"), 0, 0) for name, (dtype, shape) in (tensors or {}).items()}
    return Source(Path("memory"), model, config, "config.json quantization_config", {}, infos, {})


def parse(config: dict[str, Any], tensors: dict[str, Any] | None = None, **model: Any) -> QuantizationConfig:
    return FORMAT.parse(source(config, tensors, **model))


def layouts(config: QuantizationConfig, *names: str) -> list[str | None]:
    quants = [config.quant_for(ModuleName((name,))) for name in names]
    return [None if quant is None else f"{quant.layout} {quant.scheme}" for quant in quants]


def registry() -> Registry:
    row = PluginRow("int8", "qplug-int8", "0", "1.0", "ready", declarations=Declarations(FORMATS, (), QUANTIZERS))
    found = Registry([row])
    found._collect({})
    return found


def test_the_key_quantization_finds_the_format() -> None:
    config, fmt = read_config(source({"quantization": "wint8"}), registry())
    assert fmt is not None
    assert fmt.name == "fastdeploy"
    assert layouts(config, ATTENTION) == ["wint8 W8A16"]


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"quantization": "wint8"}, ["wint8 W8A16"] * 3),
        ({"quantization": "wint4"}, ["wint4 W4A16_channel"] * 3),
        ({"quantization": "weight_only", "algo": "weight_only_int4"}, ["wint4 W4A16_channel"] * 3),
        ({"quantization": "w4a8"}, [None, None, "w4a8 W4A8_channel_static"]),
        ({"quantization": "w4a8", "is_permuted": False}, [None, None, "w4a8_kn W4A8_channel_static"]),
    ],
)
def test_one_type(config: dict[str, Any], found: list[str | None]) -> None:
    assert layouts(parse(config), ATTENTION, SHARED, EXPERT) == found


def test_fastdeploy_2664_wint4_of_a_file_is_no_mixquant() -> None:
    """On the command line, wint4 of an ERNIE means wint8 for dense layers; in config.json it means what it says."""
    assert layouts(parse({"quantization": "wint4"}, model_type="ernie4_5_moe"), ATTENTION) == ["wint4 W4A16_channel"]


def test_fastdeploy_quantizes_no_head_embedding_or_router() -> None:
    config = parse({"quantization": "wint8"})
    assert layouts(config, "lm_head", "ernie.layers.3.mlp.gate", "ernie.mtp_block.0.eh_proj") == [None, None, None]
    assert config.quant_for(ModuleName(("ernie.embed_tokens",), "Embedding")) is None
    assert layouts(config, "ernie.layers.0.mlp.gate_proj") == ["wint8 W8A16"]


@pytest.mark.parametrize("moe", ["wint8", "wint4", "w4a8", "block_wise_fp8", "weight_only_int2.5"])
def test_mixquant(moe: str) -> None:
    config = parse({"quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": moe})
    scheme, layout = TYPES[moe]
    assert layouts(config, ATTENTION, SHARED, EXPERT) == ["wint8 W8A16", "wint8 W8A16", f"{layout} {scheme}"]


def test_vision_experts_are_those_after_the_text_experts() -> None:
    raw = {
        "quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "wint4", "image_moe_quant_type": "wint8",
    }  # fmt: skip
    config = parse(raw, moe_num_experts=[8, 4])
    names = [f"ernie.layers.3.mlp.experts.{i}.down_proj" for i in (0, 7, 8, 11)]
    assert layouts(config, *names) == ["wint4 W4A16_channel"] * 2 + ["wint8 W8A16"] * 2
    text = parse(raw, moe_num_experts=8)
    assert layouts(text, *names) == ["wint4 W4A16_channel"] * 4
    assert any("no vision experts" in line for line in text.inferred)


def test_image_type_is_the_expert_type_where_it_is_not_said() -> None:
    raw = {"quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "wint4"}
    assert layouts(parse(raw, moe_num_experts=[8, 4]), "ernie.layers.3.mlp.experts.9.down_proj") == ["wint4 W4A16_channel"]


@pytest.mark.parametrize("config", [WINT2, {**WINT2, "quant_method": "wint2"}])
def test_documented_wint2(config: dict[str, Any]) -> None:
    found = parse(config, num_hidden_layers=54)
    names = [f"ernie.layers.{i}.mlp.experts.10.down_proj" for i in (0, 6, 7, 53)]
    assert layouts(found, *names) == ["wint4 W4A16_channel"] * 2 + ["ccq2 Wccq2A16"] * 2
    assert (
        layouts(found, "ernie.layers.7.mlp.shared_experts.down_proj", "ernie.layers.16.self_attn.o_proj")
        == ["wint8 W8A16"] * 2
    )


def test_wint2_layer_16_is_no_layer_1_or_6() -> None:
    assert (
        layouts(parse(WINT2), "ernie.layers.16.mlp.experts.1.down_proj", "layers.60.mlp.experts.0.down_proj")
        == ["ccq2 Wccq2A16"] * 2
    )


def test_wint2_without_bounds_has_fastdeploys() -> None:
    found = parse({"quantization": "wint2"})
    assert layouts(found, *[f"layers.{i}.mlp.experts.0.down_proj" for i in (6, 7)]) == [
        "wint4 W4A16_channel",
        "ccq2 Wccq2A16",
    ]
    assert any("taken as 6" in line for line in found.inferred)


def test_super_scale_is_found_in_the_headers() -> None:
    found = parse(WINT2, {"ernie.layers.7.mlp.experts.0.down_proj.super_scale": ("BF16", (64,))})
    quant = found.quant_for(ModuleName(("ernie.layers.7.mlp.experts.0.down_proj",)))
    assert quant is not None
    assert quant.opt("super_scales") == "super_scale"


def changed(part: str, **keys: Any) -> dict[str, Any]:
    moe = WINT2["moe_quant_config"]
    return {**WINT2, "moe_quant_config": {**moe, part: {**moe[part], **keys}}}


MIX = {"quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "wint4"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization": "wint8", "no_such_numerics": 3}, "no_such_numerics"),
        ({"quantization": "wint8", "group_size": 128}, "group_size"),
        ({"quantization": "wint8", "weight_layout": "sm90"}, "weight_layout"),
        ({"quantization": "wint8", "ignore": "lm_head"}, "ignore"),
        ({"quantization": "weight_only", "algo": "weight_only_int3"}, "algo"),
        ({"quantization": "w4afp8"}, "Hopper"),
        ({"quantization": "w8a8"}, "never loads it"),
        ({**MIX, "moe_quant_type": None}, "moe_quant_type: None"),
        ({**MIX, "dense_quant_type": "w4a8"}, "only experts have it"),
        ({**MIX, "dense_quant_type": "wint2"}, "only experts have it"),
        ({**MIX, "dense_quant_type": "gptq"}, "no such type; one of wint8, wint4"),
        ({**MIX, "moe_quant_type": "w4w2"}, "no such type; one of wint8, wint4"),
        ({**MIX, "moe_quant_type": "tensor_wise_fp8"}, "Hadamard"),
        ({**MIX, "moe_dynamic_quant": True}, "moe_dynamic_quant"),
        ({**MIX, "kv_cache_quant_type": "int4"}, "one of int8, float8_e4m3fn, block_wise_fp8"),
        ({**MIX, "kv_cache_quant_type": "int8_zp"}, "zero points"),
        ({**MIX, "kv_cache_quant_type": "int8", "has_zero_point": True}, "zero points"),
        (changed("moe_w2_quant_config", quant_group_size=128), "64"),
        (changed("moe_w2_quant_config", quant_granularity="per_channel"), "pp_acc"),
        (changed("moe_w2_quant_config", quant_start_layer=8), "correct the bounds"),
        (changed("moe_w4_quant_config", quant_start_layer=1), "correct the bounds"),
        (changed("moe_w4_quant_config", quant_end_layer="6"), "whole numbers"),
        (changed("moe_w4_quant_config", bits=4), "moe_w4_quant_config"),
        ({**WINT2, "moe_quant_type": "wint4"}, "w4w2"),
        ({**WINT2, "dense_quant_config": "wint4"}, "dense_quant_config"),
        ({**WINT2, "moe_quant_config": {"moe_w3_quant_config": {}}}, "moe_w3_quant_config"),
    ],
)
def test_config_that_is_not_understood_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        parse(config)
    assert len(str(error.value).splitlines()) == 1


def test_layers_beyond_the_last_bound_are_refused() -> None:
    with pytest.raises(ConfigError, match="54 layers"):
        parse(changed("moe_w2_quant_config", quant_end_layer=40), num_hidden_layers=54)


def test_empty_values_say_nothing() -> None:
    found = parse({"quantization": "wint8", "no_such_numerics": None, "other": [], "quantization_type": "offline"})
    assert found.metadata.keys() == {"no_such_numerics", "other", "quantization_type"}


@pytest.mark.parametrize("kind", REFUSED)
def test_reason_is_said_for_types_that_stay_unread(kind: str) -> None:
    with pytest.raises(ConfigError, match="quantize the 16-bit checkpoint"):
        parse({**MIX, "moe_quant_type": kind})


def test_fp8_experts_without_qplug_fp8_name_the_layout_that_is_missing() -> None:
    quant = parse({**MIX, "moe_quant_type": "block_wise_fp8"}).quant_for(ModuleName((EXPERT,)))
    assert quant is not None
    with pytest.raises(PluginError, match="no plugin provides the layout 'fastdeploy_fp8'"):
        registry().layout(quant.layout)


@pytest.mark.parametrize(
    ("kind", "dtype", "dynamic", "rule"),
    [
        ("int8", "int8", False, "amax"),
        ("float8_e4m3fn", "fp8_e4m3", False, "amax"),
        ("block_wise_fp8", "fp8_e4m3", True, ""),
    ],
)
def test_kv_cache(kind: str, dtype: str, dynamic: bool, rule: str) -> None:
    config = parse({**MIX, "kv_cache_quant_type": kind, "is_quantized": True})
    assert config.kv is not None
    assert (config.kv.dtype, config.kv.dynamic, config.kv.rule) == (dtype, dynamic, rule)
    assert FORMAT.kv_tensors("a")["k_scale"] == "a.cachek_matmul.activation_scale"


CODES = {"a.quant_weight": ("I8", (64, 128)), "a.weight_scale": ("BF16", (64,))}


@pytest.mark.parametrize(
    ("config", "model", "tensors", "found"),
    [
        ({}, {}, {}, ["wint8 W8A16", "wint4 W4A16_channel"]),
        ({"is_quantized": True}, {}, {}, ["wint8 W8A16", "wint4 W4A16_channel"]),
        ({"is_quantized": False}, {}, {}, [None, None]),
        ({"is_quantized": False}, {"is_quantized": True}, {}, ["wint8 W8A16", "wint4 W4A16_channel"]),
        ({"is_moe_quantized": True}, {}, {}, [None, "wint4 W4A16_channel"]),
        ({"is_moe_quantized": False}, {}, {}, [None, None]),
        ({"kv_cache_quant_type": "int8"}, {}, {}, [None, None]),
        ({"kv_cache_quant_type": "int8"}, {}, CODES, ["wint8 W8A16", "wint4 W4A16_channel"]),
        ({"kv_cache_quant_type": "int8"}, {"is_quantized": True}, {}, ["wint8 W8A16", "wint4 W4A16_channel"]),
    ],
)
def test_flags_that_say_what_is_quantized(config: Any, model: Any, tensors: Any, found: list[str | None]) -> None:
    assert layouts(parse({**MIX, **config}, tensors, **model), ATTENTION, EXPERT) == found


def test_flag_that_the_file_contradicts_is_refused() -> None:
    with pytest.raises(ConfigError, match="quant_weight"):
        parse({"quantization": "wint8", "is_quantized": False}, CODES)


@pytest.mark.parametrize(
    ("shape", "found"),
    [((64, 128), "wint8"), ((128, 64), "wint8_kn"), ((32, 128), "wint8"), ((64, 64), "wint8")],
)
def test_orientation_is_read_from_shapes(shape: tuple[int, int], found: str) -> None:
    tensors = {"a.quant_weight": ("I8", shape), "a.weight_scale": ("BF16", (64,))}
    config = parse({"quantization": "wint8"}, tensors)
    assert layouts(config, ATTENTION) == [f"{found} W8A16"]
    assert any("codes are" in line for line in config.inferred)


def test_orientation_of_other_types_is_not_asked() -> None:
    """W4A8 codes are [K/2, N] beside scales [N], FP8 and WINT2 scales have other shapes: none of them speaks for WINT8."""
    others = {
        "x.quant_weight": ("I8", (96, 64)), "x.weight_scale": ("BF16", (64,)), "x.activation_scale": ("F32", (1,)),
        "y.quant_weight": ("I8", (256, 128)), "y.weight_scale": ("F32", (2, 1)),
        "z.quant_weight": ("U8", (32, 128)), "z.weight_scale": ("U8", (1, 128)),
        "w.quant_weight": ("I16", (20, 64)), "w.weight_scale": ("F16", (64,)),
    }  # fmt: skip
    assert layouts(parse({"quantization": "wint8"}, {**others, **CODES}), ATTENTION) == ["wint8 W8A16"]


def test_both_orientations_in_one_file_are_refused() -> None:
    tensors = {**CODES, "b.quant_weight": ("I8", (128, 64)), "b.weight_scale": ("BF16", (64,))}
    with pytest.raises(ConfigError, match=r"a\.weight_scale.*b\.weight_scale"):
        parse({"quantization": "wint8"}, tensors)
    assert layouts(parse({"quantization": "wint8", "weight_layout": "kn"}, tensors), ATTENTION) == ["wint8_kn W8A16"]


W8, W4 = (LayerQuant(QuantScheme.parse(s), f"wint{b}") for s, b in (("W8A16", 8), ("W4A16_channel", 4)))


def test_written_config_says_every_layer() -> None:
    layers = {ATTENTION: W8, SHARED: W8, EXPERT: W4, "lm_head": None, "ernie.layers.0.mlp.down_proj": None}
    written = FORMAT.quantization_config(layers)
    assert (written["quantization"], written["dense_quant_type"], written["moe_quant_type"]) == (
        "mix_quant",
        "wint8",
        "wint4",
    )
    assert {name: parse(written).quant_for(ModuleName((name,))) for name in layers} == layers


@pytest.mark.parametrize("order", ["sm80", "sm70", "nk", "kn"])
def test_written_order_comes_back(order: str) -> None:
    quant = LayerQuant(W8.scheme, {"sm80": "wint8"}.get(order, f"wint8_{order}"))
    written = FORMAT.quantization_config({ATTENTION: quant})
    assert written["weight_layout"] == order
    assert parse(written).quant_for(ModuleName((ATTENTION,))) == quant


@pytest.mark.parametrize(
    "layers",
    [
        {ATTENTION: W8, SHARED: W4},
        {"lm_head": W8},
        {ATTENTION: W8, EXPERT: LayerQuant(W4.scheme, "wint4_kn")},
        {ATTENTION: LayerQuant(QuantScheme.parse("W4A16_g128"), "gptq")},
        {ATTENTION: None},
    ],
)
def test_layers_that_no_key_says_are_refused(layers: dict[str, LayerQuant | None]) -> None:
    with pytest.raises(CannotEncode):
        FORMAT.quantization_config(layers)
