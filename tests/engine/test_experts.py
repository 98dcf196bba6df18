"""Experts of every layout in transformers: stacked, transposed, interleaved, with biases, sorted tokens."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import qplug_core
from qplug_core.cli import main

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_shared_experts": 1, "num_key_value_heads": 4,
}  # fmt: skip
KINDS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1, "moe_layers": None},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_intermediate_size": 32, "moe_k": 2, "moe_layer_start_index": 1},
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


SCHEMES = (
    "W4A16_g32", "W4A16_g32_asym", "W8A16", "W8A16_g32_asym", "Wfp8Afp8_tensor_a:tensor", "Wfp8Afp8", "Wfp8Afp8_b128x128", "W8A8",
    "Wnvfp4Anvfp4", "Wmxfp4A16", "W4A8_g32", "W4Afp8_g32", "mix_quant",
)  # fmt: skip
"""What the engines run on experts: GPTQ and AWQ numerics of 4 and 8 bits, FP8 by tensor, channel and block, INT8, NVFP4, MXFP4, W4A8."""


@torch.inference_mode()
def run(made):
    return made(input_ids=IDS).logits


def dequantized(engine, state):
    """``state`` with the numbers that the engine's weights stand for; and the same with each expert in the place of the next."""
    state = {name: value.clone() for name, value in state.items()}
    swapped = dict(state)
    experts: dict[str, list[torch.Tensor]] = {}
    for name, method in engine.methods.items():
        weight = torch.cat([packed.meta["weight"].dequantize() for packed in method.packed])
        if method.decision.layer.op == "experts":
            parent, _, projection = name.rpartition(".")
            experts.setdefault(f"{parent.rpartition('.')[0]}.{projection}", []).append(weight)
        else:
            state[f"{name}.weight"] = swapped[f"{name}.weight"] = weight
    assert experts
    for name, weights in experts.items():
        stacked = torch.stack(weights)
        if stacked.shape != state[name].shape or distance(stacked, state[name]) > 0.5:
            stacked = stacked.transpose(1, 2)
        state[name], swapped[name] = stacked.contiguous(), stacked.roll(1, 0).contiguous()
    return state, swapped


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_experts_equal_dequantized_ones(model, scheme):
    """The same weights, dequantized and put back into the model of transformers, give the same logits; wrong experts do not."""
    folder, made = model
    plain = {name: value.clone() for name, value in made.state_dict().items()}
    engine = qplug_core.load(folder, dtype="float32", quantize=scheme, kernels="reference", activations="16bit")
    right, wrong = dequantized(engine, plain)
    logits = engine.logits(IDS)
    made.load_state_dict(right)
    assert distance(logits, run(made)) < 2e-6
    made.load_state_dict(wrong)
    assert distance(logits, run(made)) > 1e-2
    made.load_state_dict(plain)
    assert distance(logits, run(made)) > 1e-3
    schemes = {str(d.segments[0].scheme.weight.dtype) for d in engine.plan.decisions if d.layer.op == "experts"}
    assert len(schemes) == 1


@pytest.mark.parametrize("scheme", ["W8A8", "Wfp8Afp8", "Wnvfp4Anvfp4", "W4Afp8_g32"])
def test_activations_of_experts_are_quantized(model, scheme):
    folder, _ = model
    options = {"dtype": "float32", "quantize": f"experts={scheme}", "kernels": "reference"}
    engine, sixteen = (qplug_core.load(folder, activations=a, **options) for a in ("quantized", "16bit"))
    calls = [m for m in engine.methods.values() if m.decision.layer.op == "experts"]
    assert len(calls) == len(engine.methods) > 0
    assert 1e-4 < distance(engine.logits(IDS), sixteen.logits(IDS)) < 0.7


def test_routers_are_left_alone_and_everything_else_is_not(model):
    """Shared experts, MLA projections and dense first layers are linear layers; a router is none, whatever its class."""
    folder, made = model
    engine = qplug_core.load(folder, quantize="W8A16")
    quantized = {d.layer.name for d in engine.plan.decisions if d.quantized}
    assert not [n for n in quantized if n.endswith((".gate", ".router"))]
    assert [n for n, _ in made.named_modules() if n.endswith((".gate", ".router"))]
    linear = {
        n for n, m in made.named_modules() if type(m) is torch.nn.Linear and not n.endswith(("lm_head", ".gate", ".router"))
    }
    assert linear <= quantized
    kind = made.config.model_type
    if kind == "deepseek_v3":
        assert {
            f"model.layers.0.self_attn.{p}" for p in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
        } <= quantized
        assert "model.layers.0.mlp.gate_proj" in quantized
    if kind in ("deepseek_v3", "ernie4_5_moe"):
        assert "model.layers.1.mlp.shared_experts.down_proj" in quantized
    if kind == "llama4_text":
        assert "model.layers.0.feed_forward.shared_expert.down_proj" in quantized


