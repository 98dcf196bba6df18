"""Configs of FP8 checkpoints: what they mean, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qplug_fp8.fastdeploy import FastDeployFP8Format
from qplug_fp8.fbgemm import FbgemmFP8Format
from qplug_fp8.loader import FP8Format
from qplug_fp8.match import ModuleBoundary
from transformers.quantizers.quantizers_utils import should_convert_module

from qplug_core.config import LayerQuant, ModuleName
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.planner import read_config
from qplug_core.registry import get_registry
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source
from qplug_core.testing import random_weight

FORMAT = FP8Format()
MODULE = "model.layers.0.mlp.up_proj"
BLOCK = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
CODES = torch.zeros(256, 512).to(torch.float8_e4m3fn)


def source(config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Source:
    infos = MemorySource(tensors or {}).tensors
    return Source(Path("memory"), {"quantization_config": config}, config, "config.json", {}, infos, {})


def rule(config: dict[str, Any], name: str = MODULE, tensors: dict[str, torch.Tensor] | None = None) -> LayerQuant | None:
    return FORMAT.parse(source(config, tensors)).quant_for(ModuleName((name,)))


def layer(
    scale: str = "weight_scale", shape: tuple[int, ...] = (), module: str = MODULE, **more: torch.Tensor
) -> dict[str, torch.Tensor]:
    stored = {"weight": CODES, scale: torch.ones(shape), **more}
    return {f"{module}.{name}": tensor for name, tensor in stored.items()}


@pytest.mark.parametrize(
    ("config", "scheme", "layout"),
    [
        ({"quant_method": "FP8", "bits": 8}, "Wfp8Afp8_tensor", "fp8"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "Wfp8Afp8_tensor_static", "fp8"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "Wfp8e5m2Afp8_tensor", "fp8"),
        ({"quant_method": "w8a8_fp8"}, "Wfp8Afp8", "fp8"),
        (BLOCK, "Wfp8Afp8_b128x128", "fp8_block"),
        ({**BLOCK, "weight_block_size": [64, 32]}, "Wfp8Afp8_b64x32", "fp8_block"),
        ({**BLOCK, "activation_scheme": "static"}, "Wfp8Afp8_b128x128_static", "fp8_block"),
        ({**BLOCK, "scale_fmt": "ue8m0"}, "Wfp8Afp8_b128x128_a:se8m0.rule=ceil", "fp8_block"),
        (
            {
                "activation_scheme": "dynamic", "dequantize": False, "expert_dtype": "fp8", "modules_to_convert": None,
                "modules_to_not_convert": None, "quant_method": "fp8", "scale_fmt": "float", "weight_block_size": [128, 128],
            },
            "Wfp8Afp8_b128x128",
            "fp8_block",
        ),
    ],
)  # fmt: skip
def test_config_alone(config: dict[str, Any], scheme: str, layout: str) -> None:
    """An engine may ask before it has seen any tensor."""
    assert rule(config) == LayerQuant(QuantScheme.parse(scheme), layout)
    assert rule(config, "lm_head") is None


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_gate_does_not_mean_gate_proj(key: str) -> None:
    """AutoAWQ's substring would leave ``gate_proj`` at 16 bit."""
    config = {**BLOCK, key: ["gate", "lm_head", "model.layers.1"]}
    assert rule(config, "model.layers.0.mlp.gate") is None
    assert rule(config, "model.layers.0.mlp.gate_proj") is not None
    assert rule(config, "model.layers.1.mlp.up_proj") is None
    assert rule(config, "model.layers.11.mlp.up_proj") is not None


WORDS = st.sampled_from(["model", "layers", "1", "11", "mlp", "gate", "gate_proj", "experts", "lm_head", "self_attn"])
NAMES = st.lists(WORDS, min_size=1, max_size=5).map(".".join)


@given(NAMES, st.one_of(NAMES, st.sampled_from(["model.layers.*", "mlp.gate", ".*gate", "layers.(1|2)", "", "e"])))
@settings(max_examples=400, deadline=None)
def test_modules_to_not_convert_is_read_as_transformers_reads_it(name: str, pattern: str) -> None:
    ours = ModuleBoundary(pattern, "regex").matches(ModuleName((name,)))
    assert ours == (not should_convert_module(name, [pattern]))


