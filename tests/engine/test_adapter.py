"""LoRA adapters of PEFT over quantized layers: ``W_dequant x + scaling * B A x``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qplug_core
from qplug_core.errors import CheckpointError, UsageError

peft = pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import make_model  # noqa: E402

from qplug_core.engine.adapter import QuantLora, register, remove_adapter  # noqa: E402

IDS = torch.arange(40).view(2, 20) % 250
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "phi3": ["qkv_proj", "down_proj"], "mixtral": ["q_proj", "o_proj"]}
KINDS = {"llama": {}, "phi3": {"pad_token_id": 0}, "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2}}


def make_adapter(base, folder, targets, seed=0, **options):
    """An adapter with random B as PEFT writes it, made over the 16-bit model."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data.normal_(std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def dequantized(engine, base):
    """transformers' own model with the numbers that the engine's weights stand for."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for name, method in engine.methods.items():
        if method.decision.layer.op != "experts":
            model.get_submodule(name).weight.data = method.packed[0].meta["weight"].dequantize()
    return model


@torch.inference_mode()
def run(model):
    return model(input_ids=IDS).logits


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("scheme", ["linear=W4A16_g32_asym", "linear=W8A16", "linear=Wnvfp4A16"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_adds_to_the_dequantized_weight(tmp_path, kind, scheme):
    base = make_model(tmp_path / kind, kind, **KINDS[kind])
    folder = make_adapter(base, tmp_path / "adapter", TARGETS[kind])
    engine = qplug_core.load(base, dtype="float32", quantize=scheme, kernels="reference")
    without = engine.logits(IDS)
    expected = run(peft.PeftModel.from_pretrained(dequantized(engine, base), folder))
    layers = engine.add_adapter(folder)
    assert len(layers) == 2 * len(TARGETS[kind])
    assert relative(engine.logits(IDS), expected) < 2e-6
    # An adapter that is ignored, or scaled by 1 instead of alpha / r.
    assert relative(without, expected) > 0.05
    for module in engine.model.modules():
        if isinstance(module, QuantLora):
            module.scaling["default"] = 1.0
    assert relative(engine.logits(IDS), expected) > 0.02


def test_adapters_are_switched_and_removed(llama, tmp_path):
    engine = qplug_core.load(llama, dtype="float32", quantize="W4A16_g32")
    plain = engine.logits(IDS)
    engine.add_adapter(make_adapter(llama, tmp_path / "a", ["q_proj", "down_proj"], 1), "a")
    first = engine.logits(IDS)
    engine.add_adapter(make_adapter(llama, tmp_path / "b", ["v_proj", "down_proj"], 2), "b")
    second = engine.logits(IDS)
    assert relative(first, plain) > 0.05
    assert relative(second, first) > 0.05
    engine.use_adapter("a")
    assert torch.equal(engine.logits(IDS), first)
    engine.use_adapter(None)
    assert torch.equal(engine.logits(IDS), plain)
    engine.use_adapter("b")
    assert torch.equal(engine.logits(IDS), second)
    with pytest.raises(UsageError, match="loaded are a, b"):
        engine.use_adapter("c")
    with pytest.raises(UsageError, match="already"):
        engine.add_adapter(tmp_path / "a", "a")
    for name in ("a", "b"):
        remove_adapter(engine.model, name)
    assert torch.equal(engine.logits(IDS), plain)
    assert not any(isinstance(m, QuantLora) for m in engine.model.modules())


def test_peft_over_the_engines_model(llama, tmp_path):
    """Training code that wraps ``engine.model`` itself, on kernels that torch differentiates: gradients reach A and B of all layers."""
    engine = qplug_core.load(llama, dtype="float32", quantize="W4A16_g32", kernels="reference")
    config = register(peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    model = peft.get_peft_model(engine.model, config)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in n for n in trained)
    model(input_ids=IDS, labels=IDS).loss.backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and float(p.grad.norm()) > 0}
    assert reached == {n for n in trained if "lora_B" in n}  # B starts as zeros, so A gets nothing in the first step.
    model.save_pretrained(tmp_path / "adapter")
    assert any("q_proj.lora_A" in n for n in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def test_generation_with_an_adapter(llama, tmp_path):
    engine = qplug_core.load(llama, quantize="W4A16_g32")
    before = engine.generate("hello", 12)
    engine.add_adapter(make_adapter(llama, tmp_path / "a", ["q_proj", "v_proj", "down_proj"]))
    assert engine.generate("hello", 12) != before


def test_reload_under_an_adapter(llama, tmp_path):
    """New base weights, the adapter stays: also under a layer that is not quantized."""
    folder = make_adapter(llama, tmp_path / "a", ["q_proj", "lm_head"])
    tensors = {n: t * 1.25 for n, t in load_file(llama / "model.safetensors").items()}
    changed = make_model(tmp_path / "changed")
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    engine, fresh = (qplug_core.load(p, dtype="float32", quantize="W8A16") for p in (llama, changed))
    for one in (engine, fresh):
        one.add_adapter(folder)
    before = engine.logits(IDS)
    engine.reload(qplug_core.load(changed, dtype="float32").source)
    assert torch.equal(engine.logits(IDS), fresh.logits(IDS))
    assert relative(before, fresh.logits(IDS)) > 0.05


def test_merging_is_refused(llama, tmp_path):
    engine = qplug_core.load(llama, quantize="W4A16_g32")
    engine.add_adapter(make_adapter(llama, tmp_path / "a", ["q_proj"]))
    layer = next(m for m in engine.model.modules() if isinstance(m, QuantLora))
    with pytest.raises(UsageError, match="16-bit checkpoint"):
        layer.merge()


def test_an_adapter_of_another_model_is_refused(llama, tmp_path):
    engine = qplug_core.load(llama, dtype="float32", quantize="W8A16")
    before = engine.logits(IDS)
    other = make_model(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="differ in"):
        engine.add_adapter(make_adapter(other, tmp_path / "deeper", ["q_proj"]))
    wide = make_model(tmp_path / "wide", hidden_size=128)
    with pytest.raises(CheckpointError, match="other shapes"):
        engine.add_adapter(make_adapter(wide, tmp_path / "wider", ["q_proj"]))
    phi = make_model(tmp_path / "phi", "phi3", pad_token_id=0)
    with pytest.raises(CheckpointError, match="qkv_proj"):
        engine.add_adapter(make_adapter(phi, tmp_path / "fused", ["qkv_proj"]))
    with pytest.raises(CheckpointError, match="adapter_config"):
        engine.add_adapter(tmp_path / "nowhere")
    assert torch.equal(engine.logits(IDS), before)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"target_parameters": ["experts.gate_up_proj"]}])
def test_what_is_no_plain_lora_is_refused(tmp_path, options):
    base = make_model(tmp_path / "mixtral", "mixtral", num_local_experts=4, num_experts_per_tok=2)
    folder = make_adapter(base, tmp_path / "a", ["q_proj"], **options)
    engine = qplug_core.load(base, quantize="W8A16")
    before = engine.logits(IDS)
    with pytest.raises(UsageError, match="LoRA adapter"):
        engine.add_adapter(folder)
    assert torch.equal(engine.logits(IDS), before)


def test_without_peft(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "qplug_core.engine.adapter", raising=False)
    with pytest.raises(UsageError, match="pip install peft"):
        qplug_core.load(llama, quantize="W8A16").add_adapter("anywhere")
