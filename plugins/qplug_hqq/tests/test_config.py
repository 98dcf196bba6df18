"""Configs of transformers, files without any, and whole models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_hqq.loader import HQQFormat
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import qplug_core
from qplug_core.config import LayerQuant, ModuleName, QuantizationConfig
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.quantizer import RoundToNearest
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source

FORMAT = HQQFormat()
IDS = torch.arange(24)[None] * 7 % 128


def params(nbits: Any = 4, group_size: Any = 64, axis: Any = 1, **more: Any) -> dict[str, Any]:
    """What HQQ's BaseQuantizeConfig gives."""
    said = {
        "nbits": nbits,
        "channel_wise": True,
        "group_size": group_size,
        "optimize": True,
        "round_zero": nbits == 4,
        "axis": axis,
    }
    return {
        "weight_quant_params": {**said, "view_as_float": False, **more},
        "scale_quant_params": None,
        "zero_quant_params": None,
        "offload_meta": False,
    }


def parse(quant_config: Any, tensors: tuple[str, ...] = (), **more: Any) -> QuantizationConfig:
    raw = {"quant_config": quant_config, "quant_method": "hqq", "skip_modules": ["lm_head"], **more}
    infos = MemorySource({name: torch.zeros(1, dtype=torch.uint8) for name in tensors}).tensors
    return FORMAT.parse(Source(Path("memory"), {}, raw, "config.json", {}, infos, {}))


def scheme_of(config: QuantizationConfig, name: str, module_class: str = "Linear") -> str:
    found = config.quant_for(ModuleName((name,), module_class))
    return "" if found is None else str(found.scheme)


Q, UP, GATE = "model.layers.3.self_attn.q_proj", "model.layers.3.mlp.up_proj", "model.layers.3.mlp.gate_proj"


@pytest.mark.parametrize(
    ("said", "scheme"),
    [
        (params(), "W4A16_g64_asym"),
        (params(3, 128), "W3A16_g128_asym"),
        (params(1.58), "W2A16_g64_asym"),
        (params(5), "W5A16_g64_asym"),
        (params(4, 64, 0), "W4A16_b64x1_asym"),
        (params(8, None), "W8A16_asym"),
    ],
)
def test_one_quantization_for_all(said: dict[str, Any], scheme: str) -> None:
    config = parse(said)
    assert scheme_of(config, UP) == scheme
    assert scheme_of(config, "lm_head") == ""
    assert scheme_of(config, "model.embed_tokens", "Embedding") == ""


def test_hqq_87_no_group_size_is_one_group_for_each_row() -> None:
    assert parse(params(4, None)).quant_for(ModuleName((UP,))) == LayerQuant(QuantScheme.parse("W4A16_channel_asym"), "hqq")


def test_layers_by_tag() -> None:
    """``dynamic_config``: other tags stay 16 bit."""
    config = parse({"self_attn.q_proj": params(8), "experts.w1": params(3), "mlp.up_proj": None})
    assert scheme_of(config, Q) == "W8A16_g64_asym"
    assert scheme_of(config, "model.layers.0.block_sparse_moe.experts.5.w1") == ""
    assert scheme_of(config, "model.layers.0.experts.5.w1") == "W3A16_g64_asym"
    assert [scheme_of(config, name) for name in (UP, GATE, f"{Q}_norm", "vision.self_attn.q_proj")] == ["", "", "", ""]


def test_skipped_modules_are_skipped_though_they_have_parameters() -> None:
    """transformers looks at skip_modules first."""
    config = parse({"mlp.up_proj": params(), "lm_head": params(8)}, skip_modules=["lm_head", "layers.1.mlp"])
    assert scheme_of(config, "lm_head") == ""
    assert scheme_of(config, "model.layers.1.mlp.up_proj") == ""
    assert scheme_of(config, UP) == "W4A16_g64_asym"


def test_skip_modules_are_substrings_unless_the_file_says_otherwise() -> None:
    """transformers skips gate_proj with ``gate``, vLLM only whole components; a file of the latter holds its codes."""
    assert scheme_of(parse(params(), skip_modules=["gate"]), GATE) == ""
    config = parse(params(), (f"{GATE}.W_q",), skip_modules=["gate"])
    assert scheme_of(config, GATE) == "W4A16_g64_asym"
    assert scheme_of(config, "model.layers.3.mlp.gate") == ""
    assert "gate_proj" in config.inferred[0]


def test_lm_head_stays_16_bit_where_nothing_is_said() -> None:
    assert scheme_of(parse(params(), skip_modules=None), "lm_head") == ""
    assert scheme_of(parse(params(), skip_modules=[]), "lm_head") == "W4A16_g64_asym"


