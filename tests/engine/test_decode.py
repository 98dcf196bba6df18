"""The decoding loop, the attention of one token, the cache that is written in place, and norms in C: the tokens of transformers, faster."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

import qplug_core
from qplug_core.engine import attention as engine_attention
from qplug_core.engine.cache import quant_cache
from qplug_core.engine.decode import DecodeLoop, kept_loop
from qplug_core.engine.decode_norm import same, use_own_norms
from qplug_core.engine.explain import explain_checkpoint
from qplug_core.engine.slab import Held, SlabLayer, SlabSlidingLayer
from qplug_core.kernels import cpu_attention, cpu_kv_cache
from qplug_core.kv import kv_scheme
from qplug_core.reference.kv_cache import CacheCoder

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import make_model

KINDS = {
    "llama": {}, "mistral": {"sliding_window": 8}, "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 16}, "qwen3": {},
    "mixtral": {"num_local_experts": 4}, "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 256},
    "llama3_rope": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    "deepseek_v3": {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 16, "head_dim": 16,
                    "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
                    "first_k_dense_replace": 1, "moe_intermediate_size": 32},
}  # fmt: skip
"""Models, with what differs from ``make_model``: grouped heads, windows, norms of queries, experts, no rotation, other frequencies, MLA."""
PROMPTS = ["a", "a much longer prompt than the other", "three of them"]


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request, tmp_path_factory):
    kind = request.param.replace("llama3_rope", "llama")
    return make_model(tmp_path_factory.mktemp("decode") / request.param, kind, **KINDS[request.param])


@pytest.fixture
def llama_folder(tmp_path):
    return make_model(tmp_path / "llama")


@pytest.fixture
def calls(monkeypatch):
    """How often attention ran in C."""
    found = []
    real = cpu_attention.attention
    monkeypatch.setattr(cpu_attention, "attention", lambda *args: found.append(1) or real(*args))
    return found


def theirs(engine, prompts, new, **options):
    """Tokens of transformers: its attention, cache and loop."""
    chosen = engine.model.config._attn_implementation
    engine.model.set_attn_implementation("sdpa" if chosen == "qplug" else chosen)
    inputs = engine.tokenizer(prompts, return_tensors="pt", padding=True)
    config = GenerationConfig(
        max_new_tokens=new, pad_token_id=engine.tokenizer.pad_token_id, num_beams=1,
        eos_token_id=engine.model.generation_config.eos_token_id, **options,
    )  # fmt: skip
    kept = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(5)
        out = engine.model.generate(**kept, generation_config=config)
    engine.model.set_attn_implementation(chosen)
    return [engine.tokenizer.decode(row[kept["input_ids"].shape[1] :], skip_special_tokens=True) for row in out]


def test_the_tokens_of_transformers(folder, calls):
    """Batches of different lengths, beyond windows; greedy and sampled."""
    engine = qplug_core.load(folder, dtype="float32")
    assert kept_loop(engine.model) is None
    right = theirs(engine, PROMPTS, 24, do_sample=False)
    assert not calls
    assert engine.generate(PROMPTS, 24) == right
    assert len(calls) == 2 * 23
    assert [engine.generate(p, 24) for p in PROMPTS] == right
    options = {"temperature": 1.5, "top_k": 20, "top_p": 0.9}
    sampled = theirs(engine, PROMPTS, 24, do_sample=True, **options)
    assert sampled != right
    assert engine.generate(PROMPTS, 24, seed=5, **options) == sampled


def test_bfloat16_logits_step_by_step(folder):
    """Each step on the same tokens: own attention and norms differ from transformers' as roundings do."""
    engine = qplug_core.load(folder, dtype="bfloat16")
    ids = torch.arange(2, 42).view(1, 40)
    steps = []
    for implementation, cache in (
        ("qplug", quant_cache(engine.model.config, {})),
        ("sdpa", DynamicCache(config=engine.model.config)),
    ):
        engine.model.set_attn_implementation(implementation)
        with torch.inference_mode():
            out = [engine.model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits.float() for t in range(40)]
        steps.append(torch.cat(out, 1))
    assert float((steps[0] - steps[1]).norm() / steps[1].norm()) < 0.02


