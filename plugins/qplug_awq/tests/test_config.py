"""What configs say, and what is read from the headers where they say less or something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_awq.loader import AWQFormat
from safetensors.torch import save_file

from qplug_core.config import LayerQuant, ModuleName, QuantizationConfig
from qplug_core.errors import CannotEncode, ConfigError, CoverError
from qplug_core.layer import LayerSpec, PlainSlot
from qplug_core.planner import plan, read_config
from qplug_core.registry import get_registry
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source
from qplug_core.testing import random_weight

FORMAT = AWQFormat()
MODULE = "model.layers.0.mlp.up_proj"
BASE = {"bits": 4, "group_size": 128, "quant_method": "awq", "zero_point": True, "version": "gemm"}
MINIMAL = {"bits": 4, "group_size": 128, "quant_method": "awq"}


def quant(name: str, layout: str = "awq_gemm", **opts: Any) -> LayerQuant:
    return LayerQuant(QuantScheme.parse(name), layout, tuple(opts.items()))


def stored(meant: LayerQuant, *modules: str, n: int = 64, k: int = 256) -> dict[str, torch.Tensor]:
    tensors = FORMAT.encode(random_weight(meant.scheme, n, k), meant)
    return {f"{module}.{name}": tensor for module in modules or (MODULE,) for name, tensor in tensors.items()}


def source(config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None, **files: Any) -> Source:
    infos = MemorySource(tensors or {}).tensors
    return Source(Path("memory"), {"quantization_config": config}, config, "config.json", files, infos, {})


def parsed(config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> QuantizationConfig:
    return FORMAT.parse(source(config, tensors))


def rule(config: dict[str, Any], name: str = MODULE, tensors: dict[str, torch.Tensor] | None = None) -> LayerQuant | None:
    return parsed(config, tensors).quant_for(ModuleName((name,)))


def test_smallest_config_without_headers() -> None:
    found = parsed(MINIMAL)
    assert found.quant_for(ModuleName((MODULE,))) == quant("W4A16_g128_asym")
    assert found.inferred == [
        "version is not said: gemm, AutoAWQ's default",
        "zero_point is not said: planned with zero points, which also holds symmetric weights",
    ]


@pytest.mark.parametrize("layout", ["awq_gemm", "awq_gemv", "awq_gemv_fast"])
def test_smallest_config_takes_the_packing_from_the_headers(layout: str) -> None:
    meant = quant("W4A16_g128_asym", layout)
    found = parsed(MINIMAL, stored(meant))
    assert found.quant_for(ModuleName((MODULE,))) == meant
    assert f"version is not said: {layout[4:]}, from dtype and shapes of {MODULE}" in found.inferred


def test_smallest_config_of_a_marlin_file() -> None:
    meant = quant("W4A16_g128", "awq_marlin")
    assert rule(MINIMAL, tensors=stored(meant)) == meant


def test_nothing_but_the_method() -> None:
    found = parsed({"quant_method": "awq"})
    assert found.quant_for(ModuleName((MODULE,))) == quant("W4A16_g128_asym")
    assert "bits is not said: taken as 4, AutoAWQ's default" in found.inferred
    assert "group_size is not said: taken as 128, AutoAWQ's default" in found.inferred
    with pytest.raises(ConfigError, match="4 groups over 256 columns; the config says group_size 128"):
        parsed({"quant_method": "awq"}, stored(quant("W4A16_g64_asym")))


def test_names_of_autoawq_itself() -> None:
    """``quant_config.json`` says w_bit and q_group_size, and its version in capitals."""
    own = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMV", "modules_to_not_convert": None}
    assert rule(own) == quant("W4A16_g64_asym", "awq_gemv")


def test_quant_config_file_alone(tmp_path: Path) -> None:
    """AutoAWQ's own file has no quant_method; its name says whose it is."""
    own = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(own))
    (tmp_path / "config.json").write_text("{}")
    save_file(stored(quant("W4A16_g128_asym")), tmp_path / "model.safetensors")
    config, loaded = read_config(Source.open(tmp_path), get_registry())
    assert loaded is not None
    assert loaded.name == "awq"
    assert config.quant_for(ModuleName((MODULE,))) == quant("W4A16_g128_asym")


