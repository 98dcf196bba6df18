"""quantize(): what is written is what loading makes, whole or not at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import qplug_core
from qplug_core.cli import main
from qplug_core.errors import CannotEncode, QplugError, SchemeError, UsageError
from qplug_core.shards import ShardWriter

sys.path.insert(0, str(Path(__file__).parent))
from conftest import DATA, make_model, measure_memory

IDS = torch.arange(40).view(2, 20) % 250
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
KINDS = {"llama": {}, "qwen2": {"tie_word_embeddings": True}, "phi3": {"pad_token_id": 0}, "mixtral": MOE}
SCHEMES = {
    "W8A16": "compressed_tensors", "W8A8": "int8", "W4A16_g32_asym": "compressed_tensors", "Wfp8Afp8_b32x32": "compressed_tensors",
    "Wnvfp4A16": "modelopt", "linear=W8A16,experts=W4A16_g32": "compressed_tensors",
}  # fmt: skip


def logits(folder, **options):
    return qplug_core.load(folder, dtype="float32", kernels="reference", **options).logits(IDS)


def leftovers(folder):
    """What lies in ``folder`` besides the model, hidden files too."""
    return sorted(p.name for p in folder.iterdir() if p.name != "llama")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_is_online(tmp_path, kind, scheme):
    folder = make_model(tmp_path / kind, kind, **KINDS[kind])
    done = qplug_core.quantize(folder, tmp_path / "out", scheme=scheme)
    assert done.format == SCHEMES[scheme]
    assert torch.equal(logits(tmp_path / "out"), logits(folder, quantize=scheme))
    assert not torch.equal(logits(tmp_path / "out"), logits(folder))
    size = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert done.nbytes < size < done.nbytes + 2**16
    assert done.nbytes < done.nbytes_before


@pytest.mark.parametrize("fmt", ["gptq", "awq", "compressed_tensors", "modelopt"])
def test_a_named_format_stores_it(llama, tmp_path, fmt):
    assert qplug_core.quantize(llama, tmp_path / "out", scheme="W4A16_g32", format=fmt).format == fmt
    assert torch.equal(logits(tmp_path / "out"), logits(llama, quantize="W4A16_g32"))


@pytest.mark.parametrize("fmt", ["marlin", "fp8", "quark", "gptq_marlin_24", "fastdeploy"])
def test_a_named_format_says_why_not(llama, tmp_path, fmt):
    """Never something else than was asked for, and nothing on disk."""
    with pytest.raises(CannotEncode):
        qplug_core.quantize(llama, tmp_path / "out", scheme="W4A16_g32", format=fmt)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text"])
def test_stacked_experts_are_stored_one_by_one(tmp_path, kind):
    """Interleaved rows with biases (gpt-oss), and transposed stacks (Llama 4): gate and up apart, as other tools store them."""
    changes = {"intermediate_size": 64, "num_experts_per_tok": 1 + (kind == "gpt_oss")}
    changes |= (
        {"intermediate_size_mlp": 96, "interleave_moe_layer_step": 1, "moe_layers": None} if kind == "llama4_text" else {}
    )
    folder = make_model(tmp_path / "model", kind, num_local_experts=4, **changes)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(("_bias", ".bias")):
            tensors[name] = torch.randn(tensors[name].shape, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for scheme in ("W4A16_g32", "Wmxfp4A16"):
        out = tmp_path / scheme
        qplug_core.quantize(folder, out, scheme=scheme)
        names = set(load_file(out / "model.safetensors"))
        assert any(".experts.0.gate_proj." in name for name in names)
        assert not any(name.endswith(("gate_up_proj", "down_proj_bias")) for name in names)
        assert torch.equal(logits(out), logits(folder, quantize=scheme))


def test_fused_on_disk_and_split_in_the_model(llama, tmp_path):
    tensors = load_file(llama / "model.safetensors")
    for layer in (0, 1):
        place = f"model.layers.{layer}.self_attn"
        rows = [tensors.pop(f"{place}.{p}_proj.weight") for p in "qkv"]
        tensors[f"{place}.qkv_proj.weight"] = torch.cat(rows)
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    qplug_core.quantize(llama, tmp_path / "out", scheme="W8A16")
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert any(name.startswith("model.layers.0.self_attn.q_proj.") for name in names)
    assert not any("qkv_proj" in name for name in names)
    assert torch.equal(logits(tmp_path / "out"), logits(llama, quantize="W8A16"))


def test_one_changed_byte_changes_the_logits(llama, tmp_path):
    qplug_core.quantize(llama, tmp_path / "out", scheme="W4A16_g32")
    before = logits(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight_packed"][3, 2] ^= 0x70
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    assert not torch.equal(logits(tmp_path / "out"), before)


def test_shards(llama, tmp_path):
    qplug_core.quantize(llama, tmp_path / "one", scheme="W8A16")
    done = qplug_core.quantize(llama, tmp_path / "many", scheme="W8A16", shard_bytes=40_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert [f.name for f in files] == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.nbytes
    assert index["weight_map"].keys() == load_file(tmp_path / "one" / "model.safetensors").keys()
    assert torch.equal(logits(tmp_path / "many"), logits(tmp_path / "one"))


def test_other_files_go_along(llama, tmp_path):
    (llama / "1_Pooling").mkdir()
    (llama / "1_Pooling" / "config.json").write_text("{}")
    (llama / "pytorch_model.bin").write_bytes(b"old weights")
    (llama / ".cache").mkdir()
    (llama / ".cache" / "x").write_text("x")
    qplug_core.quantize(llama, tmp_path / "out", scheme="W8A16")
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors", "1_Pooling/config.json"} <= found
    assert not found & {"pytorch_model.bin", ".cache/x"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == json.loads((llama / "config.json").read_text())
    assert isinstance(qplug_core.load(tmp_path / "out").generate("hello", 4), str)
    assert (tmp_path / "out").stat().st_mode == llama.stat().st_mode


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(llama, tmp_path, monkeypatch, error):
    original, count = ShardWriter.add, [0]

    def add(self, name, tensor):
        count[0] += 1
        if count[0] == 20:
            raise error
        original(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "add", add)
    with pytest.raises(type(error)):
        qplug_core.quantize(llama, tmp_path / "out", scheme="W8A16", shard_bytes=10_000)
    assert count[0] == 20
    assert leftovers(tmp_path) == []


def test_a_checkpoint_that_would_not_load_is_not_written(llama, tmp_path, monkeypatch):
    """The result is planned before it gets its name: here a tensor is lost on the way."""
    original = ShardWriter.add

    def add(self, name, tensor):
        if name != "model.norm.weight":
            original(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "add", add)
    with pytest.raises(QplugError, match=r"model\.norm"):
        qplug_core.quantize(llama, tmp_path / "out", scheme="W8A16")
    assert leftovers(tmp_path) == []


def test_what_is_there_is_not_touched(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UsageError, match="holds something"):
        qplug_core.quantize(llama, tmp_path / "out", scheme="W8A16")
    assert leftovers(tmp_path) == ["out"]
    (tmp_path / "out" / "mine").unlink()
    qplug_core.quantize(llama, tmp_path / "out", scheme="W8A16")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"scheme": "W4A16_g32", "algorithm": "gptq"}, UsageError, "without calibration data.*rtn"),
        ({"scheme": "W4A16_g32", "calibration": ["text"]}, UsageError, "calibration data was given"),
        ({"scheme": "W4A16_g32", "algorithm": "fp4.mx_floor"}, SchemeError, "does not make"),
        ({"scheme": "W8A8C8"}, SchemeError, "kv_cache="),
        ({"scheme": "W8A8_static"}, QplugError, "no installed quantizer makes"),
        ({"scheme": "W4A16_g32", "format": "nothing"}, QplugError, "nothing"),
        ({"scheme": "W4A16_g32", "format": "auto-round"}, CannotEncode, "not written"),
        ({"scheme": "W9"}, SchemeError, "W9"),
    ],
)
def test_refusals(llama, tmp_path, options, error, words):
    with pytest.raises(error, match=words) as caught:
        qplug_core.quantize(llama, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == []


def test_a_quantized_checkpoint_is_refused(tmp_path):
    with pytest.raises(UsageError, match="already"):
        qplug_core.quantize(DATA / "mixtral-gptqmodel-w4-g32-sym", tmp_path / "out", scheme="W8A16")


def test_nan_weights_are_refused(llama, tmp_path):
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(SchemeError, match="NaN"):
        qplug_core.quantize(llama, tmp_path / "out", scheme="W8A16")
    assert leftovers(tmp_path) == []


def test_a_named_algorithm_is_the_one_that_runs(llama, tmp_path):
    found = {}
    for algorithm in (None, "rtn", "fp4.mx_floor"):
        out = tmp_path / str(algorithm)
        qplug_core.quantize(llama, out, scheme="Wmxfp4A16", algorithm=algorithm)
        found[algorithm] = load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.weight_scale"]
    assert torch.equal(found[None], found["rtn"])
    assert not torch.equal(found["rtn"], found["fp4.mx_floor"])


def test_the_command(llama, tmp_path):
    arguments = ["quantize", str(llama), str(tmp_path / "out"), "--scheme", "wint8"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "14 layers as W8A16, stored as compressed_tensors (the first format that stores it without loss)" in done.output
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 2
    assert again.output.startswith("qplug: ")
    named = CliRunner().invoke(main, [*arguments[:2], str(tmp_path / "gptq"), "--scheme", "W4A16_g32", "--format", "gptq"])
    assert "stored as gptq (as asked)" in named.output


def test_memory_is_one_shard_and_one_layer(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 9, "head_dim": 256}
    code = """
qplug_core.quantize(sys.argv[1], sys.argv[1] + '-out', scheme='W8A16')
before = peak()
qplug_core.quantize(sys.argv[2], sys.argv[2] + '-out', scheme='W8A16', shard_bytes=2**24)
print(peak() - before)
"""
    big = make_model(tmp_path / "big", **sizes)
    (growth,) = measure_memory(code, make_model(tmp_path / "small"), big)
    layer = 4 * (3 * 1024 * 4096 + 4 * 1024 * 1024)
    written = sum(f.stat().st_size for f in Path(f"{big}-out").glob("*.safetensors"))
    # Quantization works in float32.
    assert growth < 2**24 + layer < written, f"grew by {growth / 1e6:.0f} MB of {(2**24 + layer) / 1e6:.0f} MB"


def test_configs_of_models_inside_of_models_stay(tmp_path):
    """The config goes through as it is: nothing that transformers would add or drop."""
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    written = json.loads((tmp_path / "model" / "config.json").read_text()) | {"my_own_key": [1, 2]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(written))
    qplug_core.quantize(tmp_path / "model", tmp_path / "out", scheme="W8A16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["my_own_key"] == [1, 2]
