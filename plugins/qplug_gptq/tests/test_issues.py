"""What users of other engines reported of GPTQ checkpoints: here each is read right or refused with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_gptq.loader import GPTQFormat
from safetensors.torch import save_file

from qplug_core.config import LayerQuant, ModuleName
from qplug_core.errors import CoverError
from qplug_core.layer import LayerSpec, StoredPart
from qplug_core.method import decode_part
from qplug_core.planner import plan
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source
from qplug_core.testing import random_weight

FORMAT = GPTQFormat()
MODULE = "model.layers.0.mlp.up_proj"
BASE: dict[str, Any] = {
    "bits": 4, "group_size": 32, "quant_method": "gptq", "sym": True, "desc_act": False, "checkpoint_format": "gptq",
}  # fmt: skip


def source(config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Source:
    infos = MemorySource(tensors or {}).tensors
    return Source(Path("memory"), {"quantization_config": config}, config, "config.json", {}, infos, {})


def rule(config: dict[str, Any], name: str = MODULE, tensors: dict[str, torch.Tensor] | None = None) -> LayerQuant | None:
    return FORMAT.parse(source(config, tensors)).quant_for(ModuleName((name,)))


def stored(module: str, scheme: str, n: int = 32, k: int = 64, layout: str = "gptq", **opts: Any) -> dict[str, torch.Tensor]:
    weight = random_weight(QuantScheme.parse(scheme), n, k, torch.Generator().manual_seed(n + k), scale_dtype=torch.float16)
    meant = LayerQuant(weight.scheme, layout, tuple(opts.items()))
    return {f"{module}.{name}": tensor for name, tensor in FORMAT.encode(weight, meant).items()}


def linear(name: str, n: int = 32, k: int = 64) -> LayerSpec:
    return LayerSpec(name, "linear", n, k)


@pytest.mark.parametrize(
    "scheme", ["W2A16_g32", "W2A16_g32_asym", "W3A16_g32", "W3A16_g32_asym", "W4A16_g32_asym", "W8A16_g32_asym"]
)
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_vllm_45051_bits_and_zero_points_that_vllm_dropped(scheme: str, layout: str) -> None:
    meant = QuantScheme.parse(scheme)
    assert meant.weight is not None
    weight = random_weight(meant, 32, 64, zeros=None if meant.weight.symmetric else (1, 3))
    tensors = FORMAT.encode(weight, LayerQuant(meant, layout))
    config = {**BASE, "bits": meant.weight.bits, "sym": meant.weight.symmetric, "checkpoint_format": layout}
    found = rule(config, tensors={f"{MODULE}.{name}": tensor for name, tensor in tensors.items()})
    assert found is not None
    assert FORMAT.decode(tensors, found, 32, 64).equal(weight)


@pytest.mark.parametrize("name", ["checkpoint_format", "format"])
def test_gptqmodel_2824_v2_is_a_layout_like_any_other(name: str) -> None:
    found = rule({**{k: v for k, v in BASE.items() if k != "checkpoint_format"}, name: "gptq_v2"})
    assert found is not None
    assert found.layout == "gptq_v2"


def test_algorithm_gptaq_is_not_the_layout_v2() -> None:
    """``v2: true`` names the algorithm GPTAQ, which finds other codes and stores them as any other."""
    found = rule({**BASE, "v2": True, "v2_alpha": 0.25})
    assert found is not None
    assert found.layout == "gptq"


def test_gptqmodel_1439_zero_points_of_two_bits_are_sixteen_to_a_word() -> None:
    """Qwen-MoE with 2 bits: zeros had another shape than the loader expected."""
    tensors = stored("model.layers.0.mlp.experts.3.up_proj", "W2A16_g32", 48, 64)
    qzeros = tensors["model.layers.0.mlp.experts.3.up_proj.qzeros"]
    assert qzeros.shape == (2, 3)
    found = rule({**BASE, "bits": 2}, "model.layers.0.mlp.experts.3.up_proj", tensors)
    assert found is not None
    declared = {t.name: t for t in FORMAT.tensors(found)}["qzeros"]
    assert declared.match(tuple(qzeros.shape), {"N": 48, "K": 64}) is not None


@pytest.mark.parametrize("place", ["config.json", "quantize_config.json"])
def test_gptqmodel_1080_either_file_is_enough(tmp_path: Path, place: str) -> None:
    """One producer writes config.json only, older ones quantize_config.json only, without a quant_method."""
    method = {"quant_method": "gptq"} if place == "config.json" else {}
    config = {"bits": 4, "group_size": 32, **method}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config} if method else {}))
    if not method:
        (tmp_path / place).write_text(json.dumps(config))
    save_file(stored(MODULE, "W4A16_g32"), tmp_path / "model.safetensors")
    found = plan(Source.open(tmp_path), [linear(MODULE)])
    assert str(found.decisions[0].segments[0].quant.scheme) == "W4A16_g32_asym"  # type: ignore[union-attr]
    said = " ".join(found.notes)
    assert all(word in said for word in ("sym is not said", "desc_act is not said", "checkpoint_format is not said"))


def test_gptqmodel_1455_and_vllm_19395_dynamic_rules_reach_experts() -> None:
    config = {**BASE, "dynamic": {r"+:.*experts\.\d+\.down_proj": {"bits": 8}, r"-:.*shared_expert\.": {}}}
    experts = "model.layers.0.mlp.experts"
    found = rule(config, f"{experts}.17.down_proj")
    assert found is not None
    assert str(found.scheme) == "W8A16_g32"
    assert rule(config, "model.layers.0.mlp.shared_expert.down_proj") is None


def test_gptqmodel_1485_rule_for_one_part_of_a_fused_layer() -> None:
    """A rule for q_proj never matched vLLM's qkv_proj; here parts decide by their stored names and run as separate weights."""
    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    tensors = {**stored(names[0], "W8A16_g32"), **stored(names[1], "W4A16_g32"), **stored(names[2], "W4A16_g32")}
    layer = LayerSpec(
        "model.layers.0.self_attn.qkv_proj", "linear", 96, 64, stored=(tuple(StoredPart(name, 32) for name in names),)
    )
    found = plan(source({**BASE, "dynamic": {"+:.*q_proj": {"bits": 8}}}, tensors), [layer], complete=True)
    segments = found.decisions[0].segments
    assert [len(segment.parts) for segment in segments] == [1, 2]
    assert [str(segment.quant.scheme) for segment in segments if segment.quant] == ["W8A16_g32", "W4A16_g32"]