def test_vllm_11122_config_within_text_config(tmp_path: Path) -> None:
    """InternVL2-Llama3-76B-AWQ: vLLM did not see a config that belongs to the language model."""
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"quantization_config": BASE}}))
    save_file(stored(quant("W4A16_g128_asym")), tmp_path / "model.safetensors")
    config, _ = read_config(Source.open(tmp_path), get_registry())
    assert config.quant_for(ModuleName((MODULE,))) == quant("W4A16_g128_asym")


@pytest.mark.parametrize(
    ("said", "layout"), [("gemm", "awq_gemv"), ("gemv", "awq_gemm"), ("gemv", "awq_gemv_fast"), ("marlin", "awq_gemm")]
)
def test_autoawq_217_version_that_the_file_contradicts(said: str, layout: str) -> None:
    """vLLM reads no version and fails on a shape of a gemv file; here the refusal says what to set."""
    with pytest.raises(ConfigError, match=f"set version to '{layout[4:]}'"):
        parsed({**BASE, "version": said}, stored(quant("W4A16_g128_asym", layout)))


def test_gptqmodel_2364_llm_awq_called_gemm() -> None:
    tensors = stored(quant("W4A16_g128_asym", "awq_gemv_fast", zeros="scaled_zeros"))
    with pytest.raises(ConfigError, match="set version to 'gemv_fast'"):
        parsed(BASE, tensors)
    found = rule({**BASE, "version": "llm-awq"}, tensors=tensors)
    assert found == quant("W4A16_g128_asym", "awq_gemv_fast", zeros="scaled_zeros")
    assert rule({**BASE, "version": "llm-awq"}, tensors=stored(quant("W4A16_g128_asym", "awq_gemv"))) == quant(
        "W4A16_g128_asym", "awq_gemv"
    )


def test_versions_that_name_a_kernel_are_gemm_files() -> None:
    for version in ("exllama", "exllamav2", "ipex"):
        found = parsed({**BASE, "version": version})
        assert found.quant_for(ModuleName((MODULE,))) == quant("W4A16_g128_asym")
        assert f"version {version} is read as gemm" in found.inferred


@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("layout", ["awq_gemm", "awq_gemv", "awq_gemv_fast"])
@pytest.mark.parametrize(("n", "k"), [(256, 256), (64, 64), (64, 512), (512, 64)])
def test_vllm_48998_square_and_narrow_layers(layout: str, group: int, n: int, k: int) -> None:
    """qweight of a square layer has one shape in gemm and in gemv; the axes are never guessed from it alone."""
    meant = quant(f"W4A16_g{group}_asym", layout)
    assert rule({**MINIMAL, "group_size": group}, tensors=stored(meant, n=n, k=k)) == meant


def test_two_packings_in_one_file_are_refused() -> None:
    tensors = {**stored(quant("W4A16_g128_asym")), **stored(quant("W4A16_g128_asym", "awq_gemv"), "b")}
    with pytest.raises(ConfigError, match="one AWQ file has one version"):
        parsed(BASE, tensors)


def test_file_of_gptq_called_awq_is_refused() -> None:
    """The zero points would be off by one, and the codes in another order."""
    tensors = {
        f"{MODULE}.qweight": torch.zeros(32, 64, dtype=torch.int32),
        f"{MODULE}.qzeros": torch.zeros(2, 8, dtype=torch.int32),
        f"{MODULE}.scales": torch.zeros(2, 64),
    }
    with pytest.raises(ConfigError, match="set quant_method to 'gptq'"):
        parsed(BASE, tensors)


def test_llm_compressor_1550_compressed_tensors_is_not_awq() -> None:
    """What llm-compressor makes with AWQ is stored as compressed-tensors."""
    with pytest.raises(ConfigError, match="use the plugin of that method"):
        parsed({**BASE, "quant_method": "compressed-tensors"})


def test_symmetric_by_either_word() -> None:
    assert rule({**BASE, "zero_point": False}) == quant("W4A16_g128")
    assert rule({**MINIMAL, "sym": True}) == quant("W4A16_g128")
    assert rule({**MINIMAL, "sym": True, "zero_point": False}) == quant("W4A16_g128")
    assert rule({**MINIMAL, "sym": False}) == quant("W4A16_g128_asym")


