"""Files of whole models against transformers on the numbers that the files mean."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from qplug_gguf.source import open_gguf
from tokenizers import pre_tokenizers

import qplug_core
from qplug_core.device import Device
from qplug_core.engine.explain import explain_checkpoint
from qplug_core.errors import ConfigError
from qplug_core.matrix import CapabilityMatrix
from qplug_core.registry import get_registry

sys.path.insert(0, str(Path(__file__).parent))
from gguf_files import IDS, distance, logits_of, model_of, write

MIXED = {"embed_tokens": "Q4_K", "lm_head": "Q6_K", "v_proj": "Q5_0", "down_proj": "Q6_K", "q_proj": "Q4_0", "proj": "Q8_0"}


def load(path, **options):
    return qplug_core.load(path, **{"dtype": "float32", "kernels": "reference", **options})


def test_scheme(tmp_path):
    model = write(tmp_path / "m.gguf", model_of("llama"), MIXED)
    engine = load(tmp_path / "m.gguf")
    assert distance(engine.logits(IDS), logits_of(model)) < 1e-6
    schemes = {d.layer.name: str(d.segments[0].scheme) for d in engine.plan.decisions}
    assert schemes["model.embed_tokens"] == "W4A16_g32_asym"
    assert schemes["lm_head"] == schemes["model.layers.1.mlp.down_proj"] == "W6A16_g16"
    assert schemes["model.layers.0.self_attn.q_proj"] == "W4A16_g32"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("types", ["Q4_0", "Q8_0", "F16", "BF16", "Q4_K", "Q2_K", "IQ4_XS", "IQ2_XS"])
def test_families_from_metadata_alone(tmp_path, kind, types):
    model = write(tmp_path / "model.gguf", model_of(kind), types)
    assert distance(load(tmp_path).logits(IDS), logits_of(model)) < 1e-6


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_families_with_a_config_beside(tmp_path, kind):
    model = write(tmp_path / "model.gguf", model_of(kind), "Q8_0")
    model.config.save_pretrained(tmp_path)
    assert distance(load(tmp_path / "model.gguf").logits(IDS), logits_of(model)) < 1e-6


def test_biases_of_queries_and_keys_are_permuted_with_their_weights(tmp_path):
    model = write(tmp_path / "m.gguf", model_of("llama", attention_bias=True), "Q8_0")
    assert distance(load(tmp_path).logits(IDS), logits_of(model)) < 1e-6


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj"])
def test_rows_left_as_llama_cpp_permutes_them_are_garbage(tmp_path, monkeypatch, name):
    model = write(tmp_path / "m.gguf", model_of("llama"), "Q8_0")
    source = open_gguf(tmp_path)
    kept = {key: value for key, value in source.order.items() if name not in key}
    assert len(kept) < len(source.order)
    monkeypatch.setattr("qplug_gguf.source._orders", lambda *_: kept)
    assert distance(load(tmp_path).logits(IDS), logits_of(model)) > 1e-2


@pytest.mark.parametrize("types", ["Q8_0", "Q4_K", "F16", "F32", "IQ2_XS"])
@pytest.mark.parametrize("said", [None, True, False])
def test_absent_output_weight_is_the_embedding(tmp_path, types, said):
    """The file leaves output.weight out where it is token_embd.weight, whatever a config.json says."""
    model = write(tmp_path / "m.gguf", model_of("qwen2", tie_word_embeddings=True), types, leave=("output.weight",))
    if said is not None:
        (tmp_path / "config.json").write_text(json.dumps({**model.config.to_dict(), "tie_word_embeddings": said}))
    engine = load(tmp_path)
    assert distance(engine.logits(IDS), logits_of(model)) < 1e-6
    stored = [t for t in open_gguf(tmp_path).tensors if t != "lm_head.weight"]
    infos = engine.source.tensors
    assert engine.source.nbytes == sum(infos[t].stop - infos[t].start for t in stored)


def test_output_weight_that_is_not_the_embedding_is_read(tmp_path):
    """llama.cpp prefers a stored output.weight; a config.json that says tied is wrong then."""
    model = write(tmp_path / "m.gguf", model_of("qwen2"), "Q8_0")
    (tmp_path / "config.json").write_text(json.dumps({**model.config.to_dict(), "tie_word_embeddings": True}))
    assert distance(load(tmp_path).logits(IDS), logits_of(model)) < 1e-6


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize("beside", [False, True])
def test_rope_freqs_divide_the_frequencies(tmp_path, beside):
    """Llama 3.1 files hold the divisors of the frequencies as a tensor, and nothing in the metadata."""
    plain, scaled = model_of("llama"), model_of("llama", rope_parameters=LLAMA3)
    factors = plain.model.rotary_emb.inv_freq / scaled.model.rotary_emb.inv_freq
    assert factors.max() > 2
    model = write(tmp_path / "m.gguf", scaled, "Q8_0", tensors={"rope_freqs.weight": factors.numpy().astype(np.float32)})
    if beside:
        model.config.save_pretrained(tmp_path)
    engine = load(tmp_path)
    assert distance(engine.logits(IDS), logits_of(model)) < 1e-5
    assert any("rope_freqs" in note for note in engine.plan.notes)
    plain.load_state_dict(model.state_dict())
    assert distance(logits_of(plain), logits_of(model)) > 1e-3


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaled_rotary_embeddings(tmp_path, kind):
    scaling = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    keys = {"rope.scaling.type": kind, "rope.scaling.factor": 4.0}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = 64
        keys["rope.scaling.original_context_length"] = 64
    model = write(tmp_path / "m.gguf", model_of("qwen2", rope_parameters=scaling), "Q8_0", extra=keys)
    assert distance(load(tmp_path).logits(IDS), logits_of(model)) < 1e-6
    plain = model_of("qwen2")
    plain.load_state_dict(model.state_dict())
    assert distance(logits_of(plain), logits_of(model)) > 1e-4


def test_split_file(tmp_path):
    """model-00001-of-0000N.gguf: all parts are read, whichever of them is named."""
    model = write(tmp_path / "model.gguf", model_of("llama"), "Q8_0", split_max_tensors=6)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    for path in (tmp_path, parts[0], parts[-1]):
        assert distance(load(path).logits(IDS), logits_of(model)) < 1e-6


def test_tensor_parallel_ranks(tmp_path):
    """Rows of permuted queries and columns of down_proj, read by each rank, are the rows and columns of the whole."""
    write(tmp_path / "m.gguf", model_of("llama"), MIXED)
    plan = explain_checkpoint(str(tmp_path / "m.gguf"), None, 2, "float32", None)
    assert {d.layer.n for d in plan.decisions if d.layer.name.endswith("q_proj")} == {128}
    source = open_gguf(tmp_path)
    whole = source.read("model.layers.0.self_attn.q_proj.weight")
    half = source.read("model.layers.0.self_attn.q_proj.weight", (slice(64, 192), slice(18, 54)))
    assert torch.equal(half, whole[64:192, 18:54])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_native_dtypes_generate(tmp_path, dtype):
    write(tmp_path / "m.gguf", model_of("llama"), MIXED)
    engine = load(tmp_path, dtype=dtype, kernels="auto")
    assert engine.tokenizer("ab")["input_ids"] == [1, 3, 4 + ord("a") - 33, 4 + ord("b") - 33]
    assert isinstance(engine.generate("ab", max_new_tokens=3), str)


def test_tokenizer_model_beside_does_not_change_the_tokens(tmp_path):
    """transformers mixes a tokenizer.model in the same folder into the vocabulary of the file: no first token, no first space."""
    write(tmp_path / "m.gguf", model_of("llama"), "Q8_0")
    alone = open_gguf(tmp_path).load_tokenizer()("ab")["input_ids"]
    (tmp_path / "tokenizer.model").write_bytes(b"no sentencepiece model")
    assert open_gguf(tmp_path).load_tokenizer()("ab")["input_ids"] == alone


def test_byte_level_vocabulary(tmp_path):
    """What Llama 3 and Qwen files hold: merges, and special tokens that stay whole."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "<|end|>"]
    path = tmp_path / "m.gguf"
    write(path, model_of("qwen3", vocab_size=258), "Q8_0", vocabulary=lambda writer, size: byte_level(writer, tokens))
    tokenizer = load(tmp_path).tokenizer
    ids = tokenizer("hey<|end|>")["input_ids"]
    assert ids == [256, tokens.index("y"), 257]
    assert tokenizer.decode(ids) == "hey<|end|>"