def test_vllm_reads_whole_names_which_are_the_same_here() -> None:
    names = ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    config = {"quant_method": "fp8", "ignored_layers": names}
    assert [rule(config, name) for name in names] == [None, None]
    assert rule(config, "model.layers.0.self_attn.k_proj") is not None


def test_autofp8_patterns_keep_their_prefix() -> None:
    config = {"quant_method": "fp8", "ignored_layers": ["re:.*block_sparse_moe.gate"]}
    assert rule(config, "model.layers.0.block_sparse_moe.gate") is None


def test_rule_that_means_nothing_is_reported() -> None:
    config = FORMAT.parse(source({**BLOCK, "modules_to_not_convert": ["no_such_module"]}))
    config.quant_for(ModuleName((MODULE,)))
    assert [r.matcher.text for r in config.stale()] == ["no_such_module"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation_scheme": "sometimes"}, "write static or dynamic"),
        ({"weight_block_size": [128]}, "two positive numbers"),
        ({"weight_block_size": [0, 128]}, "two positive numbers"),
        ({"weight_block_size": 128}, "two positive numbers"),
        ({"fmt": "e4m3fnuz"}, "half of what it is in e4m3fn"),
        ({"fmt": "e3m4"}, "'e3m4'"),
        ({"scale_fmt": "ue5m3"}, "'ue5m3'"),
        ({"expert_dtype": "fp4"}, "expert_dtype: 'fp4'"),
        ({"bits": 4}, "bits: 4"),
        ({"moe_quant_algo": "NVFP4"}, "'moe_quant_algo'"),
        ({"ignored_layers": "lm_head"}, "a list of names"),
        ({"modules_to_not_convert": ["*.gate"]}, "not a regular expression"),
        ({"ignored_layers": ["a"], "modules_to_not_convert": ["b"]}, "with different names"),
        ({"kv_cache_scheme": {"num_bits": 4, "type": "float"}}, "kv_cache_scheme"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": True}}, "kv_cache_scheme"),
    ],
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("*", r"\*")):
        FORMAT.parse(source({**BLOCK, **changes}))


@pytest.mark.parametrize("value", ["static", {"num_bits": 8, "type": "float", "dynamic": False, "strategy": "tensor"}])
def test_kv_cache_scheme(value: Any) -> None:
    kv = FORMAT.parse(source({"quant_method": "fp8", "kv_cache_scheme": value})).kv
    assert kv is not None
    assert (kv.dtype, kv.block, kv.dynamic) == ("fp8_e4m3", (0, 0), False)
    assert FORMAT.parse(source({"quant_method": "fp8"})).kv is None


@pytest.mark.parametrize(("shape", "block"), [((), (0, 0)), ((1,), (0, 0)), ((4, 1, 1), (-1, 0))])
def test_kv_cache_scheme_of_the_headers(shape: tuple[int, ...], block: tuple[int, int]) -> None:
    tensors = layer() | {"model.layers.0.self_attn.k_scale": torch.ones(shape)}
    config = FORMAT.parse(source({"quant_method": "fp8"}, tensors))
    assert config.kv is not None
    assert config.kv.block == block
    assert any("KV cache is FP8" in fact for fact in config.inferred)


def test_static_scale_missing_is_refused() -> None:
    with pytest.raises(ConfigError, match="set activation_scheme to dynamic"):
        FORMAT.parse(source({"quant_method": "fp8", "activation_scheme": "static"}, layer()))


def test_static_scale_that_the_config_denies_is_refused() -> None:
    """Dropping a stored input_scale computes other numbers than the file was calibrated for."""
    with pytest.raises(ConfigError, match="set activation_scheme to static"):
        FORMAT.parse(source({"quant_method": "fp8", "activation_scheme": "dynamic"}, layer(input_scale=torch.ones(()))))


def test_scales_of_shards_that_vllm_fused_are_refused() -> None:
    """vLLM's sharded_state saves qkv with one scale for each of q, k and v; requantizing to the largest is not exact."""
    with pytest.raises(ConfigError, match=r"3 values for a weight \[256, 512\]"):
        FORMAT.parse(source({"quant_method": "fp8"}, layer("weight_scale", (3,))))


