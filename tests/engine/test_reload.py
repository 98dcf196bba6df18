"""New 16-bit weights into a running quantized model, as reinforcement learning does: a hundred times, in place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qplug_core
from qplug_core.engine.memory import trim
from qplug_core.errors import CheckpointError
from qplug_core.source import MemorySource, Source

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import make_model

IDS = torch.arange(40).view(2, 20) % 250
SCHEMES = ["W4A16_g32_asym", "W8A8", "Wfp8Afp8_b32x32", "Wnvfp4A16", "W8A16"]
KINDS = {
    "llama": {}, "qwen2": {"tie_word_embeddings": True}, "phi3": {"pad_token_id": 0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
}  # fmt: skip
ROUNDS = 100


def weights(folder, seed):
    """A step of training: every tensor of the checkpoint moves, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        step = torch.randn(tensor.shape, generator=generator) * 0.02
        moved[name] = (tensor.float() + step).to(tensor.dtype)
    return moved


def packed(engine):
    """Every packed tensor and every plain parameter, by name."""
    found = {f"{n}.{k}": t for n, m in engine.methods.items() for k, t in m.tensors().items()}
    return found | dict(engine.model.named_parameters())


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(engine, fresh):
    mine, theirs = packed(engine), packed(fresh)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(bits(mine[name]), bits(theirs[name])), name


def fresh_load(folder, tensors, place, **options):
    """The same weights, loaded from files."""
    if not place.exists():
        place.mkdir()
        for file in folder.glob("*.json"):
            (place / file.name).write_bytes(file.read_bytes())
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return qplug_core.load(place, **options)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_reload_is_a_fresh_load(tmp_path, kind, scheme):
    folder = make_model(tmp_path / kind, kind, **KINDS[kind])
    engine = qplug_core.load(folder, dtype="float32", quantize=scheme)
    first = engine.logits(IDS)
    new = weights(folder, 1)
    engine.reload(MemorySource(new))
    fresh = fresh_load(folder, new, tmp_path / "new", dtype="float32", quantize=scheme)
    assert_same_bits(engine, fresh)
    assert torch.equal(engine.logits(IDS), fresh.logits(IDS))
    assert not torch.equal(engine.logits(IDS), first)


def test_global_scales_that_were_equal_may_differ_later(tmp_path):
    """Two halves of a fused layer with one extreme value at load, and two after a step: no shape may depend on that."""
    folder = make_model(tmp_path / "mixtral", "mixtral", **KINDS["mixtral"])
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(("w1.weight", "w3.weight")):
            tensors[name][0, 0] = 2.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    engine = qplug_core.load(folder, quantize="Wnvfp4A16")
    new = weights(folder, 1)
    engine.reload(MemorySource(new))
    assert_same_bits(engine, fresh_load(folder, new, tmp_path / "new", quantize="Wnvfp4A16"))


@pytest.mark.parametrize("scheme", ["W4A16_g32_asym", "W8A8", "Wnvfp4A16"])
def test_a_hundred_reloads_stay_in_place_and_do_not_drift(llama, tmp_path, scheme):
    engine = qplug_core.load(llama, quantize=scheme)
    addresses = {name: t.data_ptr() for name, t in packed(engine).items()}
    original = load_file(llama / "model.safetensors")
    first = {name: t.clone() for name, t in packed(engine).items()}
    for step in range(ROUNDS):
        new = weights(llama, step)
        engine.reload(MemorySource(new))
        if step in (0, ROUNDS // 2, ROUNDS - 1):
            assert_same_bits(engine, fresh_load(llama, new, tmp_path / "new", quantize=scheme))
    assert {name: t.data_ptr() for name, t in packed(engine).items()} == addresses
    changed = [name for name, t in packed(engine).items() if not torch.equal(bits(t), bits(first[name]))]
    assert len(changed) > len(first) // 2
    engine.reload(MemorySource(original))
    for name, tensor in packed(engine).items():
        assert torch.equal(bits(tensor), bits(first[name])), name


@pytest.mark.parametrize("leak", [False, True], ids=["as-it-is", "one-copy-leaks"])
def test_memory_of_a_hundred_reloads(tmp_path, leak):
    """Resident memory after a warm-up: a twentieth of one kept copy for each round would fail."""
    folder = make_model(tmp_path / "big", hidden_size=256, intermediate_size=1024, head_dim=64)
    engine = qplug_core.load(folder, quantize="W8A16")
    size = sum(m.nbytes for m in engine.methods.values())
    kept = []

    def rounds(start, stop):
        for step in range(start, stop):
            engine.reload(MemorySource(weights(folder, step)))
            if leak:
                kept.append([t.clone() for m in engine.methods.values() for t in m.tensors().values()])
        trim()
        return resident()

    growth = -rounds(0, 20) + rounds(20, ROUNDS)
    assert (growth > (ROUNDS - 20) * size // 20) == leak, f"{growth / 1e6:.1f} MB for weights of {size / 1e6:.1f} MB"


def resident():
    """Bytes of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))


def test_a_quantized_checkpoint_reloads_from_another(llama, tmp_path):
    other = fresh_load(llama, weights(llama, 3), tmp_path / "other").source.path
    for name, folder in (("a", llama), ("b", other)):
        qplug_core.quantize(folder, tmp_path / name, scheme="W4A16_g32", format="gptq")
    engine, fresh = (qplug_core.load(tmp_path / name) for name in "ab")
    assert not torch.equal(engine.logits(IDS), fresh.logits(IDS))
    engine.reload(Source.open(tmp_path / "b"))
    assert_same_bits(engine, fresh)
    assert torch.equal(engine.logits(IDS), fresh.logits(IDS))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("how", ["missing", "shape"])
def test_weights_that_do_not_fit_change_nothing(llama, name, how):
    engine = qplug_core.load(llama, quantize="W8A16")
    before = {key: t.clone() for key, t in packed(engine).items()}
    new = weights(llama, 1)
    new[name] = new[name][:-1]
    if how == "missing":
        del new[name]
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        engine.reload(MemorySource(new))
    assert all(torch.equal(t, before[key]) for key, t in packed(engine).items())
