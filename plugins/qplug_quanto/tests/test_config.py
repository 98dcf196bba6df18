"""quanto_qmap.json, QuantoConfig, files with neither, and whole models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_quanto.loader import QuantoFormat
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import qplug_core
from qplug_core.config import LayerQuant, ModuleName, QuantizationConfig
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.quantizer import RoundToNearest
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source
from qplug_core.testing import random_weight

FORMAT = QuantoFormat()
IDS = torch.arange(24)[None] * 7 % 128
UP, DOWN, HEAD = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "lm_head"


def stored(module: str, name: str, n: int = 48, k: int = 256) -> dict[str, torch.Tensor]:
    weight = random_weight(QuantScheme.parse(name), n, k)
    return {f"{module}.{role}": t for role, t in FORMAT.encode(weight, FORMAT.quant_for_scheme(weight)).items()}


def parse(
    raw: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor] | None = None, qmap: dict[str, Any] | None = None
) -> QuantizationConfig:
    files = {} if qmap is None else {"quanto_qmap.json": qmap}
    return FORMAT.parse(Source(Path("memory"), {}, raw, "", files, MemorySource(tensors or {}).tensors, {}))


def scheme_of(config: QuantizationConfig, name: str, module_class: str = "Linear") -> str:
    found = config.quant_for(ModuleName((name,), module_class))
    return "" if found is None else str(found.scheme)


@pytest.mark.parametrize(
    ("weights", "activations", "scheme"),
    [
        ("qint8", "none", "W8A16"), ("qfloat8_e4m3fn", "none", "Wfp8A16"), ("qfloat8_e5m2", "none", "Wfp8e5m2A16"),
        ("qint4", "none", "W4A16_g128_asym"), ("qint2", "none", "W2A16_g128_asym"), ("qint8", "qint8", "W8A8_static"),
        ("qint4", "qfloat8_e4m3fn", "W4Afp8_g128_asym_static"),
    ],
)  # fmt: skip
def test_map_names_every_module(weights: str, activations: str, scheme: str) -> None:
    config = parse(qmap={UP: {"weights": weights, "activations": activations}})
    assert scheme_of(config, UP) == scheme
    assert scheme_of(config, DOWN) == ""
    assert [rule.implicit for rule in config.rules] == [False]


def test_quanto_324_outputs_stay_16_bit_and_the_plan_says_so() -> None:
    config = parse(qmap={UP: {"weights": "qint8", "activations": "qint8"}})
    assert "outputs stay 16 bit" in config.inferred[0]


def test_norms_of_the_map_have_scales_and_no_codes() -> None:
    """QLayerNorm only quantizes its output."""
    norm, entry = "model.norm", {"weights": "none", "activations": "qint8"}
    config = parse(
        qmap={norm: entry, UP: {"weights": "qint8", "activations": "qint8"}}, tensors={f"{norm}.weight": torch.ones(8)}
    )
    assert set(config.ignorable) == {f"{norm}.input_scale", f"{norm}.output_scale"}
    with pytest.raises(ConfigError, match="16-bit weight with quantized activations"):
        parse(qmap={norm: entry}, tensors={f"{norm}.weight": torch.ones(8, 8)})


def test_group_size_comes_from_the_file() -> None:
    tensors = {
        **stored(UP, "W4A16_g128_asym"),
        **stored(DOWN, "W4A16_g64_asym", k=320),
        **stored(HEAD, "W4A16_channel_asym", k=140),
    }
    entry = {"weights": "qint4", "activations": "none"}
    config = parse(qmap=dict.fromkeys((UP, DOWN, HEAD), entry), tensors=tensors)
    assert [scheme_of(config, m) for m in (UP, DOWN, HEAD)] == ["W4A16_g128_asym", "W4A16_g64_asym", "W4A16_channel_asym"]
    config = parse({"quant_method": "quanto", "weights": "int4"}, {k: v for k, v in tensors.items() if HEAD not in k})
    assert [scheme_of(config, m) for m in (UP, DOWN, HEAD)] == ["W4A16_g128_asym", "W4A16_g64_asym", ""]


@pytest.mark.parametrize(
    ("qmap", "match"),
    [
        ({UP: {"weights": "qint3", "activations": "none"}}, "type 'qint3'"),
        ({UP: {"weights": "qfloat8_e4m3fnuz", "activations": "none"}}, "fnuz"),
        ({UP: {"weights": "qint8", "activations": "none", "group_size": 64}}, "group_size"),
        ({UP: "qint8"}, "weights and activations were needed"),
    ],
)
def test_refused_maps(qmap: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse(qmap=qmap)


@pytest.mark.parametrize(
    ("weights", "file"),
    [("qint8", "Wfp8A16"), ("qfloat8", "W8A16"), ("qint4", "W2A16_g128_asym"), ("qint2", "W4A16_g128_asym")],
)
def test_file_of_another_type_is_refused(weights: str, file: str) -> None:
    with pytest.raises(ConfigError, match=f"tensors of {UP} are not those of"):
        parse(qmap={UP: {"weights": weights, "activations": "none"}}, tensors=stored(UP, file))
    with pytest.raises(ConfigError, match=f"tensors of {UP} are not those of"):
        parse({"quant_method": "quanto", "weights": weights.replace("q", "", 1)}, stored(UP, file))


def test_modules_of_a_config() -> None:
    config = parse(
        {"quant_method": "quanto", "weights": "int8", "activations": None, "modules_to_not_convert": ["mlp.gate", "lm_head"]}
    )
    names = [UP, "model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj", HEAD]
    assert [scheme_of(config, name) for name in names] == ["W8A16", "", "W8A16", ""]
    assert scheme_of(config, "model.embed_tokens", "Embedding") == ""


@pytest.mark.parametrize(("skipped", "scheme"), [(None, ""), ([], "W8A16"), (["model.norm"], "W8A16")])
def test_lm_head_is_left_out_only_where_there_is_no_list(skipped: Any, scheme: str) -> None:
    config = parse({"quant_method": "quanto", "weights": "int8", "modules_to_not_convert": skipped})
    assert scheme_of(config, HEAD) == scheme


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"weights": "int3"}, "int3"), ({"weights": None}, "weights: None"), ({"activations": "int4x"}, "int4x"),
        ({"modules_to_not_convert": "lm_head"}, "list of names"), ({"no_such": 1}, "no_such"),
    ],
)  # fmt: skip
def test_refused_configs(more: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse({"quant_method": "quanto", "weights": "int8", **more})


def test_config_of_a_file_that_transformers_would_quantize_as_it_loads() -> None:
    with pytest.raises(ConfigError, match="load with quantize="):
        parse({"quant_method": "quanto", "weights": "int8"}, {f"{UP}.weight": torch.zeros(4, 4)})


@pytest.mark.parametrize("name", ["W8A16", "Wfp8A16", "Wfp8e5m2A16", "W4A16_g128_asym", "W2A16_g128_asym"])
def test_quanto_354_file_whose_map_is_missing_or_has_another_name(name: str) -> None:
    config = parse(tensors=stored(UP, name))
    assert scheme_of(config, UP) == name
    assert scheme_of(config, DOWN) == ""
    assert "there is no quanto_qmap.json" in config.inferred[0]


def test_tensors_of_no_type_are_refused() -> None:
    tensors = {**stored(UP, "W8A16"), f"{UP}.weight._data": torch.zeros(4, 4, dtype=torch.int32)}
    with pytest.raises(ConfigError, match="those of no type"):
        parse(tensors=tensors)


def test_one_config_says_one_type() -> None:
    layers = {UP: LayerQuant(QuantScheme.parse("W8A16"), "quanto"), DOWN: LayerQuant(QuantScheme.parse("Wfp8A16"), "quanto")}
    with pytest.raises(CannotEncode, match="fp8_e4m3 and int8"):
        FORMAT.quantization_config(layers)
    with pytest.raises(CannotEncode, match="no quantized layer"):
        FORMAT.quantization_config({HEAD: None})


def checkpoint(folder: Path, dialect: str) -> tuple[Path, Path]:
    """A random model with K of 64 and 160 (rows of one group, groups of 32), and the same in float32."""
    torch.manual_seed(0)
    model = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(model).save_pretrained(folder / "plain")
    tensors = load_file(folder / "plain" / "model.safetensors")
    layers: dict[str, LayerQuant | None] = {HEAD: None}
    files: dict[str, torch.Tensor] = {}
    for name, tensor in list(tensors.items()):
        module = name.removesuffix(".weight")
        if "proj" not in module:
            files[name] = tensor
            continue
        scheme = "W4A16_g32_asym" if "down" in module else "W4A16_channel_asym"
        weight = RoundToNearest(torch.float32).quantize(tensor, QuantScheme.parse(scheme))
        layers[module] = quant = FORMAT.quant_for_scheme(weight)
        files.update({f"{module}.{role}": part for role, part in FORMAT.encode(weight, quant).items()})
        tensors[name] = weight.dequantize()
    save_file(tensors, folder / "plain" / "model.safetensors")
    (folder / "quanto").mkdir()
    save_file(files, folder / "quanto" / "model.safetensors")
    said: dict[str, Any] = json.loads((folder / "plain" / "config.json").read_text())
    if dialect == "config":
        said["quantization_config"] = FORMAT.quantization_config(layers)
    (folder / "quanto" / "config.json").write_text(json.dumps(said))
    if dialect == "map":
        qmap = {name: {"weights": "qint4", "activations": "none"} for name, quant in layers.items() if quant}
        (folder / "quanto" / "quanto_qmap.json").write_text(json.dumps(qmap))
    return folder / "quanto", folder / "plain"


@pytest.mark.parametrize("dialect", ["config", "map", "raw"])
def test_logits_are_those_of_the_dequantized_model(dialect: str, tmp_path: Path) -> None:
    quanto, plain = checkpoint(tmp_path, dialect)
    expected = qplug_core.load(plain, dtype="float32").logits(IDS)
    for kernels in ("reference", "auto"):
        engine = qplug_core.load(quanto, dtype="float32", kernels=kernels)
        assert float((engine.logits(IDS) - expected).norm() / expected.norm()) < 1e-5
        assert sum(d.quantized for d in engine.plan.decisions) >= 8