def test_the_end_token_stop_strings_and_streaming(llama_folder):
    engine = qplug_core.load(llama_folder, dtype="float32")
    free = engine.generate(PROMPTS[1], 40)
    width = len(engine.tokenizer(PROMPTS[1])["input_ids"])
    inputs = engine.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with torch.inference_mode():
        whole = engine._run(inputs, GenerationConfig(max_new_tokens=40, pad_token_id=256), (), None)
    # A token that one sequence meets soon ends it there; the others go on, and it is padded.
    eos = int(whole[0, inputs["input_ids"].shape[1] + 3])
    engine.model.generation_config.eos_token_id = [eos]
    right = theirs(engine, PROMPTS, 40, do_sample=False)
    assert engine.generate(PROMPTS, 40) == right
    assert len(right[0]) < len(engine.tokenizer.decode(whole[0, width:]))
    engine.model.generation_config.eos_token_id = 256
    pieces = list(engine.generate(PROMPTS[1], 40, stream=True))
    assert "".join(pieces) == free
    assert len(pieces) > 1
    stop = free[4:6]
    assert engine.generate(PROMPTS[1], 40, stop=[stop]) == free[: free.index(stop)]
    assert "".join(engine.generate(PROMPTS[1], 40, stop=[stop], stream=True)) == free[: free.index(stop)]


def test_settings_of_the_checkpoint_are_obeyed(llama_folder):
    """What generation_config.json asks for, such as a penalty, goes through transformers' processors."""
    engine = qplug_core.load(llama_folder, dtype="float32")
    plain = engine.generate(PROMPTS, 20)
    engine.model.generation_config.repetition_penalty = 5.0
    assert engine.generate(PROMPTS, 20) == theirs(engine, PROMPTS, 20, do_sample=False) != plain


def test_beams_and_other_requests_take_transformers_loop(llama_folder, caplog, monkeypatch):
    engine = qplug_core.load(llama_folder, dtype="float32")
    own = []
    real = DecodeLoop._decode
    monkeypatch.setattr(DecodeLoop, "_decode", lambda *args: own.append(1) or real(*args))
    engine.generate("a", 4, num_beams=3)
    assert not own
    engine.generate("a", 4)
    assert own
    with caplog.at_level(logging.INFO, logger="qplug_core"), torch.inference_mode():
        ids = torch.arange(5)[None]
        config = GenerationConfig(max_new_tokens=3, pad_token_id=256, return_dict_in_generate=True, num_beams=1)
        cache = quant_cache(engine.model.config, {})
        out = engine.model.generate(ids, generation_config=config, custom_generate=DecodeLoop(), past_key_values=cache)
    assert out.sequences.shape == (1, 8)
    assert "transformers' own loop" in caplog.text


@pytest.mark.parametrize(
    ("kind", "changes"), [("gemma2", {"query_pre_attn_scalar": 16}), ("gpt_oss", {"num_local_experts": 4})]
)
def test_soft_caps_and_sinks_keep_their_attention_and_say_so(tmp_path, kind, changes, calls):
    """The reason is in the plan of a load and of explain, and the logits are transformers'."""
    if kind == "gpt_oss":
        changes = {
            **changes,
            "hidden_size": 64,
            "intermediate_size": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        }
    folder = make_model(tmp_path / kind, kind, **changes)
    engine = qplug_core.load(folder, dtype="float32")
    assert engine.generate(PROMPTS, 12) == theirs(engine, PROMPTS, 12, do_sample=False)
    assert not calls
    for plan in (engine.plan, explain_checkpoint(str(folder), None, 1, "float32", None)):
        assert any("attention is transformers' own (eager)" in note for note in plan.all_notes())


def test_what_attention_does_not_know_goes_to_torch(calls):
    class Module(nn.Module):
        num_key_value_groups, is_causal = 2, True

    q, k = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 9, 64)
    sdpa = engine_attention.sdpa_attention_forward
    right = sdpa(Module(), q, k, k, None, scaling=0.2)[0]
    torch.testing.assert_close(engine_attention.attend(Module(), q, k, k, None, scaling=0.2)[0], right)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="softcap"):
        engine_attention.attend(Module(), q, k, k, None, scaling=0.2, softcap=3.0)
    bias = torch.randn(1, 4, 1, 9)
    assert torch.equal(
        engine_attention.attend(Module(), q, k, k, None, scaling=0.2, position_bias=bias)[0],
        sdpa(Module(), q, k, k, None, scaling=0.2, position_bias=bias)[0],
    )
    additive = torch.zeros(1, 1, 1, 9)
    engine_attention.attend(Module(), q, k, k, additive, scaling=0.2)
    narrow = torch.randn(1, 4, 1, 40)
    engine_attention.attend(Module(), narrow, k[..., :40], k[..., :40], None)
    q.requires_grad_()
    engine_attention.attend(Module(), q, k, k, None, scaling=0.2)[0].sum().backward()
    assert q.grad is not None
    assert len(calls) == 1