def test_hqq_109_quantized_scales_of_the_config_are_not_in_the_file() -> None:
    """HQQ 0.2 ignores quant_zero and quant_scale; files of older versions are refused."""
    said = {**params(), "zero_quant_params": {"nbits": 8, "channel_wise": False, "group_size": None, "optimize": False}}
    config = parse(said, (f"{UP}.W_q", f"{UP}.scale", f"{UP}.zero"))
    assert scheme_of(config, UP) == "W4A16_g64_asym"
    assert "zero_quant_params" in config.inferred[0]
    for name in ("zero_q", "scale_q", "zero_scale"):
        with pytest.raises(ConfigError, match=rf"has {name}: .*quantize the model again"):
            parse(said, (f"{UP}.W_q", f"{UP}.{name}"))


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (params(1), "nbits: 1 .*1.58, 2, 3, 4, 5, 6, 8 are read"),
        (params("4"), "nbits: '4'"),
        (params(4, 0), "group_size: 0"),
        (params(axis=2), "axis: 2"),
        (params(axis=None), "axis: None"),
        (params(4, None, 0), "axis: 0 and no group_size"),
        (params(channel_wise=False), "channel_wise: false"),
        (params(no_such=3), "'no_such'"),
        ({**params(), "no_such": 3}, "'no_such'"),
        ({"mlp.up_proj": 4}, "mlp.up_proj: 4"),
        (None, "quant_config: None"),
    ],
)
def test_refused_parameters(said: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse(said)


def test_unquantized_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="none of its 1 tensors is a W_q"):
        parse(params(), (f"{UP}.weight",))


def test_layers_of_one_tag_are_written_alike() -> None:
    quant = LayerQuant(QuantScheme.parse("W4A16_g64_asym"), "hqq")
    with pytest.raises(CannotEncode, match=r"mlp\.up_proj"):
        FORMAT.quantization_config({"model.layers.0.mlp.up_proj": quant, "model.layers.1.mlp.up_proj": None})
    with pytest.raises(CannotEncode, match="no layer is quantized"):
        FORMAT.quantization_config({"lm_head": None})


def test_mixture_is_written_by_tag() -> None:
    meant = {
        Q: LayerQuant(QuantScheme.parse("W8A16_channel_asym"), "hqq"),
        UP: LayerQuant(QuantScheme.parse("W3A16_g32_asym"), "hqq"),
    }
    raw = FORMAT.quantization_config({**meant, GATE: None, "lm_head": None})
    config = FORMAT.parse(Source(Path("memory"), {}, raw, "config.json", {}, {}, {}))
    assert {name: config.quant_for(ModuleName((name,))) for name in (*meant, GATE, "lm_head")} == {
        **meant,
        GATE: None,
        "lm_head": None,
    }


def checkpoint(folder: Path, config: bool) -> tuple[Path, Path]:
    """A random model of mixed bits, with ``W4A16`` as a stranger stores it (float zero points), and the same in float32."""
    torch.manual_seed(0)
    model = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(model).save_pretrained(folder / "plain")
    tensors = load_file(folder / "plain" / "model.safetensors")
    layers: dict[str, LayerQuant | None] = {}
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in list(tensors.items()):
        module = name.removesuffix(".weight")
        scheme = "W8A16_g32_asym" if "attn" in module else "W3A16_g32_asym" if "down" in module else "W4A16_g32_asym"
        if "proj" not in module:
            stored[name] = tensor
            continue
        weight = RoundToNearest(torch.float16).quantize(tensor, QuantScheme.parse(scheme))
        layers[module] = quant = FORMAT.quant_for_scheme(weight)
        parts = FORMAT.encode(weight, quant)
        parts["zero"] += 0.125
        stored.update({f"{module}.{role}": part for role, part in parts.items()})
        tensors[name] = FORMAT.decode(parts, quant, weight.n, weight.k).dequantize()
    save_file(tensors, folder / "plain" / "model.safetensors")
    (folder / "hqq").mkdir()
    save_file(stored, folder / "hqq" / "model.safetensors")
    said: dict[str, Any] = json.loads((folder / "plain" / "config.json").read_text())
    if config:
        said["quantization_config"] = FORMAT.quantization_config({**layers, "lm_head": None})
    (folder / "hqq" / "config.json").write_text(json.dumps(said))
    return folder / "hqq", folder / "plain"


@pytest.mark.parametrize("config", [True, False], ids=["config", "raw"])
def test_logits_are_those_of_the_dequantized_model(config: bool, tmp_path: Path) -> None:
    hqq, plain = checkpoint(tmp_path, config)
    expected = qplug_core.load(plain, dtype="float32").logits(IDS)
    for kernels in ("reference", "auto"):
        engine = qplug_core.load(hqq, dtype="float32", kernels=kernels)
        assert float((engine.logits(IDS) - expected).norm() / expected.norm()) < 1e-5
        assert sum(d.quantized for d in engine.plan.decisions) >= 8
    assert any("there is no config" in note for note in engine.plan.notes) is not config


def test_file_without_a_config_that_lacks_its_small_tensors_is_refused(tmp_path: Path) -> None:
    hqq, _ = checkpoint(tmp_path, config=False)
    tensors = {name: t for name, t in load_file(hqq / "model.safetensors").items() if not name.endswith(".nbits")}
    save_file(tensors, hqq / "model.safetensors")
    with pytest.raises(ConfigError, match=r"nbits.*cannot be read.*add a config"):
        qplug_core.load(hqq, dtype="float32")


def test_headers_alone_do_not_say_bits() -> None:
    """As of a repository whose weights were not fetched."""
    infos = MemorySource({f"{UP}.{name}": torch.zeros(1) for name in ("W_q", "nbits", "group_size", "axis")}).tensors
    with pytest.raises(ConfigError, match="fetch the whole checkpoint"):
        FORMAT.parse(Source(Path("memory"), {}, None, "", {}, infos, {}))