def test_gptqmodel_says_sym_beside_zero_point() -> None:
    """Both true is no contradiction of the numbers: zero points hold symmetric weights too."""
    found = parsed({**BASE, "sym": True})
    assert found.quant_for(ModuleName((MODULE,))) == quant("W4A16_g128_asym")
    assert any("sym too" in text for text in found.inferred)


def test_config_of_gptqmodel() -> None:
    config = {
        "bits": 4, "group_size": 64, "desc_act": False, "sym": False, "lm_head": False, "quant_method": "awq",
        "checkpoint_format": "gemm", "format": "gemm", "version": "gemm", "zero_point": True, "pack_dtype": "int32",
        "meta": {"quantizer": ["gptqmodel:7.6.0"], "damp_percent": 0.05}, "dynamic": None,
    }  # fmt: skip
    found = parsed(config)
    assert found.quant_for(ModuleName((MODULE,))) == quant("W4A16_g64_asym")
    assert found.producer == "gptqmodel:7.6.0"


def test_config_of_auto_round() -> None:
    config = {
        "bits": 4, "group_size": 128, "sym": True, "data_type": "int", "quant_method": "auto-round", "iters": 200,
        "packing_format": "auto_round:auto_awq", "autoround_version": "0.16.1", "block_name_to_quantize": "model.layers",
        "extra_config": {"model.layers.1.mlp.up_proj": {"bits": 16}, "model.layers.2.mlp.up_proj": {"bits": 4, "group_size": 32}},
    }  # fmt: skip
    found = parsed(config)
    assert found.producer == "auto-round:0.16.1"
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    assert [found.quant_for(ModuleName((name,))) for name in names] == [quant("W4A16_g128"), None, quant("W4A16_g32")]
    with pytest.raises(ConfigError, match=r"version: 'gptq'"):
        parsed({**config, "packing_format": "auto_round:auto_gptq"})


def test_eight_bits_of_rtp_llm() -> None:
    config = {"w_bit": 8, "q_group_size": 128, "quant_method": "awq"}
    found = parsed(config, stored(quant("W8A16_g128_asym")))
    assert found.quant_for(ModuleName((MODULE,))) == quant("W8A16_g128_asym")
    assert any("RTP-LLM's order" in text for text in found.inferred)
    with pytest.raises(ConfigError, match="8 bits are stored as gemm"):
        parsed({**config, "version": "gemv"})


@pytest.mark.parametrize(("said", "held"), [(4, 8), (8, 4)])
def test_bits_that_the_shapes_contradict(said: int, held: int) -> None:
    with pytest.raises(ConfigError, match=f"stored with {held} bits"):
        parsed({**BASE, "bits": said}, stored(quant(f"W{held}A16_g128_asym")))


def test_group_size_that_the_shapes_contradict() -> None:
    with pytest.raises(ConfigError, match="2 groups over 256 columns; the config says group_size 64"):
        parsed({**BASE, "group_size": 64}, stored(quant("W4A16_g128_asym")))


def test_one_group_for_each_row() -> None:
    assert rule({**BASE, "group_size": -1}, tensors=stored(quant("W4A16_channel_asym"))) == quant("W4A16_channel_asym")


def test_gate_does_not_mean_gate_proj_where_the_file_holds_it_quantized() -> None:
    """AutoAWQ matches by substring; Qwen3-MoE files list ``gate`` and quantize gate_proj."""
    config = {**BASE, "modules_to_not_convert": ["gate"]}
    names = ["model.layers.0.mlp.experts.0.gate_proj", "model.layers.0.mlp.gate"]
    found = parsed(config, stored(quant("W4A16_g128_asym"), names[0]))
    assert [found.quant_for(ModuleName((name,))) for name in names] == [quant("W4A16_g128_asym"), None]
    assert any("'gate' in modules_to_not_convert is taken as a whole name" in text for text in found.inferred)


def test_tensorrt_llm_1528_gate_of_mixtral() -> None:
    config = {**BASE, "modules_to_not_convert": ["gate"]}
    found = parsed(config, stored(quant("W4A16_g128_asym"), "model.layers.0.block_sparse_moe.experts.0.w1"))
    assert found.quant_for(ModuleName(("model.layers.0.block_sparse_moe.gate",))) is None
    assert found.quant_for(ModuleName(("model.layers.0.block_sparse_moe.experts.0.w1",))) is not None
    assert found.stale() == []


