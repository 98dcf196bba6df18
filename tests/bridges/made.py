"""Checkpoints that tests of engines make: of formats that engines lack, and with other numbers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qplug_core.config import LayerQuant
from qplug_core.engine.engine import load
from qplug_core.quantizer import RoundToNearest
from qplug_core.registry import get_registry
from qplug_core.scheme import QuantScheme


def make(base: Path, out: Path, format: str, layout: str, scheme: str, beside: tuple[str, ...]) -> Path:
    """``base`` rounded to nearest and stored by a format's own writer, in a layout that nobody writes by default."""
    registry = get_registry()
    fmt = registry.load(registry.format_for_method(format).decl)
    stored, layers = {}, {}
    for name, tensor in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if tensor.ndim != 2 or "embed" in name or (module == "lm_head" and module not in beside):
            stored[name] = tensor
            continue
        weight = RoundToNearest().quantize(tensor.float(), QuantScheme.parse(scheme))
        if format != "int8":
            weight = dataclasses.replace(weight, scales=weight.scales.half().to(weight.scales.dtype))
        default = fmt.quant_for_scheme(weight)
        layers[module] = LayerQuant(default.scheme, layout, default.opts)
        stored |= {f"{module}.{suffix}": t for suffix, t in fmt.encode(weight, layers[module]).items()}
    shutil.copytree(base, out)
    save_file({name: t.contiguous() for name, t in stored.items()}, out / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = fmt.quantization_config({**layers, **({} if "lm_head" in layers else {"lm_head": None})})
    (out / "config.json").write_text(json.dumps(config))
    return out


def scaled(source: Path, out: Path, suffix: str, factor: float) -> Path:
    """The same checkpoint with other numbers."""
    shutil.copytree(source, out)
    tensors = load_file(source / "model.safetensors")
    assert any(name.endswith(suffix) for name in tensors), f"no tensor of {source} ends with {suffix}"
    changed = {n: t * factor if n.endswith(suffix) else t for n, t in tensors.items()}
    save_file(changed, out / "model.safetensors", {"format": "pt"})
    return out


def gpt_oss_copy(source: Path, out: Path) -> Path:
    """gpt-oss in float32 as transformers stores it: stacks ``[E, H, 2I]`` and ``[E, I, H]`` of all experts."""
    engine = load(source, dtype="float32", kernels="reference", activations="16bit")
    stored = load_file(source / "model.safetensors")
    tensors = {n: t.float() for n, t in stored.items() if not n.endswith(("_blocks", "_scales"))}
    for name in {n.removesuffix("_blocks") for n in stored if n.endswith("_blocks")}:
        parent, _, leaf = name.rpartition(".")
        count = stored[f"{name}_blocks"].shape[0]
        methods = [engine.methods[f"{parent}.{e}.{leaf}"] for e in range(count)]
        tensors[name] = torch.stack([m.packed[0].meta["weight"].dequantize().float().t() for m in methods]).contiguous()
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return out


def sparse24(base: Path, out: Path) -> Path:
    """``base`` with two of four weights dropped in every linear layer, stored as llm-compressor did: what is kept, and a bit mask."""
    stored = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if ".layers." not in name or tensor.ndim != 2:
            stored[name] = tensor
            continue
        n, k = tensor.shape
        kept = (tensor.view(n, k // 4, 4).float().abs().argsort(-1).argsort(-1) >= 2).view(n, k)
        module = name.removesuffix(".weight")
        bits = kept.view(n, k // 8, 8).int() << torch.arange(8)
        stored[f"{module}.compressed"] = tensor[kept].view(n, k // 2)
        stored[f"{module}.bitmask"] = bits.sum(-1).to(torch.uint8)
        stored[f"{module}.shape"] = torch.tensor([[n], [k]])
    sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"]}
    return with_config(base, out, stored, {"quant_method": "compressed-tensors", "sparsity_config": sparsity})


def auto_round(gptq: Path, out: Path) -> Path:
    """A GPTQ checkpoint under the config that auto-round writes for the same tensors."""
    said = json.loads((gptq / "config.json").read_text())["quantization_config"]
    config = {
        **{key: said[key] for key in ("bits", "group_size", "sym")},
        "data_type": "int",
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
    }
    return with_config(gptq, out, load_file(gptq / "model.safetensors"), config)


def with_config(source: Path, out: Path, tensors: dict[str, torch.Tensor], config: dict) -> Path:
    """``source`` with other tensors and another ``quantization_config``."""
    shutil.copytree(source, out)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    raw = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**raw, "quantization_config": config}))
    return out
