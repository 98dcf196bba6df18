"""Decoder layers in one C call: which are taken over, that they give the layer's own results, and when the layer itself runs again."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.cache_utils import DynamicCache

import qplug_core
from qplug_core.engine.cache import quant_cache
from qplug_core.engine.decode_layer import _Forward, use_own_layers
from qplug_core.kernels.cpu_decoder_layer import DecoderLayer
from qplug_core.source import Source

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import make_model

SIZES = {"hidden_size": 128, "intermediate_size": 160, "head_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {"sliding_window": 16}, "large_heads": {"num_key_value_heads": 4, "head_dim": 64},
}  # fmt: skip
"""Models whose layers are taken over: plain, with biases, with norms of queries and keys, other head sizes; but not behind a window."""
PROMPT = "a prompt of some length"


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers") / request.param
    made = make_model(folder, request.param.replace("large_heads", "llama"), **{**SIZES, **KINDS[request.param]})
    spread(made)
    return made


@pytest.fixture
def llama_folder(tmp_path):
    return make_model(tmp_path / "llama", **SIZES)


def spread(folder, seed=1):
    """Norms and biases that are not all alike, so that leaving one out shows."""
    torch.manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    for name, t in tensors.items():
        if t.ndim == 1:
            tensors[name] = (t.float() + torch.rand(t.shape) * 0.5).to(t.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def calls(monkeypatch):
    """How often a layer ran in C, trials included."""
    found = []
    real = DecoderLayer.__call__
    monkeypatch.setattr(DecoderLayer, "__call__", lambda *args: found.append(1) or real(*args))
    return found


def steps(engine, own, tokens=40):
    """Logits ``[1, tokens, V]`` of the same tokens, one by one, by our code or by transformers'."""
    engine.model.set_attn_implementation("qplug" if own else "sdpa")
    cache = quant_cache(engine.model.config, {}) if own else DynamicCache(config=engine.model.config)
    ids = torch.arange(2, 2 + tokens).view(1, tokens)
    with torch.inference_mode():
        out = [engine.model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(tokens)]
    engine.model.set_attn_implementation("qplug")
    return torch.cat(out, 1).float()


def apart(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 0.01), ("float16", 0.002)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_layer_in_c_gives_what_the_layer_gives(folder, dtype, limit, threads, calls):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        engine = qplug_core.load(folder, dtype=dtype, quantize="W4A16_g32")
        right = steps(engine, own=False)
        assert not calls
        assert apart(steps(engine, own=True), right) < limit
    finally:
        torch.set_num_threads(before)
    window = KINDS[folder.name].get("sliding_window")
    # From the eighth token on; a window's cache is not one that lies in one piece.
    assert len(calls) == (0 if window else 2 * 33)


@pytest.mark.parametrize("scheme", ["W8A16", "Wfp8A16", "NF4", "W4A16_g32"])
def test_generate_gives_the_tokens_of_the_layers_themselves(llama_folder, scheme, calls, monkeypatch):
    engine = qplug_core.load(llama_folder, dtype="float32", quantize=scheme)
    text = engine.generate(PROMPT, 30)
    assert len(calls) == 2 * 29
    monkeypatch.setattr(_Forward, "_turns", lambda *args: None)
    assert engine.generate(PROMPT, 30) == text
    assert len(calls) == 2 * 29


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("granite", {"residual_multiplier": 0.5}), ("llama", {"hidden_act": "gelu"}), ("llama", {"hidden_act": "relu"})],
)
def test_a_layer_that_computes_something_else_stays_as_it_is(tmp_path, kind, changes, calls, caplog):
    """Its parts have the names, so only trying tells."""
    engine = qplug_core.load(make_model(tmp_path / kind, kind, **SIZES, **changes), dtype="float32", quantize="W4A16_g32")
    assert isinstance(engine.model.model.layers[0].forward, _Forward)
    with caplog.at_level(logging.INFO, logger="qplug_core"):
        assert apart(steps(engine, own=True), steps(engine, own=False)) < 1e-5
    assert len(calls) == 2
    assert "computes something else" in caplog.text


def test_what_is_not_the_template_is_no_candidate(tmp_path):
    """16-bit layers, products that C cannot call, other parts."""
    folder = make_model(tmp_path / "llama", **SIZES)
    for options in ({}, {"quantize": "W8A8"}, {"quantize": "W4A16_g32", "kernels": "reference"}):
        layers = qplug_core.load(folder, dtype="float32", **options).model.model.layers
        assert not any("forward" in vars(layer) for layer in layers)
    other = make_model(tmp_path / "gemma3", "gemma3_text", **SIZES, query_pre_attn_scalar=32)
    assert not use_own_layers(qplug_core.load(other, dtype="float32", quantize="W4A16_g32").model)


