"""The reference engine, against transformers on dequantized weights."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import qplug_core
from qplug_core.errors import UsageError
from qplug_core.quantizer import RoundToNearest, online_scheme
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import DATA, make_model, measure_memory

IDS = torch.arange(40).view(2, 20) % 250
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
KINDS = {"llama": {}, "qwen2": {"tie_word_embeddings": True}, "phi3": {"pad_token_id": 0}, "mixtral": MOE}


def relative(a, b):
    return float((a - b).norm() / b.norm())


def hf_logits(folder, change=None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if change:
        change(model)
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_an_unquantized_checkpoint_is_transformers(tmp_path, kind):
    folder = make_model(tmp_path / kind, kind, **KINDS[kind])
    engine = qplug_core.load(folder, dtype="float32")
    assert relative(engine.logits(IDS), hf_logits(folder)) < 1e-6


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16_g32", "W4A16_g32_asym", "Wfp8A16", "Wnvfp4A16", "WNF4A16_g32"])
@pytest.mark.parametrize("kind", KINDS)
def test_online_is_a_dequantized_copy(tmp_path, kind, scheme):
    folder = make_model(tmp_path / kind, kind, **KINDS[kind])
    wanted = QuantScheme.parse(scheme)

    def through(weight):
        return RoundToNearest().quantize(weight, online_scheme(wanted, weight.shape[1])).dequantize()

    def change(model):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.data = through(module.weight.data)
            elif hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, torch.nn.Parameter):
                for e in range(module.gate_up_proj.shape[0]):
                    gate, up = module.gate_up_proj.data[e].chunk(2)
                    module.gate_up_proj.data[e] = torch.cat([through(gate), through(up)])
                    module.down_proj.data[e] = through(module.down_proj.data[e])

    expected = hf_logits(folder, change)
    reference = qplug_core.load(folder, dtype="float32", quantize=scheme, kernels="reference").logits(IDS)
    fast = qplug_core.load(folder, dtype="float32", quantize=scheme).logits(IDS)
    assert relative(reference, expected) < 2e-6
    assert relative(fast, expected) < 1e-5
    assert relative(hf_logits(folder), expected) > 1e-3


def test_activation_quantization_is_applied(llama):
    plain = qplug_core.load(llama, dtype="float32", quantize="W8A16").logits(IDS)
    quantized = qplug_core.load(llama, dtype="float32", quantize="W8A8").logits(IDS)
    assert 1e-4 < relative(quantized, plain) < 0.1


def test_fused_on_disk_and_split_in_the_model(llama, tmp_path):
    expected = qplug_core.load(llama, dtype="float32").logits(IDS)
    tensors = load_file(llama / "model.safetensors")
    for layer in (0, 1):
        for fused, parts in (("self_attn.qkv_proj", ("q", "k", "v")), ("mlp.gate_up_proj", ("gate", "up"))):
            place = f"model.layers.{layer}.{fused.split('.')[0]}"
            rows = [tensors.pop(f"{place}.{p}_proj.weight") for p in parts]
            tensors[f"model.layers.{layer}.{fused}.weight"] = torch.cat(rows)
    save_file(tensors, llama / "model.safetensors")
    assert torch.equal(qplug_core.load(llama, dtype="float32").logits(IDS), expected)


def test_shards_by_index(llama):
    import json

    expected = qplug_core.load(llama, dtype="float32").logits(IDS)
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, llama / file)
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(qplug_core.load(llama, dtype="float32").logits(IDS), expected)


def test_tied_weights_share_storage(tmp_path):
    folder = make_model(tmp_path / "tied", "llama", tie_word_embeddings=True)
    model = qplug_core.load(folder).model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_an_encoder_runs_its_own_forward(tmp_path):
    folder = tmp_path / "bert"
    torch.manual_seed(0)
    from transformers import BertConfig

    config = BertConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    AutoModel.from_config(config).save_pretrained(folder)
    engine = qplug_core.load(folder, dtype="float32", quantize="W8A16")
    ids = IDS % 99
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(folder)(ids).last_hidden_state
    difference = relative(engine.forward(input_ids=ids).last_hidden_state, expected)
    assert 1e-6 < difference < 0.02
    with pytest.raises(UsageError, match="does not generate"):
        engine.generate("x")


def test_generation(llama):
    engine = qplug_core.load(llama, quantize="W8A16")
    text = engine.generate("hello", 12)
    assert isinstance(text, str)
    assert "".join(engine.generate("hello", 12, stream=True)) == text
    batch = engine.generate(["hello", "a much longer prompt"], 12)
    assert batch == [text, engine.generate("a much longer prompt", 12)]
    stop = text[4:6]
    assert engine.generate("hello", 12, stop=[stop]) == text[: text.index(stop)]
    assert "".join(engine.generate("hello", 12, stop=[stop], stream=True)) == text[: text.index(stop)]


def test_sampling_is_repeatable_by_seed(llama):
    engine = qplug_core.load(llama)
    options = {"max_new_tokens": 16, "temperature": 1.5}
    first = engine.generate("x", seed=1, **options)
    assert engine.generate("x", seed=1, **options) == first
    assert any(engine.generate("x", seed=s, **options) != first for s in (2, 3, 4))


@pytest.mark.parametrize(
    "options", [{"prompt": ""}, {"prompt": "x", "temperature": -1.0}, {"prompt": ["x", "y"], "stream": True}]
)
def test_generate_refuses(llama, options):
    engine = qplug_core.load(llama)
    with pytest.raises(UsageError):
        engine.generate(**options)


def test_reload_keeps_addresses_and_changes_numbers(llama):
    engine = qplug_core.load(llama, dtype="float32", quantize="W8A16")
    before = engine.logits(IDS)
    places = {f"{n}.{k}": t.data_ptr() for n, m in engine.methods.items() for k, t in m.tensors().items()}
    tensors = load_file(llama / "model.safetensors")
    engine.reload(MemorySource({n: t * 1.5 if "down_proj" in n else t for n, t in tensors.items()}))
    after = engine.logits(IDS)
    assert relative(after, before) > 1e-2
    engine.reload(MemorySource(tensors))
    assert torch.equal(engine.logits(IDS), before)
    assert places == {f"{n}.{k}": t.data_ptr() for n, m in engine.methods.items() for k, t in m.tensors().items()}


def test_peak_memory_is_the_packed_model_and_one_layer(tmp_path):
    folder = make_model(tmp_path / "big", hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, head_dim=256)
    code = """
