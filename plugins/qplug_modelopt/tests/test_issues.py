"""What users of other engines ran into with these checkpoints: each is refused with its reason here, or right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_modelopt.algos import ALGOS
from qplug_modelopt.loader import ModelOptFormat

from qplug_core.config import LayerQuant, ModuleName
from qplug_core.errors import ConfigError, CoverError, DecodeError, SplitRequired
from qplug_core.layer import LayerSpec
from qplug_core.planner import plan
from qplug_core.quant_plan import QuantPlan
from qplug_core.reference.linear import ReferenceLinear
from qplug_core.source import MemorySource, Source
from qplug_core.testing import random_weight
from qplug_core.weight import QuantWeight, concat

FORMAT = ModelOptFormat()
N, K = 64, 256
ATTENTION = "model.layers.0.self_attn"
Q, GATE, ROUTER = f"{ATTENTION}.q_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.gate"


def config(algo: str | None, **changes: Any) -> dict[str, Any]:
    """A nested config."""
    return {"quantization": {"quant_algo": algo, "exclude_modules": ["lm_head"], **changes}}


def stored(algo: str, module: str, seed: int = 0, **fields: Any) -> dict[str, torch.Tensor]:
    """Tensors of one module ``[64, 256]``."""
    quant = ALGOS[algo].quant()
    weight = random_weight(quant.scheme, N, K, torch.Generator().manual_seed(seed))
    return {f"{module}.{name}": t for name, t in FORMAT.encode(replace(weight, **fields), quant).items()}


def source(said: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Source:
    infos = MemorySource(tensors).tensors
    return Source(Path("memory"), {}, said, "hf_quant_config.json", {"hf_quant_config.json": said}, infos, {})


def planned(said: dict[str, Any], tensors: dict[str, torch.Tensor], *modules: str, cache: bool = False) -> QuantPlan:
    layers = [LayerSpec(name, "linear", N, K) for name in modules]
    if cache:
        layers.append(LayerSpec(ATTENTION, "kv_cache", N, K))
    return plan(source(said, tensors), layers, device="cpu", complete=True)


def quant_of(said: dict[str, Any], name: str) -> LayerQuant | None:
    return FORMAT.parse(source(said, {})).quant_for(ModuleName((name,)))


def decoded(algo: str, seed: int = 0, **fields: Any) -> QuantWeight:
    tensors = {name.removeprefix("m."): t for name, t in stored(algo, "m", seed, **fields).items()}
    return FORMAT.decode(tensors, ALGOS[algo].quant(), N, K)


SCALES = {f"{ATTENTION}.k_proj.k_scale": torch.tensor(0.5), f"{ATTENTION}.v_proj.v_scale": torch.tensor(0.25)}


def test_vllm_25047_kv_scales_are_claimed() -> None:
    """k_scale and v_scale of Qwen3-MoE were left unread, and the cache used 1."""
    made = planned(config("FP8", kv_cache_quant_algo="FP8"), {**stored("FP8", Q), **SCALES}, Q, cache=True)
    (cache,) = made.caches
    assert cache.scales == {"k_scale": f"{ATTENTION}.k_proj.k_scale", "v_scale": f"{ATTENTION}.v_proj.v_scale"}
    assert cache.scheme.dtype == "fp8_e4m3"


@pytest.mark.parametrize("prefix", [ATTENTION, f"{ATTENTION}.qkv_proj"])
def test_sglang_20705_kv_scales_under_other_names(prefix: str) -> None:
    scales = {f"{prefix}.k_scale": torch.tensor(0.5), f"{prefix}.v_scale": torch.tensor(0.25)}
    made = planned(config("FP8", kv_cache_quant_algo="FP8"), {**stored("FP8", Q), **scales}, Q, cache=True)
    assert made.caches[0].scales == {"k_scale": f"{prefix}.k_scale", "v_scale": f"{prefix}.v_scale"}


def test_sglang_20705_kv_scales_without_a_scheme_are_refused() -> None:
    with pytest.raises(CoverError, match="names no KV-cache scheme"):
        planned(config("FP8"), {**stored("FP8", Q), **SCALES}, Q, cache=True)


def test_modelopt_20_kv_scales_of_exactly_one_are_scales() -> None:
    """The exporter's floor of 1.0 was reported as a wrong result; the file means it."""
    ones = {name: torch.ones(()) for name in SCALES}
    made = planned(config("FP8", kv_cache_quant_algo="FP8"), {**stored("FP8", Q), **ones}, Q, cache=True)
    assert len(made.caches[0].scales) == 2


