"""ERNIE-4.5 as FastDeploy writes it: names under ``ernie.``, fused projections, Paddle's orientation; logits against a dequantized copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_int8.paddle import ccq
from qplug_int8.paddle.orders import write4
from qplug_int8.paddle.quantizer import PaddleRound
from qplug_int8.paddle.weight_only import WeightOnlyFormat
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import qplug_core
from qplug_core.config import LayerQuant
from qplug_core.errors import CoverError
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source

IDS = torch.arange(3, 39).view(2, 18)
EXPERTS = 4
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "moe_num_experts": EXPERTS, "moe_k": 2,
    "moe_intermediate_size": 128, "moe_layer_start_index": 1, "moe_num_shared_experts": 1, "initializer_range": 0.08,
}  # fmt: skip
"""Layer 0 is dense; in a WINT2 file layer 1 has 4-bit experts and layer 2 the 2-bit code."""
KINDS: dict[str, dict[str, Any]] = {
    "wint2": {
        "quantization": "wint2", "dense_quant_type": "wint8", "moe_quant_type": "w4w2",
        "moe_quant_config": {
            "moe_w4_quant_config": {"quant_type": "wint4", "quant_granularity": "per_channel", "quant_start_layer": 0, "quant_end_layer": 1},
            "moe_w2_quant_config": {
                "quant_type": "wint2", "quant_granularity": "pp_acc", "quant_group_size": 64, "quant_start_layer": 2, "quant_end_layer": 2,
            },
        },
    },
    "mix_quant": {"quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "wint4"},
    "w4a8": {"quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "w4a8"},
    "experts alone": {"quantization": "w4a8", "is_moe_quantized": True},
    "wint4": {"quantization": "wint4"},
    "block_wise_fp8": {"quantization": "block_wise_fp8", "weight_block_size": [128, 128]},
}  # fmt: skip


def made_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model("ernie4_5_moe", **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name or "e_score" in name:
                value.add_(torch.randn(value.shape) * 0.05)
            if "gate.weight" in name:
                value.copy_(torch.randn(value.shape))
    return model


def paddle_names(model: Any) -> dict[str, Tensor]:
    """The model's tensors as FastDeploy names and fuses them, matrices still ``[N, K]``."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    stored: dict[str, Tensor] = {}
    for name, value in state.items():
        place, _, leaf = name.rpartition(".")
        if leaf in ("gate_up_proj", "down_proj"):
            fused = leaf.replace("gate_up", "up_gate")
            stored |= {f"{place}.{e}.{fused}.weight": one for e, one in enumerate(value)}
        elif place.endswith(".q_proj"):
            parts = [state[f"{place[:-6]}{p}_proj.weight"] for p in "qkv"]
            stored[f"{place[:-6]}qkv_proj.weight"] = torch.cat(parts)
        elif place.endswith(".gate_proj"):
            stored[f"{place[:-9]}up_gate_proj.weight"] = torch.cat([value, state[f"{place[:-9]}up_proj.weight"]])
        elif not place.endswith((".k_proj", ".v_proj", ".up_proj")):
            stored[name.replace("mlp.gate.moe_statics", "mlp.moe_statics")] = value
    return {name.replace("model.", "ernie.", 1) if name.startswith("model.") else name: v for name, v in stored.items()}


def kind_of(module: str, config: dict[str, Any]) -> str:
    """The FastDeploy type of one stored module, empty for 16 bit."""
    experts = ".experts." in module
    if not module.endswith("_proj"):
        return ""
    if config["quantization"] == "wint2":
        return "wint8" if not experts else "wint4" if ".layers.1." in module else "wint2"
    if config["quantization"] == "mix_quant":
        return str(config["moe_quant_type" if experts else "dense_quant_type"])
    return str(config["quantization"]) if experts or config["quantization"] != "w4a8" else ""


