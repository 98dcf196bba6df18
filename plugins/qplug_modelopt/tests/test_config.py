"""Both dialects, what they leave out, what contradicts, and what is not understood."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_modelopt.algos import ALGOS
from qplug_modelopt.loader import ModelOptFormat

from qplug_core.config import LayerQuant, ModuleName, QuantizationConfig
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.source import MemorySource, Source
from qplug_core.testing import random_weight

FORMAT = ModelOptFormat()
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
FLAT: dict[str, Any] = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "targets": ["Linear"],
        }
    },
    "ignore": ["lm_head"],
    "producer": {"name": "modelopt", "version": "0.47.0"},
}
BODY: dict[str, Any] = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"]}
NESTED: dict[str, Any] = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": BODY}


def source(config: dict[str, Any] | None, tensors: dict[str, torch.Tensor] | None = None, beside: Any = None) -> Source:
    """A checkpoint with ``config`` in config.json and ``beside`` as hf_quant_config.json."""
    files = {} if beside is None else {"hf_quant_config.json": beside}
    whole = {} if config is None else {"quantization_config": config}
    said, origin = (config, "config.json quantization_config") if config is not None else (beside, "hf_quant_config.json")
    return Source(Path("memory"), whole, said, origin, files, MemorySource(tensors or {}).tensors, {})


def parse(
    config: dict[str, Any] | None, tensors: dict[str, torch.Tensor] | None = None, beside: Any = None
) -> QuantizationConfig:
    return FORMAT.parse(source(config, tensors, beside))


def found(config: QuantizationConfig, name: str = UP) -> LayerQuant | None:
    return config.quant_for(ModuleName((name,)))


def nested(**changes: Any) -> dict[str, Any]:
    return {**NESTED, "quantization": {**BODY, **changes}}


def plain(algo: str, **changes: Any) -> dict[str, Any]:
    """A flat config without groups."""
    return {"quant_method": "modelopt", "quant_algo": algo, "ignore": ["lm_head"], **changes}


def file_of(algo: str, *modules: str, group: int | None = None) -> dict[str, torch.Tensor]:
    """Tensors of modules [64, 256] as an algorithm stores them."""
    quant = ALGOS[algo].quant(group)
    stored = FORMAT.encode(random_weight(quant.scheme, 64, 256), quant)
    return {f"{module}.{name}": tensor for module in modules for name, tensor in stored.items()}


@pytest.mark.parametrize(
    "config", [FLAT, NESTED, {**NESTED, "quant_method": "modelopt"}], ids=["flat", "nested", "nested-inside"]
)
def test_both_dialects_say_the_same(config: dict[str, Any]) -> None:
    parsed = parse(config)
    assert found(parsed) == ALGOS["NVFP4"].quant()
    assert found(parsed, "lm_head") is None
    assert parsed.quant_for(ModuleName(("model.embed_tokens",), "Embedding")) is None
    assert parsed.producer == "modelopt:0.47.0"
    assert parsed.kv is None
    assert not parsed.stale()


def test_file_beside_is_enough() -> None:
    assert found(parse(None, beside=NESTED)) == ALGOS["NVFP4"].quant()


@pytest.mark.parametrize("algo", ALGOS)
def test_every_algorithm_is_read_and_written(algo: str) -> None:
    quant = found(parse(plain(algo)))
    assert quant == ALGOS[algo].quant()
    assert quant is not None
    written = FORMAT.quantization_config({UP: quant, "lm_head": None})
    assert written["quant_algo"] == algo
    assert found(parse(written)) == quant


@pytest.mark.parametrize(
    ("text", "algo"),
    [("fp8_pb_wo", "FP8_PB_WO"), ("fp8_pb_real", "FP8_PB_WO"), ("mxfp4", "MXFP4"), ("fp8_pc_pt", "FP8_PER_CHANNEL_PER_TOKEN"),
     ("int4_awq", "W4A16_AWQ"), ("int8_sq", "W8A8_SQ_PER_CHANNEL"), ("int8_wo", "W8A16"), ("nvfp4", "NVFP4")],
)  # fmt: skip
def test_names_that_the_exporter_uses_inside(text: str, algo: str) -> None:
    assert found(parse(plain(text))) == ALGOS[algo].quant()


@pytest.mark.parametrize(
    ("method", "algo"), [("modelopt_fp4", "NVFP4"), ("modelopt_fp8", "FP8"), ("modelopt_mxfp8", "MXFP8")]
)
def test_method_alone_says_the_algorithm(method: str, algo: str) -> None:
    assert found(parse({"quant_method": method, "ignore": []})) == ALGOS[algo].quant()


def test_method_of_a_family_leaves_the_algorithm_open() -> None:
    config = {**plain("W4A16_NVFP4"), "quant_method": "modelopt_fp4"}
    assert found(parse(config)) == ALGOS["W4A16_NVFP4"].quant()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_algo": "W4A8_QSERVE_PER_GROUP"}, "W4A8_QSERVE_PER_GROUP.*it reads FP8, "),
        ({"quant_algo": "NVFP4_SVD"}, "low-rank"),
        ({"quant_algo": 4}, "quant_algo: 4"),
        ({"quant_algo": None}, "no quant_algo"),
        ({"quant_algo": "MIXED_PRECISION"}, "quantized_layers"),
        ({"group_size": 32}, "NVFP4 with group_size 32; 16"),
        ({"group_size": "16"}, "group_size: '16'"),
        ({"has_zero_point": True}, "has_zero_point"),
        ({"pre_quant_scale": "yes"}, "pre_quant_scale: 'yes'"),
        ({"clamp_val": [1.0]}, "clamp_val"),
        ({"use_meta_recipe": True}, "use_meta_recipe"),
        ({"surprise": 1}, "'surprise'"),
        ({"exclude_modules": "lm_head"}, "exclude_modules: 'lm_head'"),
        ({"exclude_modules": [1]}, "exclude_modules"),
        ({"ignore": ["model.layers.0*"]}, "contradict"),
        ({"kv_cache_quant_algo": "FP4"}, "'FP4'"),
        ({"kv_cache_quant_algo": "NVFP4_AFFINE"}, "bias"),
        ({"quantized_layers": {UP: {"quant_algo": "FP8"}}}, "need quant_algo: MIXED_PRECISION"),
        ({"quantized_layers": [UP]}, "an object was needed"),
    ],
)  # fmt: skip
def test_config_that_is_not_understood_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(nested(**change))


def test_key_beside_quantization_is_refused() -> None:
    with pytest.raises(ConfigError, match="'rotation'"):
        parse({**NESTED, "rotation": "hadamard"})


def test_method_and_algorithm_that_contradict_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"modelopt_mxfp8.*FP8"):
        parse({**plain("FP8"), "quant_method": "modelopt_mxfp8"})


def test_keys_of_an_engine_dump_that_say_nothing() -> None:
    """TensorRT-LLM writes every field of its own config, with group_size 128 also where there are no groups."""
    parsed = parse(nested(quant_algo="FP8", group_size=128, smoothquant_val=0.5, clamp_val=None, use_meta_recipe=False))
    assert found(parsed) == ALGOS["FP8"].quant()
    assert any("group_size 128 says nothing" in text for text in parsed.inferred)
    assert "smoothquant_val" in parsed.metadata


# Two files.


def test_two_files_that_agree() -> None:
    parsed = parse(FLAT, beside=NESTED)
    assert found(parsed) == ALGOS["NVFP4"].quant()


def test_each_file_fills_what_the_other_leaves_out() -> None:
    """The exporter leaves the group size of AWQ out of config.json."""
    parsed = parse(plain("W4A16_AWQ"), beside=nested(quant_algo="W4A16_AWQ", group_size=64, kv_cache_quant_algo="INT8"))
    assert found(parsed) == ALGOS["W4A16_AWQ"].quant(64)
    assert parsed.kv is not None
    assert parsed.kv.dtype == "int8"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_algo": "FP8", "group_size": None}, "quant_algo: 'NVFP4' and hf_quant_config.json says 'FP8'"),
        ({"kv_cache_quant_algo": "INT8"}, "kv_cache_quant_algo: 'FP8' and hf_quant_config.json says 'INT8'"),
        ({"exclude_modules": ["lm_head", "model.layers.0*"]}, r"disagree on whether model\.layers\.0\* is excluded"),
    ],
)
def test_two_files_that_disagree_are_refused(change: dict[str, Any], words: str) -> None:
    flat = {**FLAT, "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}
    with pytest.raises(ConfigError, match=words):
        parse(flat, beside=nested(**change))


def test_lists_that_mean_the_same_modules_agree() -> None:
    tensors = {**file_of("NVFP4", UP), "lm_head.weight": torch.ones(8, 256)}
    parsed = parse(FLAT, tensors, beside=nested(exclude_modules=["*lm_head*", "vision_tower*"]))
    assert found(parsed) == ALGOS["NVFP4"].quant()
    with pytest.raises(ConfigError, match=f"whether {UP} is excluded"):
        parse(FLAT, tensors, beside=nested(exclude_modules=["lm_head", "*.mlp.*"]))


def test_mixed_layers_that_disagree_are_refused() -> None:
    flat = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {UP: {"quant_algo": "FP8"}}}
    other = nested(quant_algo="MIXED_PRECISION", group_size=None, quantized_layers={UP: {"quant_algo": "NVFP4"}})
    with pytest.raises(ConfigError, match=f"quantized_layers.*{UP}.*FP8.*NVFP4"):
        parse(flat, beside=other)


# Groups.


@pytest.mark.parametrize(
    ("path", "value"),
    [(("weights", "num_bits"), 8), (("weights", "group_size"), 32), (("input_activations",), None)],
)
def test_groups_that_mean_other_numbers_are_refused(path: tuple[str, ...], value: Any) -> None:
    config = copy.deepcopy({**FLAT, "quant_algo": "W4A8_NVFP4_FP8", "group_size": 16})
    group = config["config_groups"]["group_0"]
    for key in path[:-1]:
        group = group[key]
    group[path[-1]] = value
    with pytest.raises(ConfigError, match="config_groups group_0"):
        parse(config)


@pytest.mark.parametrize("algo", ["NVFP4", "FP8", "W4A16_NVFP4", "MXFP8"])
def test_groups_alone_say_the_algorithm(algo: str) -> None:
    written = FORMAT.quantization_config({UP: ALGOS[algo].quant(), "lm_head": None})
    del written["quant_algo"]
    parsed = parse(written)
    assert found(parsed) == ALGOS[algo].quant()
    assert any("config_groups" in text for text in parsed.inferred)


def test_groups_of_no_algorithm_need_one() -> None:
    config = copy.deepcopy(FLAT)
    del config["quant_algo"]
    config["config_groups"]["group_0"]["weights"]["num_bits"] = 6
    with pytest.raises(ConfigError, match="add quant_algo"):
        parse(config)


def test_fp4_without_activations_in_its_groups_is_weight_only() -> None:
    config = copy.deepcopy(FLAT)
    del config["config_groups"]["group_0"]["input_activations"]
    quant = found(parse(config))
    assert quant is not None
    assert str(quant.scheme) == "Wnvfp4A16"


# Headers.


@pytest.mark.parametrize("algo", ["W4A16_AWQ", "W4A8_AWQ"])
def test_group_size_follows_from_the_shapes(algo: str) -> None:
    parsed = parse(plain(algo), file_of(algo, UP, group=64))
    assert found(parsed) == ALGOS[algo].quant(64)
    assert any("64, from the shape" in text for text in parsed.inferred)
    assert any("taken as 128" in text for text in parse(plain(algo)).inferred)
    with pytest.raises(ConfigError, match=f"{UP} has 4 groups over 256 columns; the config says group_size 128"):
        parse(plain(algo, group_size=128), file_of(algo, UP, group=64))


def test_fp8_without_input_scales_is_dynamic() -> None:
    tensors = {name: t for name, t in file_of("FP8", UP, DOWN).items() if not name.endswith("input_scale")}
    quant = found(parse(plain("FP8"), tensors))
    assert quant is not None
    assert str(quant.scheme) == "Wfp8Afp8_tensor_a:tensor"
    tensors[f"{DOWN}.input_scale"] = torch.tensor(1.0)
    assert found(parse(plain("FP8"), tensors)) == ALGOS["FP8"].quant()


def test_static_and_dynamic_fp8_in_one_file() -> None:
    tensors = file_of("FP8", UP, DOWN)
    del tensors[f"{DOWN}.input_scale"]
    static = ALGOS["FP8"].quant()
    assert static.scheme.act is not None
    dynamic = replace(static, scheme=replace(static.scheme, act=replace(static.scheme.act, dynamic=True)))
    parsed = parse(FORMAT.quantization_config({UP: static, DOWN: dynamic}), tensors)
    assert found(parsed, UP) == static
    assert found(parsed, DOWN) == dynamic


def test_nvfp4_without_input_scales_is_weight_only_unless_groups_say_otherwise() -> None:
    tensors = {name: t for name, t in file_of("NVFP4", UP).items() if not name.endswith("input_scale")}
    parsed = parse(plain("NVFP4"), tensors)
    quant = found(parsed)
    assert quant is not None
    assert str(quant.scheme) == "Wnvfp4A16"
    assert any("weight-only" in text for text in parsed.inferred)
    assert found(parse(FLAT, tensors)) == ALGOS["NVFP4"].quant()


def test_block_scales_under_the_other_name() -> None:
    tensors = {name.replace("weight_scale", "weight_scale_inv"): t for name, t in file_of("FP8_BLOCK_SCALES", UP).items()}
    quant = found(parse(plain("FP8_BLOCK_SCALES"), tensors))
    assert quant is not None
    assert [t.name for t in FORMAT.tensors(quant)] == ["weight", "weight_scale_inv"]


def test_smoothing_that_the_config_denies_is_refused() -> None:
    tensors = {f"{UP}.pre_quant_scale": torch.ones(256)}
    with pytest.raises(ConfigError, match=f"{UP}.pre_quant_scale"):
        parse(nested(pre_quant_scale=False), tensors)
    assert found(parse(nested(quant_algo="NVFP4_AWQ", pre_quant_scale=True))) == ALGOS["NVFP4_AWQ"].quant()


def test_lm_head_without_a_list_follows_the_file() -> None:
    config = {"quant_method": "modelopt", "quant_algo": "FP8"}
    assert found(parse(config), "lm_head") is None
    assert found(parse(config, file_of("FP8", "lm_head")), "lm_head") == ALGOS["FP8"].quant()
    assert found(parse({**config, "ignore": []}), "lm_head") == ALGOS["FP8"].quant()


# Mixed precision.


def mixed(layers: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "ignore": [], **changes}


def test_mixed_precision() -> None:
    experts = "model.layers.1.mlp.experts"
    parsed = parse(
        mixed(
            {
                UP: {"quant_algo": "FP8"},
                DOWN: {"quant_algo": "W4A16_AWQ", "group_size": 64, "has_zero_point": False, "pre_quant_scale": True},
                experts: {"quant_algo": "NVFP4", "group_size": 16},
                f"{experts}.3.down_proj": {"quant_algo": "FP8"},
                "model.layers.*.self_attn.o_proj": {"quant_algo": "W4A8_NVFP4_FP8", "group_size": 32},
            }
        )
    )
    assert found(parsed, UP) == ALGOS["FP8"].quant()
    assert found(parsed, DOWN) == ALGOS["W4A16_AWQ"].quant(64)
    assert found(parsed, f"{experts}.0.gate_proj") == ALGOS["NVFP4"].quant()
    assert found(parsed, f"{experts}.3.down_proj") == ALGOS["FP8"].quant()
    assert found(parsed, f"{experts}_shared.0.up_proj") is None
    assert found(parsed, "model.layers.7.self_attn.o_proj") == ALGOS["W4A8_NVFP4_FP8"].quant(32)
    assert found(parsed, "model.layers.7.self_attn.q_proj") is None


@pytest.mark.parametrize(
    ("entry", "words"),
    [({"quant_algo": "W2"}, f"{UP}.*'W2'"), ({}, "with quant_algo"), ({"quant_algo": "FP8", "rotation": 1}, "'rotation'"),
     ({"quant_algo": "FP8", "has_zero_point": True}, "has_zero_point"), ("FP8", "with quant_algo")],
)  # fmt: skip
def test_entry_that_is_not_understood_is_refused(entry: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(mixed({UP: entry}))


def test_layer_that_is_both_quantized_and_excluded_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\*"):
        parse(mixed({UP: {"quant_algo": "FP8"}}, ignore=["model.layers.0.mlp*"]))


def test_groups_of_mixed_precision() -> None:
    layers = {UP: ALGOS["FP8"].quant(), DOWN: ALGOS["NVFP4"].quant(), "lm_head": None}
    config = FORMAT.quantization_config(layers)
    parsed = parse(config)
    assert {name: found(parsed, name) for name in layers} == layers
    config["config_groups"]["group_0"]["targets"].append("model.layers.1.mlp.up_proj")
    with pytest.raises(
        ConfigError, match=r"model\.layers\.1\.mlp\.up_proj in config_groups group_0 and not in quantized_layers"
    ):
        parse(config)


@pytest.mark.parametrize(
    ("algo", "size", "weights", "activations"),
    [
        ("NVFP4_AWQ", 16, (4, "float"), (8, "float")),
        ("W4A8_AWQ", 128, (4, "float"), (8, "float")),
        ("W4A16_AWQ", 128, (4, "int"), None),
        ("W8A8_SQ_PER_CHANNEL", None, (8, "int"), (8, "int")),
        ("W4A8_MXFP4_FP8", 32, (4, "float"), (8, "float")),
    ],
)
def test_groups_as_the_exporter_writes_them(algo: str, size: int | None, weights: Any, activations: Any) -> None:
    """It calls the codes of AWQ floats, and the activations of NVFP4_AWQ 8 bits wide; quantized_layers is right."""

    def part(numbers: tuple[int, str]) -> dict[str, Any]:
        return {"dynamic": False, "num_bits": numbers[0], "type": numbers[1], **({"group_size": size} if size else {})}

    group = {"weights": part(weights), "targets": [UP], **({"input_activations": part(activations)} if activations else {})}
    entry = {"quant_algo": algo, **({"group_size": size} if size else {})}
    assert found(parse(mixed({UP: entry}, config_groups={"group_0": group}))) == ALGOS[algo].quant(size)


def test_config_without_layers_is_not_written() -> None:
    with pytest.raises(CannotEncode, match="no layer is quantized"):
        FORMAT.quantization_config({"lm_head": None})