def test_substring_means_every_name_that_holds_it_where_the_file_agrees() -> None:
    config = {**BASE, "modules_to_not_convert": ["visual", "gate"]}
    for tensors in (None, stored(quant("W4A16_g128_asym"))):
        assert rule(config, "model.visual.blocks.0.attn.qkv", tensors) is None
        assert rule(config, "model.layers.0.mlp.gate_proj", tensors) is None
        assert rule(config, MODULE, tensors) is not None


def test_layer_1_is_not_layer_10() -> None:
    """vLLM's substring also leaves layers.10 to layers.19 at 16 bit."""
    names = [f"model.layers.{i}.mlp.up_proj" for i in (1, 10)]
    found = parsed({**BASE, "modules_to_not_convert": ["layers.1"]}, stored(quant("W4A16_g128_asym"), names[1]))
    assert [found.quant_for(ModuleName((name,))) for name in names] == [None, quant("W4A16_g128_asym")]


def test_skip_list_that_the_file_contradicts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'mlp' in modules_to_not_convert and the file holds .*up_proj\.qweight"):
        parsed({**BASE, "modules_to_not_convert": ["mlp"]}, stored(quant("W4A16_g128_asym")))


def test_vllm_skip_list_from_the_headers() -> None:
    """A module that the file holds at 16 bit is 16 bit, though no list names it, and the plan says so."""
    tensors = {**stored(quant("W4A16_g128_asym")), "model.layers.0.mlp.down_proj.weight": torch.zeros(256, 64).half()}
    layers = [LayerSpec(MODULE, "linear", 64, 256), LayerSpec("model.layers.0.mlp.down_proj", "linear", 256, 64)]
    made = plan(source(BASE, tensors), layers, device="cpu", complete=True)
    assert [decision.quantized for decision in made.decisions] == [True, False]
    assert any("the file holds 16 bit" in note for note in made.decisions[1].notes)


@pytest.mark.parametrize("lost", ["qzeros", "scales"])
def test_missing_tensor_is_refused_not_guessed(lost: str) -> None:
    tensors = {name: t for name, t in stored(quant("W4A16_g128_asym")).items() if not name.endswith(lost)}
    with pytest.raises(CoverError, match=rf"{MODULE}\.{lost}"):
        plan(source(BASE, tensors), [LayerSpec(MODULE, "linear", 64, 256)], device="cpu", complete=True)


def test_vllm_47445_16_bit_tensor_where_codes_are_needed() -> None:
    """Shapes match and the dtype does not: refused, where a copy would have cast."""
    tensors = stored(quant("W4A16_g128_asym"))
    tensors[f"{MODULE}.qweight"] = tensors[f"{MODULE}.qweight"].to(torch.bfloat16)
    with pytest.raises(CoverError, match="qweight is BF16 where awq_gemm has I32"):
        plan(source(BASE, tensors), [LayerSpec(MODULE, "linear", 64, 256)], device="cpu", complete=True)


def test_activation_scale_that_no_config_explains_is_refused() -> None:
    tensors = {**stored(quant("W4A16_g128_asym")), f"{MODULE}.input_scale": torch.tensor(0.1)}
    with pytest.raises(CoverError, match="input_scale"):
        plan(source(BASE, tensors), [LayerSpec(MODULE, "linear", 64, 256)], device="cpu", complete=True)


def test_scaled_activation_is_refused() -> None:
    """AutoAWQ divides the output of GELU in mpt, falcon, bloom and others; leaving that out gives garbage."""
    tensors = {**stored(quant("W4A16_g128_asym")), "transformer.h.0.mlp.act.scales": torch.ones(256).half()}
    with pytest.raises(ConfigError, match=r"mlp\.act\.scales without a qweight"):
        parsed(BASE, tensors)


def test_lm_head_and_embeddings_stay_16_bit_unless_said() -> None:
    assert rule(BASE, "lm_head") is None
    assert rule({**BASE, "lm_head": True}, "lm_head") is not None
    assert rule(BASE, "lm_head", stored(quant("W4A16_g128_asym"), "lm_head")) == quant("W4A16_g128_asym")
    found = parsed(BASE)
    assert found.quant_for(ModuleName(("model.embed_tokens",), "Embedding")) is None
    assert found.stale() == [found.rules[-1]]


