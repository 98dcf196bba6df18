"""Files that are refused, each in one sentence, and configs that are."""

from __future__ import annotations

import contextlib
import shutil
import struct
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qplug_gguf.header import read_header
from qplug_gguf.loader import GGUFFormat, SuperBlockFormat, quant_of
from qplug_gguf.source import open_gguf

import qplug_core
from qplug_core.decl import Declarations, FormatDecl
from qplug_core.errors import CannotEncode, CheckpointError, ConfigError, CoverError, PluginError
from qplug_core.planner import assumed_source
from qplug_core.quantizer import IQ4_NL
from qplug_core.registry import Registry, get_registry
from qplug_core.scheme import QuantScheme
from qplug_core.testing import random_weight

sys.path.insert(0, str(Path(__file__).parent))
from gguf_files import add_vocabulary, model_of, write


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("good") / "m.gguf"
    write(path, model_of("llama", num_hidden_layers=1), "Q8_0")
    return path


def refused(path: Path, match: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error, match=match) as caught:
        qplug_core.load(path, dtype="float32", kernels="reference")
    assert "\n" not in str(caught.value)


def patched(good: Path, tmp_path: Path, change) -> Path:
    data = bytearray(good.read_bytes())
    path = tmp_path / "bad.gguf"
    changed = change(data)
    path.write_bytes(bytes(data if changed is None else changed))
    return path


def test_wrong_magic(good, tmp_path):
    def change(data):
        data[:4] = b"GGML"

    refused(patched(good, tmp_path, change), "starts with b'GGML'; a GGUF file starts with b'GGUF'")


def test_safetensors_under_another_name(tmp_path):
    (tmp_path / "m.gguf").write_bytes(struct.pack("<Q", 2) + b"{}")
    refused(tmp_path / "m.gguf", "a GGUF file starts with b'GGUF'")


@pytest.mark.parametrize("length", [0, 3, 7, 8, 20, 100, 4000])
def test_truncated_header(good, tmp_path, length):
    refused(patched(good, tmp_path, lambda data: data[:length]), "fetch it again")


def test_truncated_data(good, tmp_path):
    refused(patched(good, tmp_path, lambda data: data[:-64]), "the file ends at byte")


def test_big_endian_file(tmp_path):
    write(tmp_path / "m.gguf", model_of("llama", num_hidden_layers=1), "F32", endianess=gguf.GGUFEndian.BIG)
    refused(tmp_path / "m.gguf", "big-endian GGUF file; .*gguf-convert-endian")


def test_version_1(good, tmp_path):
    def change(data):
        data[4:8] = struct.pack("<I", 1)

    refused(patched(good, tmp_path, change), "version 1; versions 2 and 3 are read")


def type_position(data: bytes, name: str) -> int:
    """Where the type of a tensor stands: after its name, the number of dimensions and the dimensions."""
    after = data.index(name.encode()) + len(name)
    return after + 4 + 8 * struct.unpack_from("<I", data, after)[0]


@pytest.mark.parametrize(
    ("code", "match"), [(999, "999 is not a valid"), (4, "4 is not a valid"), (15, "GGUF type Q8_K; .*Q4_0")]
)
def test_unknown_type(good, tmp_path, code, match):
    """A type that nobody knows, one that llama.cpp dropped (Q4_2), and one that is never in a file."""

    def change(data):
        struct.pack_into("<I", data, type_position(data, "blk.0.attn_v.weight"), code)

    refused(patched(good, tmp_path, change), match)


def test_counts_beyond_the_file_end_at_once(good, tmp_path):
    """An array that claims 2**60 elements: the package's own reader goes on for ever."""

    def change(data):
        at = data.index(b"tokenizer.ggml.scores") + len("tokenizer.ggml.scores") + 8
        struct.pack_into("<Q", data, at, 2**60)

    refused(patched(good, tmp_path, change), "the file ends at byte")


@pytest.mark.parametrize("layers", [0, 2**31])
def test_layers_that_the_file_cannot_hold_end_at_once(good, tmp_path, layers):
    """A damaged count: names were made for two thousand million layers."""

    def change(data):
        at = data.index(b"llama.block_count") + len("llama.block_count") + 4
        struct.pack_into("<I", data, at, layers)

    refused(patched(good, tmp_path, change), f"says it has {layers} layers and holds")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_headers_are_one_sentence(good, tmp_path_factory, data):
    """Any bytes of the header changed: read, or refused; never another exception."""
    content = bytearray(good.read_bytes())
    at = data.draw(st.integers(0, 3500))
    content[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
    path = tmp_path_factory.mktemp("damaged") / "m.gguf"
    path.write_bytes(bytes(content))
    with contextlib.suppress(CheckpointError):
        open_gguf(path)


def test_missing_part(tmp_path):
    write(tmp_path / "model.gguf", model_of("llama"), "Q8_0", split_max_tensors=6)
    parts = sorted(tmp_path.glob("*.gguf"))
    parts[1].unlink()
    refused(tmp_path, f"lacks {parts[1].name}")
    refused(parts[0], f"lacks {parts[1].name}")


def test_renamed_part(tmp_path):
    write(tmp_path / "model.gguf", model_of("llama"), "Q8_0", split_max_tensors=6)
    shutil.copy(sorted(tmp_path.glob("*.gguf"))[0], tmp_path / "renamed.gguf")
    refused(tmp_path / "renamed.gguf", "part 1 of .*; part 1 of 1 was needed")


def test_several_models_in_a_folder(good, tmp_path):
    for name in ("a-Q4_0.gguf", "a-Q8_0.gguf"):
        shutil.copy(good, tmp_path / name)
    refused(tmp_path, r"holds 2 GGUF models \(a-Q4_0.gguf, a-Q8_0.gguf\); give the path of one")


def test_safetensors_beside_win_unless_the_gguf_is_the_model(good, tmp_path):
    """A folder with model.safetensors is that checkpoint; other safetensors are no weights beside model.gguf."""
    shutil.copy(good, tmp_path / "model.gguf")
    (tmp_path / "extra.safetensors").write_bytes(b"")
    assert qplug_core.load(tmp_path, kernels="reference").plan.method == "gguf"
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path, "no whole safetensors header")