@pytest.mark.parametrize("scheme", ["W8A16", "Wfp8Afp8_b128x128"])
def test_only_the_experts_that_a_batch_selects_are_touched(model, scheme):
    """Counted where a product is made; Llama 4 alone runs every expert on zeros, as transformers' model sorts tokens itself."""
    folder, made = model
    engine = qplug_core.load(folder, dtype="float32", quantize=scheme, kernels="reference")
    calls = set()
    for name, method in engine.methods.items():
        if method.decision.layer.op == "experts":
            original = method.apply
            method.apply = lambda x, bias=None, name=name, original=original: (calls.add(name), original(x, bias))[1]
    engine.logits(torch.tensor([[5]]))
    text = engine.model.config
    chosen = getattr(text, "num_experts_per_tok", None) or text.moe_k
    count = 4 if made.config.model_type == "llama4_text" else chosen
    layers = {name.split(".experts.")[0] for name in engine.methods if ".experts." in name}
    for layer in layers:
        touched = {name.split(".experts.")[1].split(".")[0] for name in calls if name.startswith(f"{layer}.")}
        assert len(touched) == count


def test_experts_stay_packed(model):
    """Bytes that the engine holds of experts: a quarter of 16 bit and their scales."""
    folder, _ = model
    engine = qplug_core.load(folder, quantize="experts=W4A16_g32")
    held = sum(m.nbytes for m in engine.methods.values())
    numbers = sum(m.decision.layer.n * m.decision.layer.k for m in engine.methods.values())
    assert numbers / 2 <= held <= numbers / 2 * 1.3
    assert not [n for n, p in engine.model.named_parameters() if p.ndim == 3]


@pytest.mark.parametrize("layout", ["one by one", "stacked"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3", "ernie4_5_moe"])
def test_both_layouts_on_disk(tmp_path, kind, layout):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind]}), dtype=torch.float32
    ).eval()
    made.save_pretrained(tmp_path)
    tensors = {name: value.clone() for name, value in made.state_dict().items()}
    if layout == "one by one":
        for name in [n for n in tensors if n.endswith((".gate_up_proj", "experts.down_proj"))]:
            place, _, leaf = name.rpartition(".")
            for e, one in enumerate(tensors.pop(name)):
                parts = (
                    dict(zip(("gate_proj", "up_proj"), one.chunk(2), strict=True)) if leaf == "gate_up_proj" else {leaf: one}
                )
                tensors |= {f"{place}.{e}.{part}.weight": value.contiguous() for part, value in parts.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert distance(qplug_core.load(tmp_path, dtype="float32").logits(IDS), run(made)) < 1e-6
    # Rows and columns of a stack are cut before they are quantized, so both layouts give the same weights, by channel.
    engine = qplug_core.load(tmp_path, dtype="float32", quantize="W8A16", kernels="reference")
    right, _ = dequantized(engine, made.state_dict())
    made.load_state_dict(right)
    assert distance(engine.logits(IDS), run(made)) < 2e-6


STORED = [
    ("W4A16_g32", "gptq"), ("W8A16_g32", "gptq"), ("W4A16_g32_asym", "awq"), ("W8A16", "compressed_tensors"), ("W8A8", "int8"),
    ("Wfp8Afp8", "compressed_tensors"), ("Wfp8Afp8_tensor_a:tensor", "compressed_tensors"), ("Wfp8Afp8_b32x32", None),
    ("Wnvfp4Anvfp4", "modelopt"), ("Wmxfp4A16", "compressed_tensors"), ("W4Afp8_g32", "compressed_tensors"), ("W4A8_g32", None),
    ("mix_quant", None),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "written"), STORED)
def test_experts_from_a_quantized_checkpoint(model, tmp_path, scheme, written):
    """Written and loaded again, the experts are those of quantization at load, bit for bit."""
    folder, _ = model
    done = qplug_core.quantize(folder, tmp_path / "out", scheme=scheme, format=written)
    assert written in (None, done.format)
    if model[1].config.model_type == "gpt_oss" and scheme == "Wfp8Afp8_b32x32":
        assert any("each was quantized alone" in note for note in done.notes)
        return
    assert not any("alone" in note for note in done.notes)
    online = qplug_core.load(folder, dtype="float32", quantize=scheme, kernels="reference").logits(IDS)
    assert torch.equal(qplug_core.load(tmp_path / "out", dtype="float32", kernels="reference").logits(IDS), online)


def test_experts_of_an_unknown_layout_are_said(tmp_path):
    """JetMoe's are two stacks of its own: they stay at 16 bit, and a row and a note of the plan say so."""
    config = AutoConfig.for_model(
        "jetmoe", vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_key_value_heads=2, kv_channels=16,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    made.save_pretrained(tmp_path)
    engine = qplug_core.load(tmp_path, dtype="float32", quantize="W8A16", kernels="reference")
    notes = [note for note in engine.plan.all_notes() if "layout that is not known" in note]
    assert len(notes) == 1
    assert "experts" in notes[0]
    rows = {name for name, count, _ in engine.plan.kept_rows()}
    assert {"model.layers.*.mlp.input_linear.weight", "model.layers.*.mlp.output_linear.weight"} <= rows
    assert "mlp.input_linear.weight" in engine.plan.report()
    assert engine.plan.to_json()["kept"]
    assert not list(qplug_core.load(tmp_path, dtype="float32").plan.all_notes()), "nothing was asked for"
    printed = CliRunner().invoke(main, ["explain", str(tmp_path), "--quantize", "W8A16"]).output
    assert "model.layers.*.mlp.input_linear.weight" in printed
    assert "layout that is not known" in " ".join(printed.split())


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
