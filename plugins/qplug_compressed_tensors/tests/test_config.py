"""The config: every key, preset and precedence; what contradicts itself or is not understood is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_compressed_tensors.args import PRESETS
from qplug_compressed_tensors.loader import CompressedTensorsFormat

from qplug_core.config import LayerQuant, ModuleName, QuantizationConfig
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source

FORMAT = CompressedTensorsFormat()
MODULE = "model.layers.0.mlp.up_proj"
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def parse(config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> QuantizationConfig:
    infos = MemorySource(tensors or {}).tensors
    return FORMAT.parse(Source(Path("memory"), {}, config, "config.json", {}, infos, {}))


def config(weights: Any = None, **change: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights or INT4, **change.pop("group", {})}
    base = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "format": "pack-quantized"}
    return {**base, "ignore": ["lm_head"], **change}


def rule(found: QuantizationConfig, name: str = MODULE, kind: str = "Linear") -> LayerQuant | None:
    return found.quant_for(ModuleName((name,), kind))


def scheme(found: QuantizationConfig, name: str = MODULE, kind: str = "Linear") -> str:
    quant = rule(found, name, kind)
    return "16 bit" if quant is None else f"{quant.scheme} {quant.layout}"


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("W4A16", "W4A16_g128 pack-quantized"),
        ("W8A16", "W8A16_g128 pack-quantized"),
        ("W3A16", "W3A16_g128 pack-quantized"),
        ("W4A16_ASYM", "W4A16_g128_asym pack-quantized"),
        ("w8a8", "W8A8_a:rule=127.5 int-quantized"),
        ("INT8", "W8A8_a:rule=127.5 int-quantized"),
        ("W4A8", "W4A8_g128_a:rule=127.5 int-quantized"),
        ("W4A4", "W4A4_g128_a:rule=127.5 int-quantized"),
        ("W4AFP8", "W4Afp8_g128 int-quantized"),
        ("FP8", "Wfp8Afp8_tensor_static float-quantized"),
        ("FP8_DYNAMIC", "Wfp8Afp8 float-quantized"),
        ("FP8_BLOCK", "Wfp8Afp8_b128x128 float-quantized"),
        ("NVFP4", "Wnvfp4Anvfp4 nvfp4-pack-quantized"),
        ("NVFP4A16", "Wnvfp4A16 nvfp4-pack-quantized"),
        ("MXFP4", "Wmxfp4Amxfp4_a:rule=ct mxfp4-pack-quantized"),
        ("MXFP8A16", "Wmxfp8A16 mxfp8-quantized"),
        ("UNQUANTIZED", "16 bit"),
    ],
)
def test_preset(preset: str, expected: str) -> None:
    found = parse({"quant_method": "compressed-tensors", "config_groups": {preset: ["Linear"]}, "ignore": []})
    assert scheme(found) == expected


def test_every_preset_is_understood_and_written_back() -> None:
    for preset in PRESETS.keys() - {"UNQUANTIZED"}:
        quant = rule(parse({"config_groups": {preset: ["Linear"]}}))
        assert quant is not None
        again = parse(FORMAT.quantization_config({MODULE: quant, "lm_head": None}))
        assert rule(again) == quant, preset
        assert rule(again, "lm_head") is None


def test_names_before_patterns_before_classes() -> None:
    groups = {
        "group_0": {"targets": ["Linear"], "weights": INT4, "format": "pack-quantized"},
        "group_1": {"targets": ["re:.*mlp"], "weights": FP8, "input_activations": TOKEN, "format": "float-quantized"},
        "group_2": {"targets": [MODULE], "weights": {**INT4, "num_bits": 8}, "format": "pack-quantized"},
        "group_3": {"targets": ["Embedding"], "weights": {**INT4, "group_size": 32}, "format": "pack-quantized"},
    }
    found = parse(config(format="mixed-precision", config_groups=groups, ignore=["lm_head", "re:.*layers\\.1\\."]))
    assert scheme(found) == "W8A16_g128 pack-quantized"
    assert scheme(found, "model.layers.0.mlp.down_proj") == "Wfp8Afp8 float-quantized"
    assert scheme(found, "model.layers.0.self_attn.q_proj") == "W4A16_g128 pack-quantized"
    assert scheme(found, "model.layers.1.mlp.up_proj") == "16 bit"
    assert scheme(found, "lm_head") == "16 bit"
    assert scheme(found, "model.embed_tokens", "Embedding") == "W4A16_g32 pack-quantized"
    assert found.stale() == []


def test_patterns_match_from_the_start_of_a_name() -> None:
    found = parse(config(ignore=["re:model", "re:proj"]))
    assert rule(found) is None
    assert rule(found, "vision.proj") is not None


@pytest.mark.parametrize("order", ["group", "dynamic", True])
def test_order_of_columns_is_stored(order: Any) -> None:
    assert scheme(parse(config({**INT4, "actorder": order}))) == "W4A16_g128_actorder pack-quantized"


@pytest.mark.parametrize("order", ["weight", "static", None, False])
def test_order_of_quantization_leaves_nothing_in_the_file(order: Any) -> None:
    assert scheme(parse(config({**INT4, "actorder": order}))) == "W4A16_g128 pack-quantized"


def test_order_is_read_from_the_file() -> None:
    stored = {f"{MODULE}.weight_g_idx": torch.zeros(128, dtype=torch.int32)}
    found = parse(config(), stored)
    assert scheme(found) == "W4A16_g128_actorder pack-quantized"
    assert "weight_g_idx" in " ".join(found.inferred)
    with pytest.raises(ConfigError, match="set actorder to 'weight'"):
        parse(config({**INT4, "actorder": "group"}), {f"{MODULE}.weight_packed": stored[f"{MODULE}.weight_g_idx"]})


def test_strategy_follows_from_the_group_size() -> None:
    for size, expected in ((None, "W4A16_tensor"), (-1, "W4A16_channel"), (64, "W4A16_g64")):
        found = parse(config({"num_bits": 4, "group_size": size}, format="int-quantized"))
        assert scheme(found) == f"{expected} int-quantized"


def test_blocks_of_old_files_are_text() -> None:
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": "128x64"}
    assert scheme(parse(config(weights, format="float-quantized"))) == "Wfp8A16_b128x64 float-quantized"


def test_format_that_is_not_said_follows_from_the_numbers() -> None:
    found = parse(config(format=None))
    assert scheme(found) == "W4A16_g128 pack-quantized"
    assert "format of group_0 is not said" in " ".join(found.inferred)


def test_config_of_before_0_6_is_nested() -> None:
    inner = config()
    outer = {"quant_method": "compressed-tensors", "quantization_config": inner, "sparsity_config": {"format": "dense"}}
    assert scheme(parse(outer)) == "W4A16_g128 pack-quantized"


@pytest.mark.parametrize(
    ("kv", "expected"),
    [
        ({"num_bits": 8, "type": "float", "strategy": "tensor"}, "W16A16Cfp8"),
        ({"num_bits": 8, "type": "float", "strategy": "attn_head"}, "W16A16Cfp8_c:head"),
        ({"num_bits": 8, "type": "int", "strategy": "tensor"}, "W16A16C8_c:tensor.static"),
    ],
)
def test_kv_cache(kv: dict[str, Any], expected: str) -> None:
    found = parse(config(kv_cache_scheme={**kv, "dynamic": False, "observer": None}))
    assert str(QuantScheme(kv=found.kv)) == expected
    assert parse({"quant_method": "compressed-tensors", "format": "dense", "kv_cache_scheme": kv}).kv == found.kv


def test_kv_scales() -> None:
    names = FORMAT.kv_tensors("model.layers.3.self_attn")
    assert names["k_scale"][0] == "model.layers.3.self_attn.k_scale"
    assert names["v_scale"][1] == "model.layers.3.self_attn.v_proj.output_scale"
    assert "q_scale" in names


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"surprise": 1}, "'surprise'"),
        ({"group": {"surprise": 1}}, "'surprise'"),
        ({"weights": {**INT4, "surprise": 1}}, "'surprise'"),
        ({"quant_method": "gptq"}, "'gptq'"),
        ({"format": "marlin-24"}, "permuted for one GPU kernel"),
        ({"format": "no-such"}, "'no-such'"),
        ({"format": "float-quantized"}, "does not hold"),
        ({"format": "nvfp4-pack-quantized"}, "does not hold"),
        ({"ignore": "lm_head"}, "ignore"),
        ({"config_groups": []}, None),
        ({"config_groups": [1]}, "config_groups"),
        ({"config_groups": {"W9A9": ["Linear"]}}, "no preset"),
        ({"group": {"targets": []}}, "no targets"),
        ({"group": {"targets": ["re:("]}}, "regular expression"),
        ({"group": {"output_activations": TOKEN}}, "output activations"),
        ({"group": {"weights": None, "input_activations": TOKEN}}, "leaves weights at 16 bit"),
        ({"weights": {**INT4, "num_bits": 9}}, "num_bits: 9"),
        ({"weights": {**INT4, "num_bits": True}}, "num_bits: True"),
        ({"weights": {**INT4, "type": "float"}}, "does not hold"),
        ({"weights": {**INT4, "symmetric": "yes"}}, "symmetric: 'yes'"),
        ({"weights": {**INT4, "group_size": 0}}, "group_size: 0"),
        ({"weights": {**INT4, "group_size": None}}, "contradict"),
        ({"weights": {**INT4, "strategy": "channel"}}, "contradict"),
        ({"weights": {**INT4, "strategy": "rows"}}, "'rows'"),
        ({"weights": {**INT4, "block_structure": [1, 2]}}, "contradict"),
        ({"weights": {**INT4, "dynamic": True}}, "weights are static"),
        ({"weights": {**INT4, "actorder": "random"}}, "'random'"),
        ({"weights": {**INT4, "scale_dtype": "torch.int4"}}, "torch.int4"),
        ({"weights": {**INT4, "scale_dtype": "torch.float8_e4m3fn"}}, "tensor_group"),
        ({"weights": {"num_bits": 8, "type": "float", "symmetric": False}}, "no zero points"),
        ({"group": {"input_activations": {**TOKEN, "dynamic": False}}}, "static scales are by tensor"),
        ({"group": {"input_activations": {**FP8, "dynamic": True}}}, "by tensor, token or group"),
        ({"kv_cache_scheme": {"num_bits": 8, "group_size": 64}}, "kv_cache_scheme"),
        ({"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "rotations"),
        ({"sparsity_config": {"format": "sparse-bitmask"}}, "decompress"),
        ({"sparsity_config": {"format": "marlin-24"}}, "permuted"),
        ({"sparsity_config": {"format": "sparse-3"}}, "'sparse-3'"),
        ({"sparsity_config": {"format": "dense", "surprise": 1}}, "'surprise'"),
    ],
)
def test_config_that_is_not_understood_is_refused(change: dict[str, Any], words: str | None) -> None:
    change = dict(change)
    weights = change.pop("weights", None)
    if words is None:  # An empty value says nothing.
        assert rule(parse(config(weights, **change))) is None
        return
    with pytest.raises(ConfigError, match=words):
        parse(config(weights, **change))


def test_two_groups_that_target_the_same_are_refused() -> None:
    groups = {
        "a": {"targets": ["Linear"], "weights": INT4},
        "b": {"targets": ["Linear"], "weights": {**INT4, "num_bits": 8}},
    }
    with pytest.raises(ConfigError, match="a and b both target 'Linear'"):
        parse(config(config_groups=groups))


def test_keys_that_change_nothing_are_listed() -> None:
    found = parse(config(version="0.12.2", quantization_status="frozen", global_compression_ratio=1.5, transform_config={}))
    assert {"version", "quantization_status", "global_compression_ratio"} <= found.metadata.keys()
    assert found.producer == "compressed-tensors 0.12.2"


def test_written_config_says_every_layer() -> None:
    def quant(name: str, layout: str) -> LayerQuant:
        return LayerQuant(QuantScheme.parse(name), layout)

    layers = {
        "model.embed_tokens": quant("W4A16_g128", "pack-quantized"),
        "a.q_proj": quant("W4A16_g128", "pack-quantized"),
        "a.k_proj": quant("W4A16_g128", "pack-quantized"),
        "a.v_proj": quant("Wfp8Afp8_tensor_static", "float-quantized"),
        "a.o_proj": None,
        "a.gate": quant("Wmxfp4Amxfp4_a:rule=ct", "mxfp4-pack-quantized"),
        "a.up": quant("Wfp8Afp8_b128x128", "float-quantized"),
        "a.down": quant("W8A8_a:tensor.static.asym", "int-quantized"),
        "Head": quant("Wnvfp4Anvfp4", "nvfp4-pack-quantized"),
        "a.b+c": None,
    }
    written = FORMAT.quantization_config(layers)
    assert written["format"] == "mixed-precision"
    found = parse(written)
    classes = {"model.embed_tokens": "Embedding"}
    assert {name: rule(found, name, classes.get(name, "Linear")) for name in layers} == layers
    assert found.stale() == []
    assert rule(found, "model.other_embedding", "Embedding") is None


def test_nothing_quantized_is_no_config() -> None:
    with pytest.raises(CannotEncode, match="no layer is quantized"):
        FORMAT.quantization_config({MODULE: None})


def sparse(**change: Any) -> dict[str, Any]:
    said = {
        "format": "sparse-24-bitmask",
        "sparsity_structure": "2:4",
        "targets": ["Linear"],
        "ignore": ["lm_head"],
        **change,
    }
    return {"quant_method": "compressed-tensors", "sparsity_config": said}


def test_sparse_layers_without_headers_are_those_that_are_said() -> None:
    found = parse(sparse())
    assert scheme(found) == "W16A16_2:4 sparse-24-bitmask"
    assert rule(found, "lm_head") is None
    groups = {"group_0": {"targets": ["Linear"], "weights": FP8, "input_activations": TOKEN}}
    found = parse({**sparse(), "config_groups": groups, "format": "float-quantized", "ignore": ["lm_head"]})
    assert scheme(found) == "Wfp8Afp8_2:4 sparse-24-bitmask"


def test_sparse_layers_are_those_with_a_bitmask() -> None:
    groups = {"group_0": {"targets": ["Linear"], "weights": FP8, "input_activations": TOKEN}}
    raw = {**sparse(targets=["re:.*up_proj"]), "config_groups": groups, "format": "float-quantized", "ignore": ["lm_head"]}
    found = parse(raw, {f"{MODULE}.bitmask": torch.zeros(4, 1, dtype=torch.uint8)})
    assert scheme(found) == "Wfp8Afp8_2:4 sparse-24-bitmask"
    assert scheme(found, "model.layers.0.mlp.down_proj") == "Wfp8Afp8 float-quantized"
    assert rule(found, "lm_head") is None


def test_sparse_numbers_that_no_file_holds_are_refused() -> None:
    raw = {**config(), **sparse()}
    with pytest.raises(ConfigError, match="store the pruned weights dense"):
        parse(raw)