qplug_core.load(sys.argv[1], quantize='W8A16')
before = peak()
engine = qplug_core.load(sys.argv[2], quantize='W8A16')
print(peak() - before, engine.nbytes, sum(d.layer.n * d.layer.k for d in engine.plan.select('model.layers.0.*')))
"""
    growth, packed, elements = measure_memory(code, make_model(tmp_path / "small"), folder)
    stored = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    # Quantization works in float32.
    allowed = packed + 4 * elements
    assert growth < allowed, f"grew by {growth / 1e6:.0f} MB for {packed / 1e6:.0f} MB packed"
    assert allowed < stored + packed


def test_a_copy_of_the_plan_is_the_plan(llama):
    plan = qplug_core.load(llama, quantize="W8A16").plan
    assert copy.deepcopy(plan).digest == plan.digest
    assert plan.to_json()["schema"] == 1


def test_experts_are_packed_and_only_those_chosen_run():
    """NaN in the scales of an expert comes out if, and only if, a product with it is made."""
    engine = qplug_core.load(DATA / "mixtral-gptqmodel-w4-g32-sym", dtype="float32")
    ids, touched = torch.tensor([[5]]), []
    for expert in range(engine.model.config.num_local_experts):
        scales = engine.methods[f"model.layers.0.mlp.experts.{expert}.gate_up_proj"].packed[0].tensors["scales"]
        kept = scales.clone()
        scales.fill_(float("nan"))
        touched.append(bool(engine.logits(ids).isnan().any()))
        scales.copy_(kept)
    assert sum(touched) == engine.model.config.num_experts_per_tok < len(touched)


def test_a_layer_narrower_than_a_group_is_one_group(llama):
    """128 columns in groups of 128, and 64 columns, in types that are otherwise always grouped."""
    for scheme in ("WNF4A16_g128", "Wfp4bnbA16_g128", "W4A4_g128_a:rule=127.5"):
        plan = qplug_core.load(llama, quantize=scheme).plan
        assert plan["model.layers.0.self_attn.q_proj"].segments[0].scheme.weight.granularity == "channel"
