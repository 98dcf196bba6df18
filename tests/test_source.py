"""Sources: what is read, what is copied, and what is given back."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from qplug_core.errors import CheckpointError
from qplug_core.source import MemorySource, Source

TENSORS = {
    "a": torch.arange(24, dtype=torch.float32).view(4, 6),
    "b": torch.arange(8, dtype=torch.int8),
    "c": torch.randn(3, 5).to(torch.bfloat16),
    "d": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(2.5),
}


@pytest.fixture
def source(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "x"}}))
    return Source.open(tmp_path)


@pytest.mark.parametrize("name", TENSORS)
def test_what_is_read_is_what_was_written(source, name):
    read = source.read(name)
    assert read.dtype == TENSORS[name].dtype
    assert torch.equal(read.float(), TENSORS[name].float())
    source.release(name)
    assert torch.equal(source.read(name).float(), TENSORS[name].float())


def test_a_cut(source):
    assert torch.equal(source.read("a", (slice(1, 3), slice(2, 5))), TENSORS["a"][1:3, 2:5])
    assert torch.equal(source.read("a", (2,)), TENSORS["a"][2])


def test_a_copy_outlives_the_file(source):
    read = source.read("a")
    source.close()
    assert torch.equal(read, TENSORS["a"])


def test_configs(source, tmp_path):
    assert source.quant_config == {"quant_method": "x"}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "quantize_config.json").write_text('{"bits": 4}')
    (tmp_path / "smoothquant.ini").write_text("[llama]\n")
    again = Source.open(tmp_path)
    assert again.quant_config == {"bits": 4}
    assert again.quant_config_from == "quantize_config.json"
    assert "smoothquant.ini" in again.files


def test_memory_is_a_source_too(source):
    memory = MemorySource(TENSORS)
    assert {n: (i.dtype, i.shape) for n, i in memory.tensors.items()} == {
        n: (i.dtype, i.shape) for n, i in source.tensors.items()
    }
    assert torch.equal(memory.read("a", (slice(0, 2),)), TENSORS["a"][:2])


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}, "needs 16"),
        ({"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}, "F99"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 400]}, "damaged"),
        ({"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}, "truncated"),
        ({"dtype": "F32", "data_offsets": [0, 16]}, "shape"),
        ({"dtype": "F32", "shape": [-4], "data_offsets": [16, 0]}, "t"),
        (7, "t"),
    ],
)
def test_a_header_that_lies(tmp_path, entry, word):
    header = json.dumps({"t": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(CheckpointError, match=word):
        Source.open(tmp_path / "x.safetensors")
