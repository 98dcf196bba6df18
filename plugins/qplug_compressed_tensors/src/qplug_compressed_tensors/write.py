"""The ``quantization_config`` of compressed-tensors checkpoints, written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qplug_core.config import LayerQuant
from qplug_core.errors import CannotEncode

from .args import write_args
from .targets import entry

VERSION = "0.19.0"
"""The version of compressed-tensors whose files these are; from 0.17 on odd widths are packed in one stream."""

EMBEDDINGS = ("wte", "wpe")


def write(layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
    """The config that says ``layers``: the commonest quantization for all ``Linear`` modules, every other by names.

    :raises CannotEncode: where no layer is quantized, or one is padded.
    """
    groups: dict[LayerQuant, list[str]] = {}
    for name, quant in layers.items():
        if quant is not None:
            groups.setdefault(quant, []).append(name)
    if not groups:
        raise CannotEncode("no layer is quantized; write a 16-bit checkpoint without a quantization config")
    if any(quant.opt("padded") for quant in groups):
        raise CannotEncode("padded words were given, which only old versions write; store the layers without the option")
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    written = {}
    for i, (quant, names) in enumerate(ordered):
        # Embeddings are another class, and their names say so.
        named = [entry(name) for name in names if i or _is_embedding(name)]
        written[f"group_{i}"] = _group(quant, named if i else ["Linear", *named])
    formats = {quant.layout for quant in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": next(iter(formats)) if len(formats) == 1 else "mixed-precision",
        "quantization_status": "frozen" if formats == {"dense"} else "compressed",
        "config_groups": written,
        "ignore": [entry(name) for name, quant in layers.items() if quant is None],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "global_compression_ratio": None,
        "version": VERSION,
    }


def _group(quant: LayerQuant, targets: list[str]) -> dict[str, Any]:
    part, act = quant.scheme.weight, quant.scheme.act
    assert part is not None
    return {
        "targets": targets,
        "weights": write_args(part, quant.scheme.act_order),
        "input_activations": None if act is None else write_args(act, kind="act"),
        "output_activations": None,
        "format": quant.layout,
    }


def _is_embedding(name: str) -> bool:
    leaf = name.rsplit(".", 1)[-1]
    return "emb" in leaf or leaf in EMBEDDINGS
