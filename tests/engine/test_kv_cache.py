"""A quantized KV cache in the reference engine: right numbers in every way of generating, and wrong ones told apart."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import qplug_core
from qplug_core.cli import main
from qplug_core.engine.cache import bytes_per_token, quant_cache
from qplug_core.errors import CheckpointError, SchemeError, UsageError
from qplug_core.kv import kv_meaning, kv_scheme
from qplug_core.reference.kv_cache import CacheCoder
from qplug_core.registry import get_registry
from qplug_core.scheme import QuantScheme, TensorQuant

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import DATA, make_model

ROOT = Path(__file__).parents[2]

IDS = torch.arange(2, 82).view(2, 40)
WORDS = ("fp8", "fp8_e5m2", "int8", "int8.asym", "int4", "int4.asym", "int4.g8", "nvfp4")


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


@pytest.mark.parametrize(("kv", "width"), [("int8", 16 + 4), ("int8.asym", 16 + 5)])
def test_batches_padding_streaming_and_beams(folder, kv, width):
    """On kernels in C, and on torch, which codes what they do not."""
    engine = qplug_core.load(folder, dtype="float32", kv_cache=kv)
    prompts = ["a", "a much longer prompt than the other"]
    alone = [engine.generate(p, 12) for p in prompts]
    assert engine.generate(prompts, 12) == alone
    assert "".join(engine.generate(prompts[1], 12, stream=True)) == alone[1]
    plain = qplug_core.load(folder, dtype="float32")
    assert engine.generate(prompts[1], 6, num_beams=3) == plain.generate(prompts[1], 6, num_beams=3)
    assert engine.cache_bytes_per_token == 2 * 2 * 2 * width
    assert plain.cache_bytes_per_token is None
    with pytest.raises(UsageError, match="beams"):
        engine.generate("a", 3, stream=True, num_beams=2)


@pytest.mark.parametrize(
    ("word", "same"),
    [
        ("W8A8C8", "int8"), ("WNF4A8C8", "int8"), ("w8a8c8", "int8"), ("W16A16C4", "int4"), ("float8_e4m3fn", "fp8"),
        ("block_wise_fp8", "fp8"), ("int8_zp", "int8.asym"), ("int4_zp", "int4.asym"), ("fp4_e2m1", "nvfp4"), ("fp8_inc", "fp8"),
        ("Cfp8_e5m2", "fp8_e5m2"), ("C8.asym", "int8.asym"),
        *((word, "16bit") for word in ("W8A8C16", "W4A16C16", "WInt4", "weight-only int4", "Wfp8Afp8", "W4Afp8", "C16", "wint8")),
    ],
)  # fmt: skip
def test_words_of_engines_and_whole_schemes_print_what_they_mean(word, same):
    assert kv_scheme(word) == kv_scheme(same)
    assert repr(word) in kv_meaning(word)
    assert kv_meaning(same) in ("", f"KV cache {same!r} means {kv_meaning(word).partition(' means ')[2]}")


def test_the_meaning_is_a_note_of_the_plan(llama):
    for options in ({"kv_cache": "W8A8C8"}, {"kv_cache": "int8_zp"}):
        notes = list(qplug_core.load(llama, **options).plan.all_notes())
        assert any("KV cache" in note and "means int8" in note for note in notes)
    assert not [n for n in qplug_core.load(llama, kv_cache="int8").plan.all_notes() if "means" in n]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("fp88", "did you mean 'fp8'"),
        ("int9", "did you mean 'int8'"),
        ("float8_e4m3fn_zp", "no zero points"),
        ("paged", "was needed"),
    ],
)
def test_wrong_words_are_refused_in_one_sentence(word, said):
    with pytest.raises(SchemeError, match=said) as refused:
        kv_scheme(word)
    assert ". " not in str(refused.value)


@pytest.mark.parametrize(
    "name", ["gptqmodel-w4-g128-sym-descact", "mixtral-autoawq-gemm-g64", "deepseekv3-transformers-fp8block-perexpert"]
)
@pytest.mark.parametrize("kv", ["fp8", "C8"])
def test_a_cache_on_any_checkpoint(name, kv):
    """Also where keys are wider than values (MLA), and beside quantized weights that know nothing of a cache."""
    plain, cached = (qplug_core.load(DATA / name, dtype="float32", activations="16bit", kv_cache=c) for c in (None, kv))
    assert len(cached.plan.caches) == cached.model.config.num_hidden_layers
    ids = IDS % plain.model.config.vocab_size
    assert 1e-4 < distance(cached.logits(ids), plain.logits(ids)) < 0.1


def test_the_command_prints_bytes_per_token(llama):
    run = CliRunner().invoke(main, ["generate", str(llama), "--prompt", "ab", "--max-new-tokens", "3", "--kv-cache", "C8"])
    assert f"KV cache: {2 * 2 * 2 * (16 + 4)} bytes per token" in run.stderr
    refused = CliRunner().invoke(main, ["generate", str(llama), "--prompt", "ab", "--kv-cache", "C88"])
    assert refused.exit_code == 2
    assert "did you mean 'c8'" in refused.stderr
    assert "Traceback" not in refused.stderr


def benchmark():
    """The script whose results are a page."""
    spec = importlib.util.spec_from_file_location("kv_cache_benchmark", ROOT / "benchmarks" / "kv_cache.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_holds_the_table_of_the_results():
    report = json.loads((ROOT / "benchmarks" / "results" / "kv_cache.json").read_text())
    text = (ROOT / "docs" / "kv_cache.md").read_text(encoding="utf-8")
    assert benchmark().page_with(text, report) == text
    for row in report["rows"]:
        word = row["asked"].strip("`")
        if row["name"]:
            width = 128
        elif word == "16bit":
            width = 256
        else:
            kv = kv_scheme(word)
            width = CacheCoder(kv if kv.dynamic else replace(kv, block=(1, 0), dynamic=True)).width(128)
        assert row["counted"] == 2 * report["layers"] * 8 * width
        assert row["counted"] <= row["measured"] < 1.03 * row["counted"]
        assert row["error"] <= row["bound"]


def test_counted_bytes_are_resident_memory(tmp_path):
    """The benchmark, small: what the system says that the pages of a cache take is what is printed."""
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "kv_cache.py"),
        "--layers",
        "4",
        "--tokens",
        "2048",
        "--json",
        tmp_path / "r",
    ]
    subprocess.run(command, check=True, capture_output=True)
    for row in json.loads((tmp_path / "r").read_text())["rows"]:
        assert row["counted"] <= row["measured"] < 1.06 * row["counted"], row
        assert row["bound"] / 10 <= row["error"] <= row["bound"], row


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


@compressed
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_scale_of_one_half_alone_is_refused(tmp_path, which):
    folder = with_scales(tmp_path, tmp_path / "m", 0.01)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.layers.1.self_attn.{which}_scale"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="the one of the other half is not stored"):
        qplug_core.load(folder)


@compressed
@pytest.mark.parametrize("number", ["float", "int"])
def test_scales_for_each_head_are_used_for_their_head(tmp_path, number):
    """Head 0 has a right scale and head 1 a coarse one; exchanged, the logits are others."""
    right, exchanged = (with_scales(tmp_path, tmp_path / name, None, strategy="attn_head", type=number) for name in "ab")
    for folder, scales in ((right, (0.03, 0.9)), (exchanged, (0.9, 0.03))):
        tensors = load_file(folder / "model.safetensors")
        for layer in range(2):
            for which in "kv":
                tensors[f"model.layers.{layer}.self_attn.{which}_scale"] = torch.tensor(scales).reshape(2, 1, 1)
        save_file(tensors, folder / "model.safetensors")
    plain = qplug_core.load(right, dtype="float32", kv_cache="16bit").logits(IDS)
    engine, other = (qplug_core.load(folder, dtype="float32") for folder in (right, exchanged))
    assert engine.plan.caches[0].scheme.block == (-1, 0)
    assert distance(engine.logits(IDS), other.logits(IDS)) > 1e-3
    keys = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    coder = engine.coders[0][0]
    errors = [distance(coder.decode(coder.encode(keys), 16, torch.float32)[:, h], keys[:, h]) for h in (0, 1)]
    assert errors[0] < 0.05
    assert number == "float" or errors[1] > 0.1
    assert distance(engine.logits(IDS), plain) > 1e-5
