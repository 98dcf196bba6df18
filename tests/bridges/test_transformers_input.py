"""What a user may give to from_pretrained that is wrong or unusual: one sentence, or the whole model, and nothing in between."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", "5.23")
pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM, GgufConfig  # noqa: E402
from transformers.quantizers import auto  # noqa: E402

import qplug_core.bridges.transformers as bridge  # noqa: E402
from qplug_core.bridges.transformers import QplugConfig, asked, gguf, policy  # noqa: E402
from qplug_core.engine.modules import QuantLinear  # noqa: E402
from qplug_core.errors import CheckpointError, ConfigError, CoverError, PluginError, UsageError  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from conftest import DATA, make_model  # noqa: E402
from made_by_hand import gguf as write_gguf  # noqa: E402

bridge.register()
GPTQ = DATA / "gptqmodel-w4-g128-sym-descact"
LAYER = "model.layers.0.mlp.down_proj"
IDS = torch.arange(24)[None] * 7 % 95


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


def output(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GPTQ, tmp_path / "gptq")
    return tmp_path / "gptq"


def config(folder, **changes):
    """config.json with other entries in its quantization_config; None removes one."""
    said = json.loads((folder / "config.json").read_text())
    merged = {**said["quantization_config"], **changes}
    said["quantization_config"] = {key: value for key, value in merged.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(said))


def tensor(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def cut(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


WRONG = {
    "truncated file": (lambda f: cut(f, -1000), CheckpointError, "the file is truncated: fetch it again"),
    "truncated header": (lambda f: cut(f, 100), CheckpointError, "no whole safetensors header"),
    "shape": (lambda f: tensor(f, f"{LAYER}.qweight", lambda t: t[:-8]), CoverError, r"has shape \[56, 256\] where gptq"),
    "shape of a norm": (lambda f: tensor(f, "model.norm.weight", lambda t: t[:-8]), CoverError, r"has shape \[248\]"),
    "dtype": (lambda f: tensor(f, f"{LAYER}.qweight", lambda t: t.long()), CoverError, "is I64 where gptq has I32"),
    "bits": (lambda f: config(f, bits=9), ConfigError, "bits: 9; one of 2, 3, 4, 8 was needed"),
    "unknown key": (lambda f: config(f, rotate=True), ConfigError, "'rotate' .True., which is not known"),
    "unknown method": (
        lambda f: config(f, quant_method="nonesuch"),
        PluginError,
        "no plugin provides the quant_method 'nonesuch'",
    ),
    "no method": (lambda f: config(f, quant_method=None), ConfigError, "has no quant_method"),
}


@pytest.mark.parametrize("options", [{}, {"quantization_config": QplugConfig()}], ids=["nothing said", "QplugConfig"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_one_sentence(folder, name, options):
    spoil, kind, said = WRONG[name]
    spoil(folder)
    with pytest.raises(kind, match=said) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)


def test_a_plugin_that_is_missing_is_one_sentence_and_no_random_weights(folder, monkeypatch):
    """transformers alone skips a method that it does not know, and makes up the weights."""
    config(folder, quant_method="modelopt")
    registry = asked.get_registry()
    monkeypatch.setattr(registry, "formats", [e for e in registry.formats if "modelopt" not in e.decl.detects])
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "modelopt")
    with pytest.raises(PluginError, match="no plugin provides the quant_method 'modelopt'"):
        load(folder)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"device_map": "auto"}, torch.float32),
        ({"device_map": "cpu"}, torch.float32),
        ({"device_map": {"": "cpu"}}, torch.float32),
        ({"device_map": "auto", "max_memory": {"cpu": "1GB"}}, torch.float32),
        ({"low_cpu_mem_usage": True, "use_safetensors": True, "attn_implementation": "eager"}, torch.float32),
    ],
    ids=str,
)
def test_what_people_write(options, dtype):
    model = load(GPTQ, **options)
    assert isinstance(model.get_submodule(LAYER), QuantLinear)
    assert model.dtype == dtype
    assert float((output(model).float() - output(load(GPTQ)).float()).abs().max()) < (
        1e-4 if dtype == torch.float32 else 0.3
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": torch.float64}, "float32, bfloat16 or float16 is needed"),
        ({"device_map": "meta"}, "device_map has 'meta'; qplug packs for a CPU or a GPU"),
        ({"device_map": {"": "disk"}}, "device_map has 'disk'"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, "device_map has 2 devices"),
    ],
    ids=str,
)
def test_what_qplug_does_not_do_is_one_sentence(options, said):
    with pytest.raises(UsageError, match=said):
        load(GPTQ, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_sentence():
    with pytest.raises(UsageError, match="device_map has 'cuda:0' and torch sees no GPU here"):
        load(GPTQ, device_map="cuda:0")


# A config that is not in config.json.


def test_a_config_in_a_file_beside_is_found(folder):
    """AutoGPTQ's first files; transformers alone takes the checkpoint for 16 bit and makes up its weights."""
    said = json.loads((folder / "config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps(said.pop("quantization_config")))
    (folder / "config.json").write_text(json.dumps(said))
    policy.ANNOUNCED.clear()
    assert torch.equal(output(load(folder)), output(load(GPTQ)))


def test_a_16_bit_checkpoint_beside_a_stranger_s_file_stays_with_transformers(tmp_path):
    made = make_model(tmp_path / "m")
    (made / "quantization_config.json").write_text("{}")
    assert not hasattr(load(made), "quant_plan")


def test_a_policy_that_names_others_leaves_it_to_transformers(folder):
    said = json.loads((folder / "config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps(said.pop("quantization_config")))
    (folder / "config.json").write_text(json.dumps(said))
    plain = transformers.LlamaConfig(**said)
    plain.name_or_path = str(folder)
    known = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    assert asked._reason(plain, {"awq"}, known) == ""
    assert asked._reason(plain, {"auto_gptq"}, known).startswith("quantize_config.json says that it is gptq")
    assert asked._reason(plain, "missing", known).startswith("quantize_config.json says that it is gptq")


# GGUF.


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_gguf("llama", "Q4_0", tmp_path_factory.mktemp("gguf") / "made")


def test_a_gguf_file_stays_quantized(file):
    model = load(file, gguf_file="model.gguf")
    assert isinstance(model.get_submodule(LAYER), QuantLinear)
    assert model.quant_plan.decisions
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape[1] == IDS.shape[1] + 3


def test_a_gguf_file_with_options(file):
    model = load(file, gguf_file="model.gguf", quantization_config=QplugConfig(kernels="reference"))
    assert {k for d in model.quant_plan.decisions if d.quantized for k in model.hf_quantizer.loading.methods[d.layer.name].kernels} <= {
        "core.reference_linear", "core.reference_embedding",
    }  # fmt: skip
    with pytest.raises(UsageError, match="gguf already and W8A16 was asked for"):
        load(file, gguf_file="model.gguf", quantization_config=QplugConfig("W8A16"))


def test_a_gguf_file_that_was_to_be_dequantized_is(file):
    model = load(file, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True))
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


def test_a_gguf_file_is_not_saved_as_something_else(file, tmp_path):
    with pytest.raises(UsageError, match="whose blocks no safetensors file holds"):
        load(file, gguf_file="model.gguf").save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_dequantized_a_gguf_file_is_saved(file, tmp_path):
    model = load(file, gguf_file="model.gguf").dequantize()
    model.save_pretrained(tmp_path)
    assert float((output(load(tmp_path)) - output(model)).abs().max()) < 1e-5


def test_a_gguf_family_that_qplug_does_not_read_stays_with_transformers(file, monkeypatch):
    def refuse(*_):
        raise ConfigError("its family is not known")

    said = []
    policy.ANNOUNCED.clear()
    monkeypatch.setattr(gguf, "open_checkpoint", refuse)
    monkeypatch.setattr(policy.log, "warning", said.append)
    assert not any(isinstance(m, QuantLinear) for m in load(file, gguf_file="model.gguf").modules())
    assert "qplug does not read it here (its family is not known)" in said[0]
    with pytest.raises(ConfigError, match="its family is not known"):
        load(file, gguf_file="model.gguf", quantization_config=QplugConfig())


# An engine that changed.


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (auto, "get_hf_quantizer"),
        (auto, "AUTO_QUANTIZATION_CONFIG_MAPPING"),
        (auto.AutoHfQuantizer, "merge_quantization_configs"),
        (auto.AutoHfQuantizer, "from_config"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_an_engine_without_what_is_replaced_in_it_is_one_sentence(monkeypatch, where, name):
    """And nothing of it is replaced: a half of the bridge would be worse than none."""
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, bridge.NAME)
    before = dict(auto.AUTO_QUANTIZER_MAPPING)
    monkeypatch.delattr(where, name)
    with pytest.raises(UsageError, match=r"is not as qplug-core \S+ knows it \((AttributeError|ImportError)"):
        bridge.register()
    assert before == auto.AUTO_QUANTIZER_MAPPING


def test_a_model_class_without_a_method_that_the_bridge_calls_is_one_sentence(monkeypatch):
    def gone(*_):
        raise AttributeError("'LlamaForCausalLM' object has no attribute 'set_submodule'")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "set_submodule", gone)
    with pytest.raises(UsageError, match=r"is not as qplug-core \S+ knows it \(AttributeError: 'LlamaForCausalLM'"):
        load(GPTQ)