def test_without_the_plugin_the_file_is_named(good):
    with pytest.raises(CheckpointError, match="pip install qplug-gguf"):
        qplug_core.load(good, registry=Registry([]))


def test_two_plugins_that_open_one_suffix(good):
    """Which of two would read the file must not depend on install order."""
    registry = get_registry()
    rival = FormatDecl("rival", impl="rival:Format", opens=(".gguf",))
    rows = [replace(row) for row in registry.plugins]
    rows.append(replace(rows[-1], name="rival", distribution="rival", declarations=Declarations(formats=(rival,))))
    both = Registry(rows)
    both._collect({})
    with pytest.raises(PluginError, match=r"'.gguf'.*qplug-gguf and rival|rival.*qplug-gguf"):
        qplug_core.load(good, registry=both)


def test_other_architectures_are_refused_by_name(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "gemma2")
    add_vocabulary(writer, 8)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(path, "architecture 'gemma2'; llama, qwen2, qwen3 are read", ConfigError)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_count", 8),
        ("logit_scale", 0.5),
        ("attention.causal", False),
        ("attention.head_count_kv", [2, 2]),
        ("attention.sliding_window", 64),
        ("rope.dimension_count", 32),
        ("rope.scaling.type", "longrope"),
        ("block_count", None),
    ],
)
def test_keys_that_change_numbers(tmp_path, key, value):
    write(tmp_path / "m.gguf", model_of("llama", num_hidden_layers=1), "F32", extra={key: value})
    refused(tmp_path / "m.gguf", "longrope" if key == "rope.scaling.type" else key, ConfigError)


def test_tensors_that_nobody_needs(tmp_path):
    """Nothing is skipped in silence: a tensor of another model keeps its GGUF name in the message."""
    extra = {"blk.0.attn_sinks.weight": np.zeros(4, dtype=np.float32)}
    write(tmp_path / "m.gguf", model_of("llama", num_hidden_layers=1), "Q8_0", tensors=extra)
    refused(tmp_path / "m.gguf", "not claimed by any layer: blk.0.attn_sinks.weight", CoverError)


def test_missing_tensor(tmp_path):
    write(tmp_path / "m.gguf", model_of("llama", num_hidden_layers=1), "Q8_0", leave=("blk.0.ffn_up.weight",))
    refused(tmp_path / "m.gguf", "missing: model.layers.0.mlp.up_proj.weight", CoverError)


def test_no_embedding(tmp_path):
    write(tmp_path / "mmproj.gguf", model_of("llama", num_hidden_layers=1), "Q8_0", leave=("token_embd.weight",))
    refused(tmp_path, "has no token_embd.weight")


def test_a_header_reads_no_weights(good):
    header = read_header(good)
    assert header.architecture == "llama"
    by_name = {t.name: t for t in header.tensors}
    assert (by_name["blk.0.ffn_up.weight"].shape, by_name["blk.0.ffn_up.weight"].bytes_shape) == ((512, 256), (512, 272))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"quant_method": "gguf"}, "an object of module names and GGUF types was needed"),
        ({"quant_method": "gguf", "types": {"lm_head": "Q9_0"}}, "lm_head is of GGUF type Q9_0"),
        ({"quant_method": "gguf", "types": {"lm_head": "Q8_0"}, "imatrix": 1}, "'imatrix'"),
    ],
)
def test_configs(config, match):
    with pytest.raises(ConfigError, match=match):
        GGUFFormat().parse(assumed_source(config))


def test_config_without_files():
    config = GGUFFormat().parse(assumed_source({"quant_method": "gguf", "types": {"lm_head": "Q6_K"}}))
    assert [(str(rule.matcher.text), rule.quant) for rule in config.rules] == [("lm_head", quant_of("q6_k", ""))]


def weight_of(name: str, **changes):
    scheme = QuantScheme.parse(name)
    weight = random_weight(scheme, 4, 64, torch.Generator().manual_seed(0), scale_dtype=torch.float16)
    return weight.with_tensors(changes)


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (weight_of("W4A16_g64"), "scheme W4A16_g64 was given"),
        (weight_of("W4A16_g32", scales=torch.ones(4, 2)), "scales of torch.float32"),
        (weight_of("W4A16_g32", pre_scale=torch.ones(64)), "with pre_scale"),
        (weight_of("W4A16_g32_asym"), "with zeros"),
        (weight_of("Wiq4nlA16", codebook=torch.tensor(IQ4_NL) / 2), "another codebook"),
        (weight_of("W6A16_g16"), "scheme W6A16_g16 was given"),
    ],
)
def test_weights_that_no_type_holds(weight, match):
    with pytest.raises(CannotEncode, match=match):
        GGUFFormat().quant_for_scheme(weight)


def test_super_blocks_are_not_written():
    with pytest.raises(CannotEncode, match="Q6_K was asked for, whose super-blocks"):
        SuperBlockFormat().encode(weight_of("W6A16_g16"), quant_of("q6_k", ""))