def test_dynamic_rules_first_match_wins() -> None:
    config = {
        **BASE,
        "dynamic": {r"-:.*layers\.0\.": {}, r"+:.*up_proj": {"group_size": 32, "sym": True}, ".*o_proj": {"bits": 8}},
    }
    assert rule(config) is None
    assert rule(config, "model.layers.1.mlp.up_proj") == quant("W4A16_g32")
    assert rule(config, "model.layers.1.self_attn.o_proj") == quant("W8A16_g128_asym")
    assert rule(config, "model.layers.1.mlp.down_proj") == quant("W4A16_g128_asym")


def test_w4a8_awq_of_tensorrt_llm() -> None:
    """A8 is FP8 there; the scale is static where the file has it."""
    config = {**BASE, "quant_algo": "W4A8_AWQ", "has_zero_point": True, "exclude_modules": ["*.down_proj", "lm_head"]}
    assert rule(config) == quant("W4Afp8_g128_asym_static")
    assert rule(config, "model.layers.0.mlp.down_proj") is None
    assert rule(config, tensors=stored(quant("W4Afp8_g128_asym_static"))) == quant("W4Afp8_g128_asym_static")
    assert rule(config, tensors=stored(quant("W4A16_g128_asym"))) == quant("W4Afp8_g128_asym")
    assert rule({**BASE, "quant_algo": "W4A16_AWQ"}) == quant("W4A16_g128_asym")
    with_scale = rule({**config, "pre_quant_scale": True})
    assert with_scale == quant("W4Afp8_g128_asym_static", pre_quant_scale=True)


def test_pre_quant_scale_is_seen_in_the_headers() -> None:
    tensors = {**stored(quant("W4A16_g128_asym")), f"{MODULE}.pre_quant_scale": torch.ones(256)}
    found = rule(BASE, tensors=tensors)
    assert found == quant("W4A16_g128_asym", pre_quant_scale=True)
    plan(source(BASE, tensors), [LayerSpec(MODULE, "linear", 64, 256)], device="cpu", complete=True)


@pytest.mark.parametrize(
    ("words", "scheme"),
    [
        ({"act_bits": 8}, "W4A8_g128_asym"),
        (
            {"act_bits": 8, "act_data_type": "int", "act_dynamic": True, "act_group_size": -1, "act_sym": True},
            "W4A8_g128_asym",
        ),
        ({"act_bits": 8, "act_data_type": "fp"}, "W4Afp8_g128_asym"),
        ({"act_bits": 8, "act_data_type": "fp8", "act_dynamic": False}, "W4Afp8_g128_asym_static"),
        ({"act_bits": 8, "act_dynamic": False, "act_group_size": 0}, "W4A8_g128_asym_static"),
        ({"act_bits": 16}, "W4A16_g128_asym"),
    ],
)
def test_activations_in_the_words_of_auto_round(words: dict[str, Any], scheme: str) -> None:
    assert rule({**BASE, **words}) == quant(scheme)


