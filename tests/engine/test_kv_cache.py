"""A quantized KV cache in the reference engine: right numbers in every way of generating, and wrong ones told apart."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qplug_core
from qplug_core.engine.cache import bytes_per_token, quant_cache
from qplug_core.errors import CheckpointError, SchemeError, UsageError
from qplug_core.kv import kv_scheme
from qplug_core.registry import get_registry
from qplug_core.scheme import QuantScheme, TensorQuant

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import make_model

IDS = torch.arange(2, 82).view(2, 40)
WORDS = ("fp8", "fp8_e5m2", "int8", "int8.asym", "int4", "int4.g8", "nvfp4")


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma3_text"])
def folder(request, tmp_path_factory):
    changes = {"mistral": {"sliding_window": 8}, "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 16}}
    return make_model(tmp_path_factory.mktemp("kv") / request.param, request.param, **changes.get(request.param, {}))


@pytest.mark.parametrize("kv", WORDS)
def test_error_against_the_16_bit_cache(folder, kv):
    plain = qplug_core.load(folder, dtype="float32").logits(IDS)
    error = distance(qplug_core.load(folder, dtype="float32", kv_cache=kv).logits(IDS), plain)
    bound = QuantScheme(kv=kv_scheme(kv)).tolerance.cache
    assert bound / 20 < error < 2 * bound


@pytest.mark.parametrize("kv", ["int8", "nvfp4"])
def test_token_by_token_is_the_same_as_all_at_once(folder, kv):
    """Also beyond a sliding window: what a token stores does not depend on when it came."""
    engine = qplug_core.load(folder, dtype="float32", kv_cache=kv)
    cache = quant_cache(engine.model.config, engine.coders)
    steps = []
    for t in range(IDS.shape[1]):
        with torch.inference_mode():
            steps.append(engine.model(input_ids=IDS[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    whole = engine.logits(IDS)
    # A rounding of float32 may turn a code by one step; a wrong cache differs by more than the cache itself does.
    assert distance(torch.cat(steps, 1), whole) < 1e-3
    assert bytes_per_token(cache) == sum(2 * layer.keys.shape[1] * layer.coders[0].width(16) for layer in cache.layers)


def test_batches_padding_streaming_and_beams(folder):
    engine = qplug_core.load(folder, dtype="float32", kv_cache="int8")
    prompts = ["a", "a much longer prompt than the other"]
    alone = [engine.generate(p, 12) for p in prompts]
    assert engine.generate(prompts, 12) == alone
    assert "".join(engine.generate(prompts[1], 12, stream=True)) == alone[1]
    plain = qplug_core.load(folder, dtype="float32")
    assert engine.generate(prompts[1], 6, num_beams=3) == plain.generate(prompts[1], 6, num_beams=3)
    assert engine.cache_bytes_per_token == 2 * 2 * 2 * (16 + 4)
    assert plain.cache_bytes_per_token is None
    with pytest.raises(UsageError, match="beams"):
        engine.generate("a", 3, stream=True, num_beams=2)


def test_words_for_a_cache():
    assert kv_scheme(None) is kv_scheme("auto") is None
    assert kv_scheme("bf16") == kv_scheme("16bit") == "16bit"
    assert kv_scheme("fp8") == kv_scheme("FP8_E4M3") == kv_scheme("Cfp8") == TensorQuant("fp8_e4m3", (0, 0))
    assert kv_scheme("C8") == kv_scheme("int8") == TensorQuant("int8", (1, 0), dynamic=True)
    with pytest.raises(SchemeError, match="nvfp4"):
        kv_scheme("int9")


def with_scales(folder: Path, out: Path, scale: float | None, **kv) -> Path:
    """A compressed-tensors checkpoint of 16-bit weights with an FP8 cache, as llm-compressor writes it."""
    make_model(out)
    config = json.loads((out / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False, **kv}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": [], "kv_cache_scheme": scheme,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(out / "model.safetensors")
    if scale is not None:
        for layer in range(2):
            for which in "kv":
                tensors[f"model.layers.{layer}.self_attn.{which}_scale"] = torch.tensor([scale], dtype=torch.bfloat16)
    save_file(tensors, out / "model.safetensors")
    return out


compressed = pytest.mark.skipif(
    not any("compressed-tensors" in e.decl.detects for e in get_registry().formats), reason="needs that plugin"
)


@compressed
def test_stored_scales_are_used(tmp_path):
    good, coarse = (with_scales(tmp_path, tmp_path / str(s), s) for s in (0.004, 40.0))
    plain = qplug_core.load(good, dtype="float32", kv_cache="16bit").logits(IDS)
    assert distance(qplug_core.load(good, dtype="float32").logits(IDS), plain) < 0.03
    assert distance(qplug_core.load(coarse, dtype="float32").logits(IDS), plain) > 0.05


@compressed
def test_missing_scales_are_one_and_said(tmp_path):
    folder = with_scales(tmp_path, tmp_path / "m", None)
    engine = qplug_core.load(folder, dtype="float32")
    assert any("they are 1" in note for note in engine.plan.all_notes())
    assert distance(engine.logits(IDS), qplug_core.load(folder, dtype="float32", kv_cache="16bit").logits(IDS)) < 0.1


@compressed
@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(tmp_path, scale):
    with pytest.raises(CheckpointError, match="positive finite"):
        qplug_core.load(with_scales(tmp_path, tmp_path / "m", scale))