def byte_level(writer: gguf.GGUFWriter, tokens: list[str]) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(len(tokens) - 1)


def test_kernels_of_q4_0_and_q8_0_are_used_and_shifts_are_planned(tmp_path):
    """A plan names no kernel that refuses the weights. One with a minimum has a shift, which the CPU kernels take."""
    model = write(tmp_path / "m.gguf", model_of("llama"), {"gate_proj": "Q4_1", "up_proj": "IQ2_XS", "proj": "Q4_0"})
    engine = load(tmp_path, kernels="auto")
    assert engine.notes == []
    chosen = {d.layer.name.split(".")[-1]: d.segments[0].choice.kernel for d in engine.plan.decisions if d.quantized}
    assert chosen["up_proj"] == "core.reference_linear"
    assert chosen["gate_proj"].partition(".")[2].startswith("cpu_")
    assert distance(engine.logits(IDS), logits_of(model)) < 1e-5


def test_config_of_another_model_is_refused(tmp_path):
    model = write(tmp_path / "m.gguf", model_of("llama"), "Q8_0")
    theta = {"rope_type": "default", "rope_theta": 5e5}
    changes: list[dict[str, Any]] = [{"num_hidden_layers": 3}, {"model_type": "gemma2"}, {"hidden_size": 128}]
    for change in [*changes, {"rope_theta": 5e5, "rope_parameters": theta}]:
        (tmp_path / "config.json").write_text(json.dumps({**model.config.to_dict(), **change}))
        with pytest.raises(ConfigError, match=next(iter(change))):
            load(tmp_path)


def test_quantization_config_beside_is_of_other_weights(tmp_path):
    model = write(tmp_path / "m.gguf", model_of("llama"), "Q8_0")
    other = {**model.config.to_dict(), "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(other))
    engine = load(tmp_path)
    assert engine.plan.method == "gguf"
    assert any("left unread" in note for note in engine.plan.notes)


def test_the_report_promises_no_kernel_that_the_weights_would_be_refused_by():
    """A shift and an opaque encoding are not in a scheme's name, so the declaration says where only the reference kernel runs."""
    matrix = CapabilityMatrix.of(get_registry(), [("avx2", Device.from_name("avx2"))])
    cells = {method.name: method.cell("avx2", "linear") for method in matrix.methods}
    assert cells["gguf-grid"].status == "reference"
    assert cells["gguf"].fast <= cells["gguf"].total - 2
