"""Architectures that keep their weights in a way of their own: each loads exactly, and quantizes every linear layer that it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import qplug_core
from qplug_core.errors import ConfigError, UsageError
from qplug_core.offline import quantize

SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2}
MOE: dict[str, Any] = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # Conv1D, [K, N]
    "gpt2": {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    # a linear layer with a forward in its own words
    "falcon": {**SMALL, "new_decoder_architecture": False},
    # fused queries, keys and values that are no rows of each
    "codegen": {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    # a weight that the model multiplies with and never calls
    "mamba": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    # infinity in config.json
    "mamba2": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    # a buffer that only the constructor computes
    "falcon_h1": {**SMALL, **MAMBA, "mamba_d_ssm": 64},
    # experts in two tensors with names of their own, linear attention beside attention
    "granitemoehybrid": {**SMALL, **MAMBA, **MOE, "shared_intermediate_size": 16, "layer_types": ["mamba", "attention"]},
    # a tensor of the model that is stored in three
    "kimi_linear": {**SMALL, **MOE, "layer_types": ["linear_attention", "full_attention"], "kv_lora_rank": 16, "q_lora_rank": 16,
                    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1, "n_group": 1,
                    "topk_group": 1, "n_routed_experts": 4, "n_shared_experts": 1},
}  # fmt: skip


@pytest.fixture(params=ARCHITECTURES)
def checkpoint(request, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[request.param](**ARCHITECTURES[request.param])).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.0)
    model.save_pretrained(tmp_path / "m")
    ids = torch.randint(3, 90, (2, 7))
    with torch.no_grad():
        return tmp_path / "m", model, ids, model(ids).logits


def far(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def test_every_linear_layer_is_quantized(checkpoint):
    folder, model, ids, wanted = checkpoint
    assert far(qplug_core.load(folder, dtype="float32").logits(ids), wanted) < 1e-6
    loaded = qplug_core.load(folder, dtype="float32", quantize="W8A16")
    assert 1e-5 < far(loaded.logits(ids), wanted) < 5e-2
    names = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    head = {name for name, m in model.named_modules() if m is model.get_output_embeddings()}
    quantized = {decision.layer.name for decision in loaded.plan.decisions if decision.quantized}
    assert names - head <= quantized


def test_a_written_checkpoint_is_what_online_quantization_gives(checkpoint, tmp_path):
    folder, _, ids, _ = checkpoint
    online = qplug_core.load(folder, dtype="float32", quantize="W4A16_g16")
    quantize(folder, tmp_path / "q", scheme="W4A16_g16")
    assert torch.equal(qplug_core.load(tmp_path / "q", dtype="float32").logits(ids), online.logits(ids))


@pytest.mark.parametrize("checkpoint", ["mamba"], indirect=True)
def test_a_weight_that_is_multiplied_with_cannot_have_quantized_activations(checkpoint):
    folder, _, ids, _ = checkpoint
    with pytest.raises(UsageError, match=r"dt_proj itself, and W8A8.*activations='16bit'"):
        qplug_core.load(folder, dtype="float32", quantize="W8A8").logits(ids)
    qplug_core.load(folder, dtype="float32", quantize="W8A8", activations="16bit").logits(ids)


@pytest.mark.parametrize("checkpoint", ["mamba2"], indirect=True)
def test_a_config_that_transformers_refuses_is_one_sentence(checkpoint):
    folder, *_ = checkpoint
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"time_step_limit": [', '"time_step_limit": ["one",'))
    with pytest.raises(ConfigError, match="time_step_limit"):
        qplug_core.load(folder)