def test_scales_of_a_kv_cache() -> None:
    config = parsed({**BASE, "kv_cache_quant_algo": "FP8"})
    assert config.kv is not None
    assert config.kv.dtype == "fp8_e4m3"
    scales = {
        "k_scale": "model.layers.0.self_attn.k_scale",
        "v_scale": "model.layers.0.self_attn.v_proj.v_scale",
    }
    tensors = {**stored(quant("W4A16_g128_asym")), **{name: torch.tensor(0.5) for name in scales.values()}}
    layers = [LayerSpec(MODULE, "linear", 64, 256), LayerSpec("model.layers.0.self_attn", "kv_cache", 64, 64)]
    made = plan(source({**BASE, "kv_cache_quant_algo": "FP8"}, tensors), layers, device="cpu", complete=True)
    assert made.caches[0].scales == scales
    with pytest.raises(CoverError, match="k_scale"):
        plan(source(BASE, tensors), layers, device="cpu", complete=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 3}, "bits: 3"),
        ({"bits": True}, "bits: True"),
        ({"bits": "4"}, "bits: '4'"),
        ({"group_size": 0}, "group_size: 0"),
        ({"zero_point": "yes"}, "zero_point: 'yes'"),
        ({"w_bit": 8}, "bits: 4 and w_bit: 8"),
        ({"q_group_size": 64}, "group_size: 128 and q_group_size: 64"),
        ({"format": "gemv"}, "contradict"),
        ({"version": "gemx"}, "'gemx'"),
        ({"version": "marlin"}, "has none"),
        ({"quant_method": "gptq"}, "'gptq'"),
        ({"desc_act": True}, "desc_act"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        ({"modules_to_not_convert": [""]}, "modules_to_not_convert"),
        ({"exclude_modules": [1]}, "exclude_modules"),
        ({"modules_to_convert": ["x"]}, "'modules_to_convert'"),
        ({"rotation": "hadamard"}, "rotation"),
        ({"surprise": 1}, "'surprise'"),
        ({"dynamic": {".*": {"surprise": 1}}}, "'surprise'"),
        ({"dynamic": {".*": {"act_bits": 8}}}, "act_bits"),
        ({"dynamic": {"+:(": {}}}, "regular expression"),
        ({"dynamic": ["x"]}, "dynamic"),
        ({"extra_config": {"x": 4}}, "extra_config"),
        ({"quant_algo": "W4A8_QSERVE_PER_GROUP"}, "quant_algo"),
        ({"quant_algo": "W4A8_AWQ", "act_bits": 8}, "the same thing twice"),
        ({"quant_algo": "W4A16_AWQ", "act_bits": 8}, "contradict"),
        ({"act_bits": 4}, "act_bits: 4"),
        ({"act_bits": 8, "act_sym": False}, "act_sym"),
        ({"act_bits": 8, "act_group_size": 128}, "act_group_size: 128"),
        ({"act_bits": 8, "act_data_type": "mx_fp"}, "'mx_fp'"),
        ({"bits": 8, "act_bits": 8}, "8 bits are stored as gemm"),
        ({"kv_cache_quant_algo": "NVFP4"}, "kv_cache_quant_algo"),
    ],
)
def test_config_that_is_not_understood_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parsed({**BASE, **change})


def test_no_config_at_all() -> None:
    with pytest.raises(ConfigError, match=r"quant_config\.json"):
        FORMAT.parse(Source(Path("memory"), {}, None, "", {}, {}, {}))


@pytest.mark.parametrize("name", ["quant_config.json", "quantize_config.json", "quantization_config.json"])
def test_two_files_that_disagree_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"group_size: 128 and {name} says 64"):
        FORMAT.parse(source(BASE, **{name: {"w_bit": 4, "q_group_size": 64, "version": "GEMM"}}))
    same = {"w_bit": 4, "q_group_size": 128, "version": "GEMM", "zero_point": True}
    assert FORMAT.parse(source(BASE, **{name: same})).quant_for(ModuleName((MODULE,))) == quant("W4A16_g128_asym")


def test_fused_on_disk_and_expert_stacks_are_planned() -> None:
    tensors = stored(quant("W4A16_g128_asym"), "model.layers.0.self_attn.qkv_proj", n=128)
    layers = [LayerSpec("model.layers.0.self_attn.qkv_proj", "linear", 128, 256)]
    made = plan(source(BASE, tensors), layers, [PlainSlot("x", ("x",), (1,), optional=True)], device="cpu")
    assert str(made.decisions[0].segments[0].scheme) == "W4A16_g128_asym"


@pytest.mark.parametrize("layout", ["awq_gemm", "awq_gemv", "awq_gemv_fast"])
def test_written_config_says_every_layer(layout: str) -> None:
    layers = {
        "a.q_proj": quant("W4A16_g128_asym", layout),
        "a.k_proj": quant("W4A16_g128_asym", layout),
        "a.v_proj": quant("W4A16_g32", layout),
        "a.o_proj": None,
        "lm_head": quant("W4A16_channel_asym", layout),
    }
    config = FORMAT.quantization_config(layers)
    assert config["version"] == layout[4:]
    assert config["modules_to_not_convert"] == ["a.o_proj"]
    found = parsed(config)
    assert {name: found.quant_for(ModuleName((name,))) for name in layers} == layers


def test_config_that_cannot_be_written() -> None:
    one = quant("W4A16_g128")
    with pytest.raises(CannotEncode, match="one version"):
        FORMAT.quantization_config({"a": one, "b": quant("W4A16_g128", "awq_gemv")})
    with pytest.raises(CannotEncode, match="different activations"):
        FORMAT.quantization_config({"a": one, "b": quant("W4A8_g128")})
    with pytest.raises(CannotEncode, match="no layer is quantized"):
        FORMAT.quantization_config({"a": None})
