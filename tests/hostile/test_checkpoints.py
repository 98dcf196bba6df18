"""Damaged and lying checkpoints: one sentence naming the thing, exit code 4, nothing loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qplug_core
from qplug_core.errors import QplugError

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import DATA

GPTQ = DATA / "gptqmodel-w4-g128-sym-descact"
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GPTQ, tmp_path / "model")
    (tmp_path / "model" / "ref.safetensors").unlink()
    return tmp_path / "model"


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def drop(name):
    return lambda folder: edit(folder, lambda t: t.pop(name))


def put(name, value):
    return lambda folder: edit(folder, lambda t: t.update({name: value}))


def rename(old, new):
    return lambda folder: edit(folder, lambda t: t.update({new: t.pop(old)}))


def cut(name, change):
    return lambda folder: edit(folder, lambda t: t.update({name: change(t[name])}))


def config(**values):
    return lambda folder: edit_config(folder, lambda c: c["quantization_config"].update(values))


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def shard_twice(folder):
    shutil.copy(folder / "model.safetensors", folder / "a.safetensors")
    (folder / "model.safetensors").rename(folder / "b.safetensors")


def index(weight_map):
    def change(folder):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


CASES = {
    "missing tensor": (drop(f"{LAYER}.scales"), [f"{LAYER}.scales", "missing"]),
    "missing plain tensor": (drop("model.norm.weight"), ["model.norm.weight"]),
    "extra tensor": (put("model.layers.0.extra.weight", torch.zeros(2)), ["model.layers.0.extra.weight", "not claimed"]),
    "misnamed tensor": (rename(f"{LAYER}.qzeros", f"{LAYER}.qzero"), ["qzeros", f"is {LAYER}.qzero meant"]),
    "wrong dtype": (cut(f"{LAYER}.qweight", lambda t: t.float()), [f"{LAYER}.qweight", "F32"]),
    "wrong shape": (cut(f"{LAYER}.scales", lambda t: t[:1]), [LAYER, "group"]),
    "plain weight beside a quantized one": (put(f"{LAYER}.weight", torch.zeros(256, 256)), [f"{LAYER}.weight"]),
    "scale of a scheme that has none": (put(f"{LAYER}.input_scale", torch.zeros(1)), [f"{LAYER}.input_scale"]),
    "truncated": (truncate, ["model.safetensors", "truncated"]),
    "header is not JSON": (write("model.safetensors", b"\x08\0\0\0\0\0\0\0notjson!"), ["JSON"]),
    "header of absurd length": (write("model.safetensors", b"\xff" * 64), ["model.safetensors"]),
    "empty file": (write("model.safetensors", b""), ["model.safetensors"]),
    "one tensor in two files": (shard_twice, ["a.safetensors", "b.safetensors"]),
    "index names a missing shard": (index({"x": "model-00001-of-00002.safetensors"}), ["model-00001-of-00002.safetensors"]),
    "index names a missing tensor": (index({"x": "model.safetensors"}), ["x", "model.safetensors"]),
    "index without a map": (index({}), ["weight_map"]),
    "no weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ["safetensors"]),
    "config is not JSON": (write("config.json", b"{"), ["config.json"]),
    "config is not UTF-8": (write("config.json", b"\xff\xfe{}"), ["config.json"]),
    "config is a list": (write("config.json", b"[]"), ["config.json", "list"]),
    "unknown architecture": (lambda f: edit_config(f, lambda c: c.update(model_type="nonesuch")), ["nonesuch"]),
    "no architecture": (lambda f: edit_config(f, lambda c: c.pop("model_type")), ["model_type"]),
    "unknown method": (config(quant_method="nonesuch"), ["nonesuch", "gptq"]),
    "unknown key": (config(secret_rotation=True), ["secret_rotation"]),
    "contradicting keys": (config(w_bit=8), ["w_bit"]),
    "bits that the tensors contradict": (config(bits=8), ["8"]),
    "bits that are no number": (config(bits="four"), ["bits"]),
    "group size that the tensors contradict": (config(group_size=64), ["64"]),
    "a rule that is no expression": (config(dynamic={"-:(": {}}), ["("]),
    "v2 zero points called v1": (
        lambda f: edit(f, lambda t: t.update({n: v + 0x11111111 for n, v in t.items() if n.endswith("qzeros")})),
        ["gptq_v2"],
    ),
    "group index out of range": (cut(f"{LAYER}.g_idx", lambda t: t + 7), ["g_idx"]),
}


@pytest.mark.parametrize("name", CASES)
def test_one_sentence(folder, name):
    change, words = CASES[name]
    change(folder)
    with pytest.raises(QplugError) as caught:
        qplug_core.load(folder)
    text = str(caught.value)
    assert caught.value.exit_code == 4
    assert "\n" not in text
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    "name", ["missing tensor", "truncated", "unknown key", "config is not JSON", "unknown architecture"]
)
@pytest.mark.parametrize("command", [["explain"], ["generate", "--prompt", "x"]], ids=["explain", "generate"])
def test_the_command_line(folder, name, command):
    CASES[name][0](folder)
    arguments = [sys.executable, "-m", "qplug_core", command[0], str(folder), *command[1:]]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 4, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_quantizing_what_is_quantized(folder):
    with pytest.raises(QplugError, match="already"):
        qplug_core.load(folder, quantize="W8A16")


def test_nan_weights_are_not_quantized(llama):
    edit(llama, lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(float("nan")))
    with pytest.raises(QplugError, match="NaN"):
        qplug_core.load(llama, quantize="W8A16")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"quantize": "W9A16"}, "W9A16"),
        ({"quantize": "W8A8_static"}, "W8A8_static"),
        ({"dtype": "int8"}, "int8"),
        ({"kernels": "fast"}, "fast"),
        ({"pin": {"*": "no.such_kernel"}}, "no.such_kernel"),
        ({"quantize": "W8A16", "forbid": ["*"]}, "no kernel"),
    ],
)
def test_bad_options(llama, options, word):
    with pytest.raises(QplugError, match=word):
        qplug_core.load(llama, **options)