def test_vllm_17862_zero_points_that_are_not_packed_are_refused() -> None:
    """A file with one float16 zero point for each scale: no GPTQ layout has them."""
    tensors = stored(MODULE, "W4A16_g32")
    tensors[f"{MODULE}.qzeros"] = torch.full((2, 32), 8.0, dtype=torch.float16)
    with pytest.raises(CoverError, match=r"qzeros is F16 where gptq has I32"):
        plan(source(BASE, tensors), [linear(MODULE)], complete=True)


def test_vllm_25455_allow_list_that_leaves_out_packed_layers() -> None:
    """auto-round's GPTQ export left attention out of modules_in_block_to_quantize: the file holds it packed."""
    attention = "model.layers.0.self_attn.q_proj"
    tensors = {**stored(MODULE, "W4A16_g32"), **stored(attention, "W4A16_g32")}
    config = {**BASE, "modules_in_block_to_quantize": [["mlp.up_proj"]]}
    found = plan(source(config, tensors), [linear(MODULE), linear(attention)], complete=True)
    assert all(decision.quantized for decision in found.decisions)
    assert any("leaves out self_attn.q_proj" in note for note in found.notes)
    assert rule(config, attention) is None


def test_vllm_11790_rule_that_means_no_module_is_reported() -> None:
    """A prefix that the model does not have broke ignore lists silently."""
    tensors = stored(MODULE, "W4A16_g32")
    config = {**BASE, "modules_to_not_convert": ["visual."], "dynamic": {"-:language_model.layers": {}}}
    found = plan(source(config, tensors), [linear(MODULE)])
    said = " ".join(found.notes)
    assert "visual. (substring)" in said
    assert "language_model.layers (regex)" in said


