"""Putting weights into a Hugging Face model: modules of qplug where a layer is quantized, values where it is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layer import PlainSlot
from ..method import QuantMethod, read_plain
from ..quant_plan import Decision
from .describe import Description, up_name
from .modules import QuantEmbedding, QuantExperts, QuantLinear


def place_layer(model: Any, decision: Decision, method: QuantMethod, dtype: torch.dtype) -> None:
    """A quantized linear layer or embedding in the place of the one that ``decision`` names. Its bias stays a parameter."""
    original = model.get_submodule(decision.layer.name)
    module: nn.Module
    if decision.layer.op == "embedding":
        module = QuantEmbedding(method, dtype, getattr(original, "embed_scale", None))
    else:
        module = QuantLinear(method, original.bias)
    model.set_submodule(decision.layer.name, module)


def place_experts(model: Any, described: Description, methods: dict[str, QuantMethod]) -> None:
    """Experts whose projections have ``methods``, in the place of a module that holds them in two tensors."""
    for name, count in described.experts.items():
        original = model.get_submodule(name)
        first = up_name(original)
        if f"{name}.0.{first}" not in methods:
            continue
        up = [methods[f"{name}.{e}.{first}"] for e in range(count)]
        down = [methods[f"{name}.{e}.down_proj"] for e in range(count)]
        halves = sum(len(s.parts) for s in up[0].decision.segments) > 1
        del original._parameters[first], original._parameters["down_proj"]
        model.set_submodule(name, QuantExperts(up, down, original, halves))


def plain_weight(source: Any, decision: Decision) -> Tensor:
    """The 16-bit weight of a layer that stays as it is, its parts stacked."""
    pieces = [read_plain(source, decision.layer, part) for segment in decision.segments for part in segment.parts]
    for segment in decision.segments:
        for part in segment.parts:
            if (name := f"{part.name}.weight") in source.tensors:
                source.release(name)
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def slot_names(slot: PlainSlot, source: Any) -> tuple[str, ...] | None:
    """The stored tensors that fill a slot, None where there are none."""
    return next((n for n in (*((n,) for n in slot.names), *slot.pieces) if all(i in source.tensors for i in n)), None)


def fill_slot(model: Any, slot: PlainSlot, source: Any, device: str, place: str | None = None) -> bool:
    """Give a plain parameter or buffer its value; False where the checkpoint has none. ``place``: its name, where it moved."""
    names = slot_names(slot, source)
    if names is None:
        return False
    pieces = [source.read(name) for name in names]
    value = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    parent, _, leaf = (place or slot.name).rpartition(".")
    module = model.get_submodule(parent)
    old = getattr(module, leaf)
    value = value.view(old.shape).to(device, old.dtype)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value
    for name in names:
        source.release(name)
    return True