def _new_storage(model):
    for layer in model.model.layers:
        layer.input_layernorm.weight.data = layer.input_layernorm.weight.data * 3


def _new_parameter(model):
    for layer in model.model.layers:
        layer.self_attn.v_proj.bias = torch.nn.Parameter(torch.ones(layer.self_attn.v_proj.method.packed[0].n))


@pytest.mark.parametrize("change", [_new_storage, _new_parameter])
def test_weights_that_moved_are_read_where_they_are_now(llama_folder, calls, change):
    """C was given addresses, and whoever exchanges a tensor tells nobody."""
    engine = qplug_core.load(llama_folder, dtype="float32", quantize="W4A16_g32")
    before = steps(engine, own=True)
    assert calls
    change(engine.model)
    calls.clear()
    after = steps(engine, own=True)
    assert calls
    assert apart(after, before) > 1e-4
    assert apart(after, steps(engine, own=False)) < 1e-5


def test_what_looks_between_or_changes_a_part_brings_the_layer_back(llama_folder, calls):
    engine = qplug_core.load(llama_folder, dtype="float32", quantize="W4A16_g32")
    right, all_of_it = steps(engine, own=True), 2 * 33
    assert len(calls) == all_of_it
    layer = engine.model.model.layers[1]
    seen = []
    handle = layer.mlp.down_proj.register_forward_hook(lambda *args: seen.append(1))
    calls.clear()
    assert apart(steps(engine, own=True), right) < 1e-5
    assert (len(seen), len(calls)) == (40, 39)
    handle.remove()

    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    layer.mlp.down_proj = Twice(layer.mlp.down_proj)
    calls.clear()
    assert apart(steps(engine, own=True), steps(engine, own=False)) < 1e-5
    assert apart(steps(engine, own=True), right) > 1e-3
    layer.mlp.down_proj = layer.mlp.down_proj.inner
    calls.clear()
    assert apart(steps(engine, own=True), right) < 1e-5
    assert len(calls) == 2 * 39


def test_hidden_states_and_attentions_are_given_on_request(llama_folder):
    engine = qplug_core.load(llama_folder, dtype="float32", quantize="W4A16_g32")
    steps(engine, own=True)
    cache = quant_cache(engine.model.config, {})
    with torch.inference_mode():
        engine.model(torch.arange(20)[None], past_key_values=cache, use_cache=True)
        out = engine.model(torch.tensor([[5]]), past_key_values=cache, use_cache=True, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert apart(engine.model.lm_head(out.hidden_states[-1]), out.logits) < 1e-5


@pytest.mark.parametrize("what", ["a mask", "two sequences", "a quantized cache", "gradients"])
def test_what_c_does_not_take_goes_through_the_layer(llama_folder, what, calls):
    engine = qplug_core.load(
        llama_folder, dtype="float32", quantize="W4A16_g32", kv_cache="int8" if what == "a quantized cache" else None
    )
    if what == "gradients":
        cache = quant_cache(engine.model.config, {})
        engine.model(torch.arange(20)[None], past_key_values=cache, use_cache=True)
        engine.model(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    elif what == "a quantized cache":
        assert len(engine.generate(PROMPT, 12)) == 12
    else:
        prompts = ["a", PROMPT] if what == "a mask" else [PROMPT, PROMPT]
        engine.generate(prompts, 12)
    assert not calls


def test_a_cache_that_was_cropped_goes_on(llama_folder, calls):
    """What something else did to the cache makes it be copied once, by the layer itself."""
    engine = qplug_core.load(llama_folder, dtype="float32", quantize="W4A16_g32")

    def run(own):
        engine.model.set_attn_implementation("qplug" if own else "sdpa")
        cache = quant_cache(engine.model.config, {})
        with torch.inference_mode():
            engine.model(torch.arange(20)[None], past_key_values=cache, use_cache=True)
            for token in (5, 6, 7):
                engine.model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache.crop(-8)
            for token in range(80):
                logits = engine.model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits
        assert cache.get_seq_length() == 95
        return logits

    assert apart(run(True), run(False)) < 1e-5
    assert len(calls) > 150


def test_reloaded_weights_are_the_ones_that_run(tmp_path, calls):
    folder, other = (make_model(tmp_path / name, **SIZES) for name in ("one", "two"))
    tensors = load_file(other / "model.safetensors")
    save_file({k: v * 1.25 for k, v in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    spread(other, seed=2)
    engine, fresh = (qplug_core.load(path, dtype="float32", quantize="W4A16_g32") for path in (folder, other))
    before, right = steps(engine, own=True), steps(fresh, own=True)
    engine.reload(Source.open(other))
    calls.clear()
    after = steps(engine, own=True)
    assert len(calls) == 2 * 39
    assert apart(after, right) < 1e-6
    assert apart(after, before) > 1e-2
