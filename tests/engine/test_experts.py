"""Experts of every layout in transformers: stacked, transposed, interleaved, with biases, sorted tokens."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import qplug_core

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 4, "moe_intermediate_size": 24, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_shared_experts": 1, "num_key_value_heads": 4,
}  # fmt: skip
KINDS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1, "moe_layers": None},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_intermediate_size": 24, "moe_k": 2, "moe_layer_start_index": 1},
    "deepseek_v3": DEEPSEEK,
}


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **{**SIZES, **KINDS[request.param]})
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    made.save_pretrained(folder)
    return folder, made


IDS = torch.arange(3, 21).view(2, 9)


def distance(a, b):
    return float((a - b).norm() / b.norm())


def test_plain_experts_are_the_models_own(model):
    folder, made = model
    assert distance(qplug_core.load(folder, dtype="float32").logits(IDS), made(input_ids=IDS).logits) < 1e-6


def test_quantized_experts_equal_dequantized_ones(model):
    """The same weights, dequantized and put back into the model of transformers, give the same logits."""
    folder, made = model
    engine = qplug_core.load(folder, dtype="float32", quantize="W8A16", kernels="reference")
    state = {name: value.clone() for name, value in made.state_dict().items()}
    swapped = {name: value.clone() for name, value in made.state_dict().items()}
    experts: dict[str, list[torch.Tensor]] = {}
    for name, method in engine.methods.items():
        weight = method.packed[0].meta["weight"].dequantize()
        if method.decision.layer.op == "experts":
            parent, _, projection = name.rpartition(".")
            experts.setdefault(f"{parent.rpartition('.')[0]}.{projection}", []).append(weight)
        else:
            state[f"{name}.weight"] = swapped[f"{name}.weight"] = weight
    for name, weights in experts.items():
        stacked = torch.stack(weights)
        if stacked.shape != state[name].shape or distance(stacked, state[name]) > 0.1:
            stacked = stacked.transpose(1, 2)
        state[name], swapped[name] = stacked.contiguous(), stacked.flip(0).contiguous()
    assert experts
    logits = engine.logits(IDS)
    made.load_state_dict(state)
    assert distance(logits, made(input_ids=IDS).logits) < 1e-6
    made.load_state_dict(swapped)
    assert distance(logits, made(input_ids=IDS).logits) > 1e-3


def test_gpt_oss_experts_stored_one_by_one(tmp_path):
    """As llm-compressor stores them: gate and up apart, biases for each expert."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt_oss", **{**SIZES, **KINDS["gpt_oss"]})
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, value in made.named_parameters():
        if name.endswith("_bias"):
            value.data.normal_()
    made.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [n for n in tensors if ".experts." in n]:
        value = tensors.pop(name)
        parent, _, leaf = name.rpartition(".")
        tail = "bias" if leaf.endswith("_bias") else "weight"
        for e, one in enumerate(value):
            rows = one.t() if tail == "weight" else one
            if leaf.startswith("gate_up"):
                tensors[f"{parent}.{e}.gate_proj.{tail}"] = rows[0::2].contiguous()
                tensors[f"{parent}.{e}.up_proj.{tail}"] = rows[1::2].contiguous()
            else:
                tensors[f"{parent}.{e}.down_proj.{tail}"] = rows.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    assert distance(qplug_core.load(tmp_path, dtype="float32").logits(IDS), made(input_ids=IDS).logits) < 1e-6
