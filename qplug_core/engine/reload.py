"""New weights into a loaded model: every value of the checkpoint, into the storage in use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..layer import PlainSlot
from ..method import HubMethod, QuantMethod, TensorSource, plain_name, stored_names
from ..quant_plan import QuantPlan
from .place import plain_weight, slot_names


def reload_weights(
    model: Any,
    plan: QuantPlan,
    methods: Mapping[str, QuantMethod],
    slots: Iterable[PlainSlot],
    old: TensorSource,
    new: TensorSource,
) -> None:
    """Quantized layers, 16-bit layers, norms and biases of ``model`` from ``new``, which has the stored names of ``old``.

    :raises CheckpointError: where ``new`` lacks a tensor or has another shape; then nothing was changed.
    """
    for name, info in old.tensors.items():
        if info.transposed and len(getattr(new.tensors.get(name), "shape", ())) == 2:
            new.transpose(name)
    _check(_needed(plan, methods, slots, old), old, new)
    for method in methods.values():
        method.reload(new)
    own = _own(model)
    with torch.no_grad():
        for decision in plan.decisions:
            place = f"{decision.layer.name}.weight"
            if decision.layer.name not in methods and place in own and _is_stored(decision.segments[0].parts[0].name, new):
                own[place].copy_(plain_weight(new, decision))
        for slot in slots:
            names = slot_names(slot, new)
            if names is not None and slot.name in own:
                pieces = [new.read(name) for name in names]
                own[slot.name].copy_((torch.cat(pieces) if len(pieces) > 1 else pieces[0]).view(own[slot.name].shape))


def _own(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers by the names that the checkpoint knows: modules that were put around others are left out."""
    found = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name.replace(".base_layer.", ".").replace(".original.", "."): value for name, value in found}


def _is_stored(name: str, source: TensorSource) -> bool:
    return f"{name}.weight" in source.tensors


def _needed(
    plan: QuantPlan, methods: Mapping[str, QuantMethod], slots: Iterable[PlainSlot], source: TensorSource
) -> Iterable[str]:
    """Names of all tensors that the load read."""
    for decision in plan.decisions:
        method = methods.get(decision.layer.name)
        for segment in decision.segments:
            if isinstance(method, HubMethod):
                yield from stored_names(segment, source, method.layout)
            elif method is None:
                yield from (plain_name(source, part) for part in segment.parts if _is_stored(part.name, source))
    for slot in slots:
        yield from slot_names(slot, source) or ()


def _check(names: Iterable[str], old: TensorSource, new: TensorSource) -> None:
    wrong = []
    for name in dict.fromkeys(names):
        info = new.tensors.get(name)
        if info is None:
            wrong.append(f"{name} is missing")
        elif info.shape != old.tensors[name].shape:
            wrong.append(f"{name} has shape {list(info.shape)} and {list(old.tensors[name].shape)} is loaded")
    if wrong:
        raise CheckpointError(
            f"the new weights do not fit the loaded model in {len(wrong)} tensors ({wrong[0]}); give all tensors, by their stored names"
        )
