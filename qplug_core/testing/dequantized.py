"""A dequantized copy of a checkpoint: what an engine must compute from the quantized one, for tests of engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..engine.engine import load
from ..errors import UsageError
from ..quant_plan import Decision
from ..weight import OpaqueWeight, QuantWeight


def save_dequantized(path: str | Path, out: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A 16-bit checkpoint (float32 by default) in ``out``, with weights from qplug's reference engine under the same stored names.

    ``options``: of :func:`qplug_core.load`, such as ``quantize="W4A16_g128"`` for a copy of what online quantization makes.
    Activations of the copy are not quantized, nor is its KV cache.

    :raises UsageError: for stacked experts, whose weights have no name of their own.
    """
    engine = load(path, dtype="float32", kernels="reference", activations="16bit", **options)
    names = set(engine.source.tensors)
    saved: dict[str, Tensor] = {}
    for decision in engine.plan.decisions:
        if decision.quantized:
            names -= _write(decision, engine.methods[decision.layer.name], names, saved)
    if engine.plan.caches:
        names -= {name for cache in engine.plan.caches for name in cache.scales.values()}
    plain = {name: engine.source.read(name) for name in sorted(names)}
    saved |= {name: t for name, t in plain.items() if t.is_floating_point()}
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: t.to(dtype).contiguous() for name, t in saved.items()}, out / "model.safetensors", {"format": "pt"})
    folder = Path(path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in ("quantization_config", "compression_config"):
        config.pop(key, None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            shutil.copy(folder / name, out / name)
    return out


def _write(decision: Decision, method: Any, names: set[str], saved: dict[str, Tensor]) -> set[str]:
    """Write the weights of one layer; return the stored tensors that they stand for."""
    whole = torch.cat([_values(packed) for packed in method.packed])
    start, taken = 0, set()
    for segment in decision.segments:
        for part in segment.parts:
            if part.expert is not None:
                raise UsageError(f"{part.name} is a stack of experts; store them one by one to have a dequantized copy")
            taken |= {n for n in names if n.startswith(f"{part.name}.") and not n.endswith(".bias")}
            name = f"{part.name}.weight"
            height, (low, high) = part.stored_n or part.n, part.rows or (0, part.n)
            target = saved.setdefault(name, torch.zeros(height, whole.shape[1]))
            target[low:high] = whole[start : start + part.n]
            start += part.n
    return taken


def _values(packed: Any) -> Tensor:
    """The float32 weight ``[N, K]`` of what the reference kernel holds."""
    weight: QuantWeight | OpaqueWeight | None = packed.meta.get("weight")
    if weight is None:
        return packed.tensors["weight"].float()  # type: ignore[no-any-return]
    values: Tensor = weight.dequantize().float()
    return values if weight.pre_scale is None else values * weight.pre_scale.float()