@pytest.mark.parametrize(
    ("entry", "skipped", "kept"), [("gate", "mlp.gate", "mlp.gate_proj"), ("layers.1", "layers.1.up", "layers.10.up")]
)
def test_substring_rules_do_not_swallow_packed_layers(entry: str, skipped: str, kept: str) -> None:
    """vLLM matches modules_to_not_convert anywhere in a name: gate in gate_proj, layers.1 in layers.10."""
    config = {**BASE, "modules_to_not_convert": [entry]}
    tensors = stored(f"model.{kept}", "W4A16_g32")
    assert rule(config, f"model.{skipped}", tensors) is None
    assert rule(config, f"model.{kept}", tensors) is not None
    assert rule(config, f"model.{kept}") is None


def test_rtp_reads_no_g_idx_and_gets_desc_act_wrong() -> None:
    """An act-order file whose config says desc_act false: the order is in the file, and is obeyed."""
    weight = random_weight(QuantScheme.parse("W4A16_g32_actorder"), 32, 64, torch.Generator().manual_seed(5))
    tensors = FORMAT.encode(weight, LayerQuant(weight.scheme, "gptq"))
    found = rule(BASE)
    assert found is not None
    assert torch.equal(FORMAT.decode(tensors, found, 32, 64).dequantize(), weight.dequantize())


@pytest.mark.parametrize("desc_act", [True, False])
def test_rtp_group_size_minus_one(desc_act: bool) -> None:
    """One group for the row: RTP-LLM finds no loader for it. Act order changes nothing there."""
    found = rule({**BASE, "group_size": -1, "desc_act": desc_act}, tensors=stored(MODULE, "W4A16_channel"))
    assert found is not None
    assert str(found.scheme) == "W4A16_channel"


@pytest.mark.parametrize("indexed_first", [True, False])
def test_layers_with_and_without_g_idx_in_one_file(indexed_first: bool) -> None:
    """Each is read by what is stored for it, and every cut is the cut of the whole."""
    ordered = random_weight(QuantScheme.parse("W4A16_g32_actorder"), 32, 128, torch.Generator().manual_seed(6))
    plain = random_weight(QuantScheme.parse("W4A16_g32"), 32, 128, torch.Generator().manual_seed(7))
    other = "model.layers.0.mlp.gate_proj"
    names = (MODULE, other) if indexed_first else (other, MODULE)
    tensors = {f"{names[0]}.{k}": t for k, t in FORMAT.encode(ordered, LayerQuant(ordered.scheme, "gptq")).items()}
    bare = LayerQuant(plain.scheme, "gptq", (("g_idx", False),))
    tensors |= {f"{names[1]}.{k}": t for k, t in FORMAT.encode(plain, bare).items()}
    found = plan(source(BASE, tensors), [linear(name, 32, 128) for name in names], complete=True)
    assert any("g_idx is stored for 1 of 2 layers" in note for note in found.notes)
    for name, weight in zip(names, (ordered, plain), strict=True):
        quant = next(d.segments[0].quant for d in found.decisions if d.layer.name == name)
        assert quant is not None
        for n0, n1, k0, k1 in [(0, 32, 0, 128), (8, 16, 32, 64), (3, 29, 40, 101)]:
            layer = LayerSpec(name, "linear", n1 - n0, 128, columns=(k0, k1))
            cut = decode_part(MemorySource(tensors), FORMAT, quant, layer, StoredPart(name, n1 - n0, (n0, n1), 32))
            assert torch.equal(cut.dequantize(), weight.dequantize()[n0:n1, k0:k1])


def test_tensorrt_llm_3548_checkpoint_of_autogptq_in_its_oldest_form() -> None:
    """w_bit and q_group_size, no g_idx, no version: TensorRT-LLM failed with "expected Tensor ... got int"."""
    tensors = stored(MODULE, "W4A16_g32", g_idx=False)
    found = plan(source({"w_bit": 4, "q_group_size": 32, "quant_method": "gptq"}, tensors), [linear(MODULE)], complete=True)
    quant = found.decisions[0].segments[0].quant
    assert quant is not None
    assert str(quant.scheme) == "W4A16_g32_asym"
    assert any("no g_idx tensors" in note for note in found.notes)


def test_half_of_a_layer_is_refused() -> None:
    """A missing scale must not become 16 bit or ones (vLLM PR 47445 loaded what fitted by shape)."""
    tensors = stored(MODULE, "W4A16_g32")
    del tensors[f"{MODULE}.scales"]
    with pytest.raises(CoverError, match=r"up_proj\.scales"):
        plan(source(BASE, tensors), [linear(MODULE)], complete=True)
