"""Buffers that no checkpoint holds: computed by the model that owns them, or refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qplug_core
from qplug_core.engine.skeleton import skeleton
from qplug_core.errors import CoverError

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from families import FAMILIES


@pytest.mark.parametrize("name", ["LLaVA", "VILA", "Nougat", "Gemma 3", "LLaMA 3", "gpt-oss", "BERT"])
def test_buffers_are_those_of_transformers(name, tmp_path):
    """Position ids of a vision tower inside of a model were uninitialised memory once."""
    family = FAMILIES[name]
    expected = getattr(transformers, family.cls).from_pretrained(family.build(tmp_path), dtype=torch.float32)
    buffers = dict(expected.named_buffers())
    assert buffers
    mine = dict(qplug_core.load(tmp_path, dtype="float32").model.named_buffers())
    assert mine.keys() == buffers.keys()
    for key, value in buffers.items():
        assert torch.equal(mine[key], value), key


def test_a_buffer_that_only_the_constructor_computes(monkeypatch):
    """Falcon-H1 computes one there, and initializing a module again, which is what gives other buffers their values, does not."""
    config = FAMILIES["LLaMA"].config()
    wanted = skeleton(config, torch.float32).model.rotary_emb.inv_freq
    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_init_weights", lambda self, module: None)
    model = skeleton(config, torch.float32)
    assert torch.equal(model.model.rotary_emb.inv_freq, wanted)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_position_ids_of_old_files_are_left_unread(tmp_path):
    """transformers 4 stored them (all-MiniLM-L6-v2 has them); any other tensor too many is still refused."""
    FAMILIES["BERT"].build(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["embeddings.position_ids"] = torch.arange(64)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    notes = qplug_core.load(tmp_path).plan.all_notes()
    assert any("left unread" in note for note in notes)
    tensors["embeddings.other_ids"] = torch.arange(64)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CoverError, match="other_ids"):
        qplug_core.load(tmp_path)