def quantized(kind: str, weight: Tensor, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """What FastDeploy stores for a weight ``[N, K]``, and what that stands for."""
    n, k = weight.shape
    if kind == "wint2":
        generator = torch.Generator().manual_seed(seed)
        stored = {
            "quant_weight": torch.randint(0, 256, (k // 4, n), generator=generator, dtype=torch.uint8),
            "weight_scale": torch.randint(0, 256, (k // 128, n), generator=generator, dtype=torch.uint8),
            "super_scales": (torch.rand(n, generator=generator) * 0.001).bfloat16(),
            "code_scale": torch.rand(n, generator=generator) * 8 + 120,
            "code_zp": torch.rand(n, generator=generator) * 5,
        }
        return stored, ccq.decode(stored, n, k)
    if kind == "block_wise_fp8":
        blocks = weight.view(n // 128, 128, k // 128, 128)
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        bytes_ = codes.view(n, k).view(torch.int8).t()
        return {"quant_weight": bytes_, "weight_scale": scales.t()}, (codes.float() * scales[:, None, :, None]).view(n, k)
    bits = 8 if kind == "wint8" else 4
    scheme = QuantScheme.parse(f"W{bits}A16_channel")
    made = PaddleRound().quantize(weight, scheme)
    if kind != "w4a8":
        return WeightOnlyFormat().encode(made, LayerQuant(scheme, kind)), made.dequantize()
    magnitudes = weight.abs().amax(1)
    stored = {
        "quant_weight": write4(made.codes, "w4a8"),
        "weight_scale": magnitudes,
        "activation_scale": torch.tensor([4.0]),
    }
    return stored, made.codes * (magnitudes / 7)[:, None]


def write(folder: Path, kind: str, **changes: Any) -> Any:
    """A checkpoint of ``kind`` in ``folder``, and the model of transformers with the numbers that it stands for."""
    model = made_model(**changes)
    tensors, plain = {}, {}
    for seed, (name, weight) in enumerate(paddle_names(model).items()):
        module = name.removesuffix(".weight")
        type_ = kind_of(module, KINDS[kind])
        plain[name] = weight
        if type_:
            stored, plain[name] = quantized(type_, weight, seed)
            tensors |= {f"{module}.{suffix}": value for suffix, value in stored.items()}
        else:
            matrix = weight.ndim == 2 and name.endswith(".weight") and "embed_tokens" not in name
            tensors[name] = weight.t() if matrix else weight
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    config = {
        **model.config.to_dict(),
        "dtype": "bfloat16",
        "is_quantized": True,
        "architectures": ["Ernie4_5_MoeForCausalLM"],
    }
    if "is_moe_quantized" in KINDS[kind]:
        del config["is_quantized"]
    config |= {"moe_use_aux_free": True, "use_rmsnorm": True, "moe_gate": "topk", "quantization_config": KINDS[kind]}
    (folder / "config.json").write_text(json.dumps(config))
    put(model, plain)
    return model


def put(model: Any, plain: dict[str, Tensor]) -> None:
    """Dequantized weights into the model of transformers."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            place, _, leaf = name.replace("model.", "ernie.", 1).replace("gate.moe_statics", "moe_statics").rpartition(".")
            parent, _, projection = place.rpartition(".")
            if leaf in ("gate_up_proj", "down_proj"):
                fused = leaf.replace("gate_up", "up_gate")
                value.copy_(torch.stack([plain[f"{place}.{e}.{fused}.weight"] for e in range(EXPERTS)]))
            elif projection in ("q_proj", "k_proj", "v_proj"):
                rows = plain[f"{parent}.qkv_proj.weight"].split([128, 64, 64])
                value.copy_(rows["qkv".index(projection[0])])
            elif projection in ("gate_proj", "up_proj"):
                value.copy_(plain[f"{parent}.up_gate_proj.weight"].chunk(2)[projection == "up_proj"])
            else:
                value.copy_(plain[f"{place}.{leaf}" if place != "lm_head" else name])


def run(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def load(folder: Path, **options: Any) -> Any:
    return qplug_core.load(folder, dtype="float32", kernels="reference", activations="16bit", **options)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_a_dequantized_copy(tmp_path: Path, kind: str) -> None:
    """And not those of a copy whose experts are each the next one, nor of the weights before they were quantized."""
    if kind == "block_wise_fp8":
        pytest.importorskip("qplug_fp8")
    model = write(tmp_path, kind)
    engine = load(tmp_path)
    found = engine.logits(IDS)
    assert distance(found, run(model)) < 1e-6
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                value.copy_(value.roll(1, 0))
    assert distance(found, run(model)) > 0.01
    assert distance(found, run(made_model())) > 0.01
    schemes = {str(d.segments[0].scheme) for d in engine.plan.decisions if d.layer.op == "experts"}
    expected = {"wint2": {"W4A16_channel", "Wccq2A16"}, "block_wise_fp8": {"Wfp8A16_b128x128"}}
    assert schemes == expected.get(kind, {"W4A16_channel"})
    assert any("[K, N]" in note for note in engine.plan.all_notes())
    assert engine.plan["lm_head"].segments[0].scheme is None


@pytest.mark.parametrize("wrong", ["gate after up", "keys before queries", "router as it lies"])
def test_the_order_of_fused_rows_matters(tmp_path: Path, wrong: str) -> None:
    """Each mistake that these names invite changes the logits by more than the comparison allows."""
    write(tmp_path, "mix_quant")
    right = load(tmp_path).logits(IDS)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, value in tensors.items():
        if wrong == "gate after up" and name.endswith("shared_experts.up_gate_proj.weight_scale"):
            tensors[name] = value.roll(len(value) // 2)
        if wrong == "keys before queries" and name.endswith("qkv_proj.weight_scale"):
            tensors[name] = value.roll(64)
        if wrong == "router as it lies" and name.endswith("mlp.gate.weight"):
            tensors[name] = value.t().reshape(value.shape).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    assert distance(load(tmp_path).logits(IDS), right) > 1e-3


def test_tied_embeddings_lie_as_an_embedding(tmp_path: Path) -> None:
    model = write(tmp_path, "mix_quant", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["ernie.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert distance(load(tmp_path).logits(IDS), run(model)) < 1e-6


def test_a_cache_of_int8_magnitudes_under_these_names(tmp_path: Path) -> None:
    write(tmp_path, "mix_quant")
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(3):
        for which in "kv":
            tensors[f"ernie.layers.{layer}.self_attn.cache{which}_matmul.activation_scale"] = torch.full((64,), 6.0)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CoverError, match="names no KV-cache scheme"):
        load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["kv_cache_quant_type"] = "int8"
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine = load(tmp_path)
    assert len(engine.plan.caches) == 3
    assert 1e-4 < distance(engine.logits(IDS), load(tmp_path, kv_cache="16bit").logits(IDS)) < 0.05


def test_a_reload_turns_the_same_matrices(tmp_path: Path) -> None:
    """Also a square one, whose shape says nothing."""
    for name, scale in (("a", 1.0), ("b", 0.5)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "experts alone")
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["ernie.layers.0.self_attn.o_proj.weight"] *= scale
        save_file(tensors, tmp_path / name / "model.safetensors")
    engine, fresh = load(tmp_path / "a"), load(tmp_path / "b")
    assert distance(engine.logits(IDS), fresh.logits(IDS)) > 1e-3
    for source in (Source.open(tmp_path / "b"), MemorySource(tensors)):
        engine.reload(source)
        assert torch.equal(engine.logits(IDS), fresh.logits(IDS))