def test_trtllm_16916_kv_scales_alone() -> None:
    """16-bit weights with a quantized cache: scales are delivered without any quantized layer."""
    made = planned(config(None, kv_cache_quant_algo="FP8"), {f"{Q}.weight": torch.ones(N, K), **SCALES}, Q, cache=True)
    assert not made.decisions[0].quantized
    assert len(made.caches[0].scales) == 2


@pytest.mark.parametrize("said", ["NVFP4", {"num_bits": 4, "type": "float", "dynamic": False}])
def test_trtllm_flat_reader_drops_nvfp4_caches(said: Any) -> None:
    """A cache algorithm written as a plain string was read as none."""
    flat = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": said, "ignore": []}
    kv = FORMAT.parse(source(flat, {})).kv
    assert kv is not None
    assert (kv.dtype, kv.scale_dtype, kv.dynamic) == ("fp4_e2m1", "e4m3", "local")


def test_trtllm_bias_of_an_affine_cache_is_refused() -> None:
    biases = {f"{ATTENTION}.k_proj.k_bias": torch.zeros(K)}
    with pytest.raises(CoverError, match="k_bias"):
        planned(config("FP8", kv_cache_quant_algo="NVFP4"), {**stored("FP8", Q), **SCALES, **biases}, Q, cache=True)


def test_trtllm_3548_gptq_is_sent_to_its_plugin() -> None:
    with pytest.raises(ConfigError, match="qplug-gptq"):
        FORMAT.parse(source(config("W4A16_GPTQ"), {}))


def test_trtllm_5716_unknown_algorithms_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'W8A8_SQ_PER_TENSOR_PLUGIN'.*it reads FP8, .*MIXED_PRECISION"):
        FORMAT.parse(source(config("W8A8_SQ_PER_TENSOR_PLUGIN"), {}))


def test_trtllm_17723_every_entry_of_a_mixed_config_counts() -> None:
    """Of several groups one was read, and the entry of lm_head was dropped."""
    layers = {
        Q: {"quant_algo": "FP8"},
        GATE: {"quant_algo": "NVFP4", "group_size": 16},
        "lm_head": {"quant_algo": "FP8"},
    }
    said = config("MIXED_PRECISION", quantized_layers=layers, exclude_modules=[])
    tensors = {**stored("FP8", Q), **stored("NVFP4", GATE), **stored("FP8", "lm_head")}
    made = planned(said, tensors, Q, GATE, "lm_head")
    schemes = [str(d.segments[0].quant.scheme) for d in made.decisions if d.segments[0].quant]
    assert schemes == ["Wfp8Afp8_tensor_static", "Wnvfp4Anvfp4", "Wfp8Afp8_tensor_static"]


def test_trtllm_layer_that_a_mixed_config_leaves_out_is_refused() -> None:
    said = config("MIXED_PRECISION", quantized_layers={Q: {"quant_algo": "FP8"}})
    with pytest.raises(CoverError, match="F8_E4M3 where the config leaves the layer at 16 bit"):
        planned(said, {**stored("FP8", Q), **stored("FP8", GATE)}, Q, GATE)


def test_trtllm_two_files_that_differ_are_refused() -> None:
    """TensorRT-LLM warns and takes hf_quant_config.json; other engines take config.json."""
    inline = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    both = Source(Path("memory"), {}, inline, "config.json", {"hf_quant_config.json": config("NVFP4")}, {}, {})
    with pytest.raises(ConfigError, match=r"config\.json says quant_algo: 'FP8' and hf_quant_config\.json says 'NVFP4'"):
        FORMAT.parse(both)


def test_trtllm_fused_shards_keep_their_own_scales() -> None:
    """TensorRT-LLM and FastDeploy take the largest weight_scale_2 of q, k and v for all three, without quantizing again."""
    parts = [decoded("W4A16_NVFP4", s, global_scale=torch.tensor(0.01 * (s + 1))) for s in range(3)]
    assert torch.equal(concat(parts).dequantize(), torch.cat([p.dequantize() for p in parts]))