def test_two_scales_are_refused() -> None:
    with pytest.raises(ConfigError, match="weight_scale and weight_scale_inv"):
        FORMAT.parse(source(BLOCK, layer(weight_scale_inv=torch.ones(2, 4))))


def test_dtype_that_the_config_denies_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fmt: e5m2.*e4m3; correct fmt"):
        FORMAT.parse(source({"quant_method": "fp8", "fmt": "e5m2"}, layer()))


def test_block_that_is_not_said_and_fits_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[256, 512\] has scales \[7, 5\]"):
        FORMAT.parse(source({"quant_method": "fp8"}, layer("weight_scale_inv", (7, 5))))


@pytest.mark.parametrize(
    ("scale", "shape", "scheme", "layout"),
    [
        ("weight_scale", (), "Wfp8Afp8_tensor", "fp8"),
        ("weight_scale", (256, 1), "Wfp8Afp8", "fp8"),
        ("weight_scale", (2, 4), "Wfp8Afp8_b128x128", "fp8"),
        ("weight_scale_inv", (), "Wfp8Afp8_tensor", "fp8_inv"),
        ("weight_scale_inv", (4, 16), "Wfp8Afp8_b64x32", "fp8_block"),
        ("scale", (2, 4), "Wfp8Afp8_b128x128", "fp8_scale"),
        ("qscale_weight", (1,), "Wfp8Afp8_tensor", "mistral_fp8"),
        ("weights_scaling_factor", (1,), "Wfp8Afp8_tensor", "trt_fp8"),
    ],
)
def test_what_a_config_leaves_out_is_read_from_the_headers_and_said(
    scale: str, shape: tuple[int, ...], scheme: str, layout: str
) -> None:
    config = FORMAT.parse(source({"quant_method": "fp8"}, layer(scale, shape)))
    assert config.quant_for(ModuleName((MODULE,))) == LayerQuant(QuantScheme.parse(scheme), layout)
    assert any("read from" in fact for fact in config.inferred)


def test_layers_that_differ_are_told_apart_by_their_tensors() -> None:
    others = [f"model.layers.{i}.mlp.up_proj" for i in range(1, 4)]
    tensors = layer() | {k: v for name in others for k, v in layer("weight_scale", (256, 1), name).items()}
    config = FORMAT.parse(source({"quant_method": "fp8"}, tensors))
    found = {name: config.quant_for(ModuleName((name,))) for name in (MODULE, *others)}
    assert [str(q.scheme) for q in found.values() if q] == ["Wfp8Afp8_tensor", "Wfp8Afp8", "Wfp8Afp8", "Wfp8Afp8"]
    assert not config.stale()


def test_quantized_lm_head_and_embedding() -> None:
    tensors = layer(module="lm_head") | layer("weight_scale", (1,), "model.embed_tokens")
    config = FORMAT.parse(source({"quant_method": "fp8", "modules_to_convert": ["embed_tokens"]}, tensors))
    assert config.quant_for(ModuleName(("lm_head",))) is not None
    table = config.quant_for(ModuleName(("model.embed_tokens",), "Embedding"))
    assert table == LayerQuant(QuantScheme.parse("Wfp8A16_tensor"), "fp8")
    assert config.quant_for(ModuleName(("model.other_table",), "Embedding")) is None


def test_fbgemm() -> None:
    fbgemm = FbgemmFP8Format()

    def scheme(config: dict[str, Any]) -> str:
        quant = fbgemm.parse(source(config)).quant_for(ModuleName((MODULE,)))
        assert quant is not None
        return str(quant.scheme)

    assert scheme({"quant_method": "fbgemm_fp8", "activation_scale_ub": 448.0}) == "Wfp8Afp8_a:rule=ub448"
    assert scheme({"quant_method": "fbgemm_fp8"}) == "Wfp8Afp8_a:rule=ub1200"
    assert scheme({"quant_method": "fbgemm_fp8", "activation_scale_ub": None}) == "Wfp8Afp8"
    assert QuantScheme.parse("Wfp8Afp8_a:rule=ub1200").act == QuantScheme.parse(scheme({})).act
    for bad in (0, -1.0, True, "1200", 0.5, float("inf")):
        with pytest.raises(ConfigError, match="a positive whole number"):
            scheme({"quant_method": "fbgemm_fp8", "activation_scale_ub": bad})