def test_reference_kernels_leave_the_model_as_it_is(llama_folder):
    model = qplug_core.load(llama_folder, dtype="float32", kernels="reference").model
    assert model.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(m) for m in model.modules())


def fill(layers, steps, heads=2, depth=16, batch=2):
    """The same tokens to both; what they gave last."""
    out = []
    for tokens in steps:
        new = torch.randn(2, batch, heads, tokens, depth)
        out = [layer.update(*new) for layer in layers]
        for mine, right in zip(*out, strict=True):
            assert torch.equal(mine, right)
        assert layers[0].get_seq_length() == layers[1].get_seq_length()
        assert layers[0].get_mask_sizes(1) == layers[1].get_mask_sizes(1)
    return out


def test_a_slab_is_the_cache_that_grows_by_copies():
    pair = SlabLayer(), DynamicLayer()
    fill(pair, [5, 1, 1])
    place = pair[0].keys.data_ptr()
    fill(pair, [1] * 50)
    assert pair[0].keys.data_ptr() == place
    fill(pair, [200, 1, 1])
    for change in (
        lambda layer: layer.crop(-3),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([0, 3])),
    ):
        for layer in pair:
            change(layer)
        fill(pair, [1, 2, 1], batch=pair[1].keys.shape[0])
    for layer in pair:
        layer.reset()
    fill(pair, [3, 1])


@pytest.mark.parametrize("window", [2, 8, 100])
def test_a_sliding_slab_is_the_cache_that_slides(window):
    pair = SlabSlidingLayer(window), DynamicSlidingWindowLayer(window)
    fill(pair, [5, 1, 1, 20, 1] + [1] * 150 + [7, 1])
    assert pair[0].rooms[0].slab.shape[2] <= max(64, 2 * (window + 150))
    pair = SlabSlidingLayer(window), DynamicSlidingWindowLayer(window)
    for layer in pair:
        layer.activate_past_recording()
    for tokens in (5, 1, 30, 1):
        fill(pair, [tokens])
        for layer in pair:
            layer.crop(0)
    fill(pair, [4])
    for layer in pair:
        layer.crop(-2)
    fill(pair, [1, 1])


@pytest.mark.parametrize("word", ["fp8", "int8", "int4"])
def test_a_quantized_cache_is_attended_as_bytes(llama_folder, word, monkeypatch, calls):
    """One token decodes nothing, and gives what decoding all of it gives."""
    engine = qplug_core.load(llama_folder, dtype="float32", kv_cache=word)
    slow = theirs(
        qplug_core.load(llama_folder, dtype="float32", kv_cache=word, kernels="reference"), PROMPTS, 0 + 1, do_sample=False
    )
    assert slow

    def logits():
        cache = engine._cache()
        with torch.inference_mode():
            engine.model(torch.arange(2, 40)[None], past_key_values=cache, use_cache=True)
            with monkeypatch.context() as patch:
                patch.setattr(Held, "numbers", numbers)
                return engine.model(torch.tensor([[7]]), past_key_values=cache, use_cache=True).logits

    real = Held.numbers
    engine.model.set_attn_implementation("sdpa")
    numbers = real
    right = logits()
    assert not calls
    engine.model.set_attn_implementation("qplug")
    numbers = refuse
    torch.testing.assert_close(logits(), right, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2


def refuse(held):
    raise AssertionError("decoded")


def test_held_bytes_are_numbers_for_everything_else():
    for word in ("int8", "nvfp4"):
        scheme = kv_scheme(word)
        coder = CacheCoder(scheme, torch.tensor(0.01) if scheme.dynamic == "local" else None)
        x = torch.randn(1, 2, 5, 32)
        layer = SlabLayer((coder, coder))
        keys, _ = layer.update(x, x)
        right = coder.decode(coder.encode(x), 32, torch.float32)
        assert isinstance(keys, Held)
        assert keys.shape == x.shape
        assert keys.dtype == x.dtype
        assert torch.equal(keys + 0, right)
        assert torch.equal(keys[:, :, 1:], right[:, :, 1:])
        assert torch.equal(torch.cat([keys, x], 2), torch.cat([right, x], 2))
        assert (cpu_kv_cache.refusals(coder, 32, x.dtype, x.device) == []) == (word == "int8") == (keys.rows is not None)


class Norm(nn.Module):
    """Norms that are nearly Llama's."""

    def __init__(self, variant, dtype=torch.bfloat16):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(64).to(dtype) + 0.5)
        self.eps, self.variant = 1e-6, variant

    def forward(self, x):
        y = x.float()
        if self.variant == "layer":
            y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + (1e-2 if self.variant == "eps" else self.eps))
        if self.variant == "late":
            return (y * self.weight.float()).to(x.dtype)
        return (1 + self.weight if self.variant == "one" else self.weight) * y.to(x.dtype)


