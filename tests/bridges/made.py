"""Checkpoints that tests of engines make: of formats that engines lack, and with other numbers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from qplug_core.config import LayerQuant
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
