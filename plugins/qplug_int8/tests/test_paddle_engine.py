"""Whole models in FastDeploy's types, in the reference engine: the same logits as 16 bit on the decoded weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_int8.paddle import ccq
from qplug_int8.paddle.declarations import FORMATS, QUANTIZERS
from qplug_int8.paddle.quantizer import PaddleRound
from qplug_int8.paddle.types import cache
from qplug_int8.paddle.weight_only import WeightOnlyFormat
from qplug_int8.paddle.wint2 import CCQFormat
from safetensors.torch import load_file, save_file
from torch import Tensor

import qplug_core
from qplug_core import builtin
from qplug_core.config import LayerQuant
from qplug_core.decl import Declarations
from qplug_core.errors import CoverError
from qplug_core.reference.kv_cache import CacheCoder
from qplug_core.registry import PluginRow, Registry, _declared
from qplug_core.scheme import QuantScheme

IDS = torch.arange(12).reshape(1, 12)
WINT8 = LayerQuant(QuantScheme.parse("W8A16"), "wint8")
CCQ2 = LayerQuant(QuantScheme.parse("Wccq2A16"), "ccq2")


def registry() -> Registry:
    core, observers = _declared(builtin)
    declared = Declarations(FORMATS, (), QUANTIZERS)
    found = Registry(
        [
            PluginRow("core", "qplug-core", "0", "1.0", "ready", declarations=core, observers=observers),
            PluginRow("int8", "qplug-int8", "0", "1.0", "ready", declarations=declared),
        ]
    )
    found._collect({})
    return found


def make_model(folder: Path, kind: str, **changes: Any) -> dict[str, Tensor]:
    """A tiny random model of ``kind`` on disk, with hidden and intermediate sizes of 128; its tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **{**sizes, **changes})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None) -> Path:
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    saved.pop("quantization_config", None)
    path.write_text(json.dumps(saved | ({"quantization_config": config} if config else {})))
    return folder


def logits(folder: Path) -> Tensor:
    return qplug_core.load(folder, dtype="float32", kernels="reference", registry=registry()).logits(IDS)


def dense_to_wint8(tensors: dict[str, Tensor], order: str = "") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Attention and dense MLP layers in WINT8, and what they decode to."""
    stored, plain = dict(tensors), dict(tensors)
    quant = LayerQuant(WINT8.scheme, f"wint8{order}")
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        if module.endswith("_proj") and ".experts" not in module:
            made = PaddleRound().quantize(weight, WINT8.scheme)
            stored.pop(name)
            stored |= {f"{module}.{suffix}": t for suffix, t in WeightOnlyFormat().encode(made, quant).items()}
            plain[name] = made.dequantize()
    return stored, plain


@pytest.mark.parametrize("order", ["", "_sm70", "_nk", "_kn"])
def test_wint8_llama(tmp_path: Path, order: str) -> None:
    stored, plain = dense_to_wint8(make_model(tmp_path, "llama"), order)
    config = {"quantization": "wint8", "is_quantized": True}
    if order:
        config["weight_layout"] = order[1:]
    found = logits(rewrite(tmp_path, stored, config))
    expected = logits(rewrite(tmp_path, plain, None))
    assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_order_that_the_config_does_not_say_is_found_by_shape_or_refused(tmp_path: Path) -> None:
    """up_proj is [256, 128]: its codes [128, 256] can only be [K, N]."""
    stored, plain = dense_to_wint8(make_model(tmp_path, "llama", intermediate_size=256), "_kn")
    found = logits(rewrite(tmp_path, stored, {"quantization": "wint8"}))
    expected = logits(rewrite(tmp_path, plain, None))
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    with pytest.raises(CoverError):
        logits(rewrite(tmp_path, stored, {"quantization": "wint8", "weight_layout": "sm80"}))


def ccq_expert(n: int, k: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "quant_weight": torch.randint(0, 256, (k // 4, n), generator=generator, dtype=torch.uint8),
        "weight_scale": torch.randint(0, 256, (k // 128, n), generator=generator, dtype=torch.uint8),
        "super_scales": (torch.rand(n, generator=generator) * 0.0005).bfloat16(),
        "code_scale": torch.rand(n, generator=generator) * 8 + 120,
        "code_zp": torch.rand(n, generator=generator) * 5,
    }


@pytest.mark.parametrize("fused", [False, True], ids=["gate_proj, up_proj", "up_gate_proj"])
def test_wint2_experts(tmp_path: Path, fused: bool) -> None:
    """Layer 0 has 4-bit experts, layer 1 the 2-bit code; FastDeploy stores gate and up as one, gate first."""
    tensors = make_model(
        tmp_path, "qwen3_moe", num_experts=2, num_experts_per_tok=1, moe_intermediate_size=128, decoder_sparse_step=1
    )
    stored, plain = dense_to_wint8(tensors)
    wint4 = LayerQuant(QuantScheme.parse("W4A16_channel"), "wint4")
    for layer in range(2):
        for expert in range(2):
            place = f"model.layers.{layer}.mlp.experts.{expert}"
            gate_up = torch.cat([plain[f"{place}.{p}.weight"] for p in ("gate_proj", "up_proj")])
            parts = {"up_gate_proj": gate_up, "down_proj": plain[f"{place}.down_proj.weight"]}
            if not fused:
                parts = {p: plain[f"{place}.{p}.weight"] for p in ("gate_proj", "up_proj", "down_proj")}
            for p in ("gate_proj", "up_proj", "down_proj"):
                stored.pop(f"{place}.{p}.weight", None)
            for i, (name, weight) in enumerate(parts.items()):
                n, k = weight.shape
                if layer == 0:
                    made = PaddleRound().quantize(weight, wint4.scheme)
                    file, value = WeightOnlyFormat().encode(made, wint4), made.dequantize()
                else:
                    file = ccq_expert(n, k, 10 * expert + i)
                    value = ccq.decode(file, n, k)
                    assert torch.equal(CCQFormat().decode(file, CCQ2, n, k).dequantize(), value)
                stored |= {f"{place}.{name}.{suffix}": t for suffix, t in file.items()}
                names = ("gate_proj", "up_proj") if name == "up_gate_proj" else (name,)
                plain |= {f"{place}.{p}.weight": v for p, v in zip(names, value.chunk(len(names)), strict=True)}
    config = {
        "quantization": "wint2", "dense_quant_type": "wint8", "moe_quant_type": "w4w2",
        "moe_quant_config": {"moe_w4_quant_config": {"quant_end_layer": 0}},
    }  # fmt: skip
    found = logits(rewrite(tmp_path, stored, config))
    expected = logits(rewrite(tmp_path, plain, None))
    assert float((found - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize(("kind", "largest", "shape"), [("int8", 127, (8,)), ("float8_e4m3fn", 448, (2,))])
def test_stored_magnitudes_of_the_cache_are_no_steps(kind: str, largest: int, shape: tuple[int, ...]) -> None:
    """Two heads of four channels: INT8 has a magnitude for each channel in one row of eight, FP8 one for each head."""
    kv = cache(kind)
    magnitudes = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 3
    x = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    coder = CacheCoder(kv, magnitudes)
    found = coder.decode(coder.encode(x), 4, torch.float32)
    step = (magnitudes / largest).reshape(2, 1, -1)
    codes = (x / step).clamp(-largest, largest)
    expected = (torch.round(codes) if kind == "int8" else codes.to(torch.float8_e4m3fn).float()) * step
    assert torch.equal(found, expected)