def test_fastdeploy_is_found_by_its_own_key() -> None:
    read, fmt = read_config(source({"quantization": "block_wise_fp8"}), get_registry())
    assert isinstance(fmt, FastDeployFP8Format)
    assert str(read.quant_for(ModuleName((MODULE,))).scheme) == "Wfp8Afp8_b128x128"  # type: ignore[union-attr]


def test_fastdeploy_tensor_wise_needs_a_rotation_of_activations() -> None:
    with pytest.raises(ConfigError, match="Hadamard"):
        FastDeployFP8Format().parse(source({"quantization": "tensor_wise_fp8"}))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization": "wfp8afp8"}, "quantize='Wfp8Afp8'"),
        ({"quantization": "block_wise_fp8", "is_quantized": False}, "quantize='Wfp8Afp8_b128x128'"),
        ({"quantization": "block_wise_fp8", "hadamard_block_size": 128}, "hadamard_block_size"),
    ],
)
def test_fastdeploy_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FastDeployFP8Format().parse(source(config))


def test_fastdeploy_file_without_its_tensors_is_quantization_at_load() -> None:
    tensors = {f"{MODULE}.weight": torch.zeros(256, 512)}
    with pytest.raises(ConfigError, match="remove the config and load with quantize="):
        FastDeployFP8Format().parse(source({"quantization": "block_wise_fp8"}, tensors))


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("W8A16", "FP8 weights"),
        ("Wmxfp4A16", "FP8 weights"),
        ("Wfp8A8", "16-bit or FP8 activations"),
        ("Wnvfp4A16", "FP8 weights"),
    ],
)
def test_foreign_weights_have_no_layout(scheme: str, words: str) -> None:
    with pytest.raises(CannotEncode, match=words):
        FORMAT.quant_for_scheme(random_weight(QuantScheme.parse(scheme), 64, 128))


def test_config_that_no_engine_would_read_is_not_written() -> None:
    token, group = (LayerQuant(QuantScheme.parse(f"Wfp8Afp8_tensor{s}"), "fp8") for s in ("", "_a:g64"))
    with pytest.raises(CannotEncode, match="one scheme for all"):
        FORMAT.quantization_config({"a": token, "b": group})
    with pytest.raises(CannotEncode, match="one scale for each token"):
        FORMAT.quantization_config({"a": group})
    with pytest.raises(CannotEncode, match="no layer is quantized"):
        FORMAT.quantization_config({"a": None})


@pytest.mark.parametrize("layout", ["fp8", "fp8_block", "fp8_inv", "fp8_scale", "mistral_fp8", "trt_fp8"])
@pytest.mark.parametrize(
    "name", ["Wfp8Afp8_tensor_static", "Wfp8Afp8", "Wfp8Afp8_b128x128", "Wfp8Afp8_b128x128_se8m0_a:se8m0.rule=ceil"]
)
def test_every_layout_that_is_written_is_read_back(name: str, layout: str) -> None:
    weight = random_weight(QuantScheme.parse(name), 256, 512)
    meant = LayerQuant(weight.scheme, layout)
    try:
        stored = FORMAT.encode(weight, meant)
    except CannotEncode:
        holds = {
            "fp8_block": "_b" in name, "fp8_inv": "_b" not in name, "fp8_scale": "_b" in name,
            "trt_fp8": "tensor" in name,
        }  # fmt: skip
        assert not holds.get(layout, True)
        return
    assert FORMAT.decode(stored, meant, 256, 512).equal(weight)
    layers = {MODULE: meant, "model.layers.0.mlp.down_proj": None}
    written = FORMAT.quantization_config(layers)
    config = FORMAT.parse(source(written, {f"{MODULE}.{key}": tensor for key, tensor in stored.items()}))
    assert {module: config.quant_for(ModuleName((module,))) for module in layers} == layers
