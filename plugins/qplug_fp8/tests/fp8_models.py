"""Tiny models on disk in every dialect of FP8, written by hand from the documented layouts, with their exact weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 96, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
"""No width is a multiple of 128, so every block-wise file has ragged ends."""

IDS = torch.arange(24).reshape(1, 24) * 5 % 96

Stored = tuple[dict[str, Tensor], Tensor]
"""Tensors of one layer by name behind the module's, and the float32 weight that they mean."""


def make(
    folder: Path, quantize: Callable[[Tensor], Stored], config: Mapping[str, Any], kind: str = "llama", **sizes: Any
) -> Tensor:
    """Write a random model with all linear layers but ``lm_head`` quantized; the logits of the exact float32 model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **sizes}), dtype=torch.float32)
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        module = name.removesuffix(".weight")
        if "_proj" not in name or value.ndim != 2:
            tensors[name] = value
            continue
        stored, meant = quantize(value * 3)
        tensors |= {f"{module}.{key}": tensor for key, tensor in stored.items()}
        value.copy_(meant)
    write(folder, model.config, tensors, config)
    return logits(model)


def write(folder: Path, model_config: Any, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    raw = json.loads(model_config.to_json_string(use_diff=False))
    raw["quantization_config"] = dict(config)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    return model.float().eval()(input_ids=IDS, use_cache=False).logits


def expand(grid: Tensor, bn: int, bk: int, n: int, k: int) -> Tensor:
    """The scale of every element, by its position."""
    return grid.float()[torch.arange(n)[:, None] // bn, torch.arange(k)[None, :] // bk]


def codes_of(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Stored:
    """Codes under ``scale [N, K]`` (or broadcastable), and what they mean."""
    codes = (weight / scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    return {"weight": codes}, codes.float() * scale


def block_scales(weight: Tensor, bn: int, bk: int) -> Tensor:
    n, k = weight.shape
    grid = torch.zeros(-(-n // bn), -(-k // bk))
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            grid[i, j] = weight[i * bn : (i + 1) * bn, j * bk : (j + 1) * bk].abs().max() / 448
    return grid


def by_tensor(
    scale: str = "weight_scale", shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float8_e4m3fn, **act: float
) -> Callable[[Tensor], Stored]:
    def quantize(weight: Tensor) -> Stored:
        value = weight.abs().max() / torch.finfo(dtype).max
        stored, meant = codes_of(weight, value, dtype)
        stored[scale] = value.reshape(shape)
        return stored | {name: torch.tensor(v).reshape(shape) for name, v in act.items()}, meant

    return quantize


def by_channel(scale: str = "weight_scale", flat: bool = False) -> Callable[[Tensor], Stored]:
    def quantize(weight: Tensor) -> Stored:
        value = weight.abs().amax(1, keepdim=True) / 448
        stored, meant = codes_of(weight, value)
        return stored | {scale: value.flatten() if flat else value}, meant

    return quantize


def by_block(
    bn: int, bk: int, scale: str = "weight_scale_inv", dtype: torch.dtype = torch.float32
) -> Callable[[Tensor], Stored]:
    def quantize(weight: Tensor) -> Stored:
        grid = block_scales(weight, bn, bk)
        if dtype in (torch.float8_e8m0fnu, torch.uint8):
            exponents = torch.ceil(torch.log2(grid))
            kept: Tensor = (exponents + 127).to(torch.uint8)
            kept = kept.view(dtype)
            grid = 2.0**exponents
        else:
            kept = grid.to(dtype)
            grid = kept.float()
        stored, meant = codes_of(weight, expand(grid, bn, bk, *weight.shape))
        return stored | {scale: kept}, meant

    return quantize


def paddle(bn: int, bk: int) -> Callable[[Tensor], Stored]:
    def quantize(weight: Tensor) -> Stored:
        stored, meant = by_block(bn, bk)(weight)
        codes = stored["weight"].view(torch.int8).t()
        return {"quant_weight": codes, "weight_scale": stored["weight_scale_inv"].t()}, meant

    return quantize
