"""Checkpoints in formats that are read and that no tool here writes, each with a copy of the numbers that it means."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qplug_core.config import LayerQuant
from qplug_core.scheme import QuantScheme

PLUGINS = Path(__file__).parents[2] / "plugins"
sys.path += [str(PLUGINS / name / "tests") for name in ("qplug_gptq", "qplug_int8", "qplug_gguf")]

Layer = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]
"""Name and weight ``[N, K]`` of a layer to its stored tensors by suffix and the float32 weight that they mean."""


def rewrite(base: Path, out: Path, layer: Layer, takes: str, config: dict[str, Any]) -> Path:
    """``base`` with the layers whose name has ``takes`` in it stored otherwise; the copy lies in ``out``-copy."""
    stored, plain = {}, {}
    for name, tensor in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        plain[name] = tensor.float()
        if takes not in name or tensor.ndim != 2 or module.endswith("gate"):
            stored[name] = tensor
            continue
        pieces, plain[name] = layer(module, tensor.float())
        stored |= {f"{module}.{suffix}": piece for suffix, piece in pieces.items()}
    copy = out.with_name(f"{out.name}-copy")
    for folder, tensors in ((out, stored), (copy, plain)):
        shutil.copytree(base, folder)
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    said = json.loads((base / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**said, "quantization_config": config}))
    return out


def marlin_24(base: Path, out: Path) -> Path:
    """4 bits, groups of 128, two of every four columns; kept columns and codes by chance."""
    from qplug_gptq import tiles
    from test_marlin import meta_of

    draw = torch.Generator().manual_seed(0)

    def layer(_: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        keep = torch.zeros(n, k // 4, 4, dtype=torch.bool)
        keep.scatter_(2, torch.rand(n, k // 4, 4, generator=draw).argsort(-1)[..., :2], True)
        codes = torch.randint(0, 16, (n, k // 2), generator=draw, dtype=torch.uint8)
        scales = (torch.rand(n, k // 128, generator=draw) * 0.01 + 0.001).half()
        dense = torch.zeros(n, k // 4, 4)
        dense[keep] = codes.flatten().float() - 8
        words = tiles.words(codes, 4, sparse=True)
        return {"B_24": words, "B_meta": meta_of(keep), "s": tiles.stored_scales(scales, sparse=True)}, (
            dense.view(n, k) * scales.float().repeat_interleave(128, 1)
        )

    said = {"quant_method": "gptq_marlin_24", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    return rewrite(base, out, layer, "_proj", said)


def fastdeploy_ccq(base: Path, out: Path) -> Path:
    """Experts in FastDeploy's WINT2, a convolutional code, but for those of layer 0, which it keeps at 4 bits; the rest at 16 bit."""
    from qplug_int8.paddle import ccq
    from qplug_int8.paddle.quantizer import PaddleRound
    from qplug_int8.paddle.weight_only import WeightOnlyFormat
    from test_paddle_engine import ccq_expert

    low = LayerQuant(QuantScheme.parse("W4A16_channel"), "wint4")

    def layer(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        if "layers.0." in name:
            made = PaddleRound().quantize(weight, low.scheme)
            return WeightOnlyFormat().encode(made, low), made.dequantize()
        file = ccq_expert(*weight.shape, seed=sum(name.encode()))
        return file, ccq.decode(file, *weight.shape)

    config = {"moe_w4_quant_config": {"quant_end_layer": 0}}
    said = {"quantization": "wint2", "moe_quant_type": "w4w2", "moe_quant_config": config, "ignore": dense(base)}
    return rewrite(base, out, layer, ".experts.", said)


def dense(base: Path) -> list[str]:
    """Linear layers that are no experts."""
    names = [name.removesuffix(".weight") for name in load_file(base / "model.safetensors")]
    return [name for name in names if "_proj" in name and ".experts." not in name]


def fastdeploy_w4a8(base: Path, out: Path) -> Path:
    """Experts in FastDeploy's W4A8, 4-bit codes between -7 and 7 and scales that are largest magnitudes."""
    from qplug_int8.paddle.orders import write4

    draw = torch.Generator().manual_seed(0)

    def layer(_: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, _ = weight.shape
        codes = torch.randint(-7, 8, weight.shape, generator=draw, dtype=torch.int8)
        largest = torch.rand(n, generator=draw) * 0.05 + 0.05
        stored = {
            "quant_weight": write4(codes, "w4a8"),
            "weight_scale": largest,
            "activation_scale": torch.tensor([6.0]),
        }
        return stored, codes.float() * (largest / 7)[:, None]

    said = {"quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "w4a8", "is_quantized": True}
    return rewrite(base, out, layer, ".experts.", {**said, "ignore": dense(base)})


def pertensor(base: Path, out: Path) -> Path:
    """RTP-LLM's static INT8: one scale for a weight, one for its input; said by a file beside config.json."""

    def layer(_: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = weight.abs().max() / 127
        codes = torch.round(weight / scale).to(torch.int8)
        return {"qweight": codes.t().contiguous(), "scales": scale, "input": torch.tensor([0.05])}, codes.float() * scale

    rewrite(base, out, layer, "_proj", {})
    tensors = load_file(out / "model.safetensors")
    renamed = {
        f"{name.removesuffix('.input')}_input_scale" if name.endswith(".input") else name: t for name, t in tensors.items()
    }
    save_file(renamed, out / "model.safetensors", {"format": "pt"})
    shutil.copy(base / "config.json", out / "config.json")
    (out / "pertensorquant.ini").touch()
    return out


READ_ONLY = {
    "gptq_marlin_24": (marlin_24, "base"),
    "fastdeploy_ccq": (fastdeploy_ccq, "moe"),
    "fastdeploy_w4a8": (fastdeploy_w4a8, "moe"),
    "pertensor_quant": (pertensor, "base"),
}
"""Format to what makes a checkpoint of it, and of which model."""


def gguf(kind: str, types: str, out: Path) -> Path:
    """A GGUF file in the folder ``out``, and the copy of its numbers, both written by the gguf package."""
    from gguf_files import model_of, write

    write(out / "model.gguf", model_of(kind), types).save_pretrained(out.with_name(f"{out.name}-copy"))
    return out