class OneRMSNorm(Norm):
    """By its name, a candidate."""


def test_only_norms_that_compute_the_same_run_in_c():
    assert same(OneRMSNorm(""))
    assert same(OneRMSNorm("", torch.float32))
    assert not any(same(OneRMSNorm(variant)) for variant in ("layer", "eps", "late", "one"))
    model = nn.Sequential(OneRMSNorm(""), OneRMSNorm("one"), nn.LayerNorm(64))
    x = torch.randn(2, 3, 64).bfloat16()
    with torch.inference_mode():
        right = model(x)
        assert use_own_norms(model) == 1
        torch.testing.assert_close(model(x), right, rtol=1e-2, atol=1e-2)
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    model.float()
    torch.testing.assert_close(model[0](x.detach().float()), Norm.forward(model[0], x.detach().float()))


def test_a_model_that_prepares_its_own_inputs_keeps_transformers_loop(llama_folder, monkeypatch):
    engine = qplug_core.load(llama_folder, dtype="float32")
    right = engine.generate(PROMPTS, 8)
    assert kept_loop(engine.model) is None
    cls = type(engine.model)

    def ours(self, input_ids, **kwargs):
        return super(cls, self).prepare_inputs_for_generation(input_ids, **kwargs)

    monkeypatch.setattr(cls, "prepare_inputs_for_generation", ours)
    assert "prepare_inputs_for_generation" in kept_loop(engine.model)
    monkeypatch.setattr(DecodeLoop, "_decode", refuse)
    assert engine.generate(PROMPTS, 8) == right


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 products on this CPU")
@pytest.mark.parametrize("tokens", [64, 65, 200])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_long_prompt_is_attended_as_exactly_as_torch_does(kv_heads, tokens, monkeypatch):
    """Block by block, over keys that lie apart as a cache's do; what it does not take goes to torch."""

    class Module(nn.Module):
        is_causal, num_key_value_groups = True, 4 // kv_heads

    torch.manual_seed(tokens)
    q = torch.randn(2, tokens, 4, 32).bfloat16().transpose(1, 2) * 3
    k, v = (torch.randn(2, kv_heads, tokens + 50, d).bfloat16()[:, :, :tokens] for d in (32, 48))
    exact = engine_attention.sdpa_attention_forward(Module(), q.double(), k.double(), v.double(), None, scaling=0.3)[0]
    theirs = engine_attention.sdpa_attention_forward(Module(), q, k, v, None, scaling=0.3)[0]
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(engine_attention, "sdpa_attention_forward", refuse)
        ours = engine_attention.attend(Module(), q, k, v, None, scaling=0.3)[0]
    errors = [float((y.double() - exact).norm() / exact.norm()) for y in (ours, theirs)]
    assert errors[0] < 1.5 * errors[1]
    monkeypatch.setattr(engine_attention, "_prompt", refuse)
    mask = torch.ones(2, 1, tokens, tokens, dtype=torch.bool).tril()
    short = (q[:, :, :40], k[:, :, :40], v[:, :, :40])
    with torch.inference_mode():
        for given, options in (((q, k, v, mask), {}), ((q[:, :, 1:], k, v, mask[:, :, 1:]), {}), ((*short, None), {}),
                               ((q.float(), k.float(), v.float(), None), {}), ((q, k, v, None), {"is_causal": False})):  # fmt: skip
            engine_attention.attend(Module(), *given, scaling=0.3, **options)
    monkeypatch.setattr(engine_attention, "MOST", 100)
    with torch.inference_mode():
        engine_attention.attend(Module(), q, k, v, None, scaling=0.3)