def test_trtllm_fused_shards_of_different_inputs_run_apart() -> None:
    """The largest input_scale for all shards is another quantization of x."""
    parts = [decoded("NVFP4", s, act_scale=torch.tensor(0.01 * (s + 1))) for s in range(2)]
    with pytest.raises(SplitRequired, match="act_scale"):
        concat(parts)


def test_trtllm_folded_pre_quant_scale_is_optional() -> None:
    """Loaders of single layers failed with a KeyError where the exporter had folded it away."""
    assert planned(config("W4A16_AWQ", pre_quant_scale=True), stored("W4A16_AWQ", Q), Q).decisions[0].quantized


@pytest.mark.parametrize("algo", ["W4A16_AWQ", "W4A8_AWQ", "NVFP4_AWQ"])
def test_trtllm_present_pre_quant_scale_is_applied(algo: str) -> None:
    """Fused loaders ignored it. It multiplies x, before x is quantized."""
    factor = torch.rand(K, generator=torch.Generator().manual_seed(1)) + 0.5
    smoothed, bare = decoded(algo, pre_scale=factor), decoded(algo)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(2))
    kernel = ReferenceLinear()
    expected = kernel.apply(x * factor, kernel.pack(bare))
    assert torch.equal(kernel.apply(x, kernel.pack(smoothed)), expected)
    assert not torch.allclose(kernel.apply(x, kernel.pack(bare)), expected, rtol=1e-2)


def test_fastdeploy_excluded_modules_are_excluded() -> None:
    """exclude_modules was parsed, and its use commented out."""
    made = planned(
        config("NVFP4", exclude_modules=["*.self_attn*"]),
        {f"{Q}.weight": torch.ones(N, K), **stored("NVFP4", GATE)},
        Q,
        GATE,
    )
    assert [d.quantized for d in made.decisions] == [False, True]


def test_vllm_substrings_do_not_exclude() -> None:
    """``gate`` of a router is part of ``gate_proj``, and ``layers.1`` of ``layers.10``."""
    said = config("FP8", exclude_modules=[ROUTER, "model.layers.1"])
    assert quant_of(said, ROUTER) is None
    assert quant_of(said, GATE) is not None
    assert quant_of(said, "model.layers.1.mlp.up_proj") is None
    assert quant_of(said, "model.layers.10.mlp.up_proj") is not None


def test_vllm_11790_pattern_that_means_no_module_is_reported() -> None:
    made = planned(config("FP8", exclude_modules=["language_model.lm_head"]), stored("FP8", Q), Q)
    assert any("language_model.lm_head" in note and "no module" in note for note in made.notes)


def test_vllm_47241_16_bit_weight_under_a_quantized_name_is_refused() -> None:
    """bf16 was copied into FP8 parameters, because shapes matched."""
    tensors = {**stored("FP8", Q), f"{Q}.weight": torch.ones(N, K, dtype=torch.bfloat16)}
    with pytest.raises(CoverError, match="is BF16 where"):
        planned(config("FP8"), tensors, Q)


def test_gptqmodel_1376_expert_without_input_scale_is_refused() -> None:
    """An expert that calibration never reached has no input_scale; others have."""
    tensors = {**stored("NVFP4", Q), **stored("NVFP4", GATE)}
    del tensors[f"{GATE}.input_scale"]
    with pytest.raises(CoverError, match=rf"{GATE}\.input_scale"):
        planned(config("NVFP4"), tensors, Q, GATE)


def test_autoawq_335_nan_from_calibration_is_refused() -> None:
    tensors = {name.removeprefix("m."): t for name, t in stored("W4A8_AWQ", "m").items()}
    with pytest.raises(DecodeError, match="input_scale is nan"):
        FORMAT.decode({**tensors, "input_scale": torch.tensor(float("nan"))}, ALGOS["W4A8_AWQ"].quant(), N, K)


def test_swizzled_block_scales_are_refused() -> None:
    """Block scales lie in rows; a file whose scales were padded and swizzled for one kernel has another shape."""
    tensors = stored("NVFP4", Q)
    tensors[f"{Q}.weight_scale"] = torch.ones(128, 16).to(torch.float8_e4m3fn)
    with pytest.raises((CoverError, ConfigError), match="weight_scale"):
        planned(config("NVFP4"), tensors, Q)
