"""Whole models: every layout of one set of weights gives the logits of a plain model on the dequantized weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_awq.loader import AWQFormat
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import qplug_core
from qplug_core.config import LayerQuant
from qplug_core.errors import CoverError
from qplug_core.quantizer import RoundToNearest
from qplug_core.scheme import QuantScheme

FORMAT = AWQFormat()
IDS = torch.arange(24)[None] * 7 % 128


def checkpoints(folder: Path, layout: str, scheme: str, head: bool, skip: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """A random model as AWQ in ``layout``, and a float32 one with the same weights, dequantized."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=192, intermediate_size=320, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "plain")
    tensors = load_file(folder / "plain" / "model.safetensors")
    layers: dict[str, LayerQuant | None] = {}
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in list(tensors.items()):
        module = name.removesuffix(".weight")
        quantized = ("proj" in module and not module.endswith(skip or ("-",))) or (head and module == "lm_head")
        if not quantized:
            stored[name] = tensor
            if "proj" in module or module == "lm_head":
                layers[module] = None
            continue
        weight = RoundToNearest(torch.float16).quantize(tensor, QuantScheme.parse(scheme))
        meant = LayerQuant(weight.scheme, layout)
        layers[module] = meant
        stored.update({f"{module}.{role}": part for role, part in FORMAT.encode(weight, meant).items()})
        tensors[name] = weight.dequantize()
    save_file(tensors, folder / "plain" / "model.safetensors")
    (folder / "awq").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "awq" / "model.safetensors")
    said: dict[str, Any] = json.loads((folder / "plain" / "config.json").read_text())
    said["quantization_config"] = FORMAT.quantization_config(layers)
    (folder / "awq" / "config.json").write_text(json.dumps(said))
    return folder / "awq", folder / "plain"


@pytest.mark.parametrize(
    ("layout", "scheme", "head"),
    [
        ("awq_gemm", "W4A16_g64_asym", True),
        ("awq_gemm", "W8A16_g64_asym", False),
        ("awq_gemm", "W4A16_g128", False),
        ("awq_gemv", "W4A16_g64_asym", True),
        ("awq_gemv_fast", "W4A16_g64_asym", True),
        ("awq_marlin", "W4A16_g64", False),
    ],
)
def test_logits_are_those_of_the_dequantized_model(layout: str, scheme: str, head: bool, tmp_path: Path) -> None:
    """Rows of 192 and 320 columns: neither is a multiple of 128, and both leave padding behind their groups."""
    awq, plain = checkpoints(tmp_path, layout, scheme, head)
    expected = qplug_core.load(plain, dtype="float32").logits(IDS)
    for kernels in ("reference", "auto"):
        logits = qplug_core.load(awq, dtype="float32", kernels=kernels).logits(IDS)
        assert float((logits - expected).norm() / expected.norm()) < 1e-5


def test_own_kernel_takes_every_layer(tmp_path: Path) -> None:
    awq, _ = checkpoints(tmp_path, "awq_gemm", "W4A16_g64_asym", head=True)
    pinned = {"*_proj": "awq.cpu_w4a16", "lm_head": "awq.cpu_w4a16"}
    model = qplug_core.load(awq, dtype="float32", pin=pinned)
    kernels = [segment.choice.kernel for d in model.plan.decisions for segment in d.segments if segment.choice]
    assert kernels == ["awq.cpu_w4a16"] * 15
    reference = qplug_core.load(awq, dtype="float32", kernels="reference").logits(IDS)
    assert float((model.logits(IDS) - reference).norm() / reference.norm()) < 1e-5


def test_partly_quantized_attention(tmp_path: Path) -> None:
    """k_proj alone is 16 bit: an engine that fuses qkv must not lose it."""
    awq, plain = checkpoints(tmp_path, "awq_gemm", "W4A16_g64_asym", head=False, skip=("k_proj",))
    expected = qplug_core.load(plain, dtype="float32").logits(IDS)
    logits = qplug_core.load(awq, dtype="float32", kernels="reference").logits(IDS)
    assert float((logits - expected).norm() / expected.norm()) < 1e-6


def test_file_without_one_tensor_is_refused(tmp_path: Path) -> None:
    awq, _ = checkpoints(tmp_path, "awq_gemm", "W4A16_g64_asym", head=False)
    tensors = load_file(awq / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.qzeros"]
    save_file(tensors, awq / "model.safetensors")
    with pytest.raises(CoverError, match=r"down_proj\.qzeros"):
        qplug_core.load(awq, dtype="float32")
