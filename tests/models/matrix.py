"""One cell of the model matrix: a tiny model quantized online, saved, reloaded and compared."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from families import FAMILIES, NOT_DONE, TICKS, Family
from torch import Tensor, nn

import qplug_core
from qplug_core.engine.engine import Engine


@dataclass(frozen=True)
class Cell:
    """What a run gave.

    ``distance``: relative Frobenius distance of the logits from the 16-bit model's. ``saved``: largest difference between the
    logits of the saved checkpoint and of the model that was quantized at load. ``layers``: quantized linear layers, counting
    projections of experts; of the KV cache, layers. ``format``: what was written.
    """

    distance: float
    saved: float
    layers: int
    format: str


def reason_against(name: str, column: str) -> str:
    """Why a ticked cell cannot be done, or an empty string."""
    return FAMILIES[name].absent.get(column) or NOT_DONE.get(column, "")


def logits(engine: Engine, family: Family) -> Tensor:
    """Of the family's inputs; the last hidden state of a model without a head."""
    out = engine.forward(**family.inputs())
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).float()


def relative(a: Tensor, b: Tensor) -> float:
    """Relative Frobenius distance."""
    return float((a - b).norm() / b.norm())


def load(folder: Path, **options: str | None) -> Engine:
    """In exact arithmetic on reference kernels."""
    return qplug_core.load(folder, dtype="float32", kernels="reference", **options)


def run(name: str, column: str, folder: Path, out: Path) -> Cell:
    """One cell, of the family's model in ``folder``; ``out`` is written and removed."""
    family, tick = FAMILIES[name], TICKS[column]
    plain = logits(load(folder), family)
    if tick.kv:
        weights = TICKS[next(c for c in (*family.ticks, *family.more, "W8A8") if c in TICKS and not TICKS[c].kv)]
        cached = load(folder, kv_cache=tick.scheme)
        distance, layers = relative(logits(cached, family), plain), len(cached.coders)
        options: dict[str, str | None] = {"kv_cache": tick.scheme}
    else:
        weights, options = tick, {}
    online = load(folder, quantize=weights.scheme, **options)
    given = logits(online, family)
    if not tick.kv:
        distance, layers = relative(given, plain), len(quantized_layers(online))
    done = qplug_core.quantize(folder, out, scheme=weights.scheme, format=weights.format)
    saved = load(out, **options)
    assert quantized_layers(saved) == quantized_layers(online)
    difference = float((logits(saved, family) - given).abs().max())
    shutil.rmtree(out)
    return Cell(distance, difference, layers, done.format)


def quantized_layers(engine: Engine) -> set[str]:
    """Names of the layers that are quantized."""
    return {decision.layer.name for decision in engine.plan.decisions if decision.quantized}


def linear_layers(folder: Path) -> set[str]:
    """Names of all linear layers of a model that is not quantized, as torch sees them."""
    model = load(folder).model
    plain = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and type(m).forward is nn.Linear.forward}
    head = model.get_output_embeddings()
    return plain - {n for n, m in model.named_modules() if m is head}


def image_features(engine: Engine, family: Family) -> Tensor:
    """What the language part is given of an image."""
    pixels = family.inputs()["pixel_values"]
    with torch.inference_mode():
        if family.cls == "VisionEncoderDecoderModel":
            return engine.model.encoder(pixel_values=pixels).last_hidden_state
        features = engine.model.get_image_features(pixel_values=pixels)
    found = getattr(features, "pooler_output", features)
    return found[0] if isinstance(found, (list, tuple)) else found
