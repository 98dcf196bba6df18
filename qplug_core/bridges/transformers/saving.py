"""What ``save_pretrained`` writes: the tensors of the checkpoint as they were, or those of a format for what was quantized at load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...config import LayerQuant
from ...decl import FormatDecl
from ...engine.modules import QuantEmbedding, QuantExperts, QuantLinear
from ...engine.place import slot_names
from ...errors import CannotEncode, PluginError, UsageError
from ...format import CheckpointFormat
from ...layer import StoredPart
from ...method import HubMethod
from ...quant_plan import Decision
from ...weight import QuantWeight
from .loading import plain_torch

if TYPE_CHECKING:
    from .config import QplugConfig
    from .loading import Loading

FIRST = ("compressed_tensors", "gptq", "fp8")
"""Formats that most engines read: they are tried first."""

State = dict[str, Any]


def stored_state(model: Any, loading: Loading, config: QplugConfig) -> tuple[State, dict[str, str]]:
    """The tensors of a checkpoint by stored name, and its metadata. ``config`` comes to say how they are stored.

    :raises CannotEncode: where no format holds what was quantized at load.
    :raises UsageError: for a model whose quantized modules were replaced since.
    """
    _check_modules(model, loading)
    with plain_torch():
        if loading.planner.online:
            state = _encoded(loading, config)
        else:
            state = {
                name: _as_stored(loading, name)
                for name in loading.source.tensors
                if name not in loading.planner.cover.ignored
            }
        _take_current(model, loading, state)
    return state, dict(loading.source.metadata)


def _check_modules(model: Any, loading: Loading) -> None:
    held = {
        id(m)
        for module in model.modules()
        if isinstance(module, QuantLinear | QuantEmbedding | QuantExperts)
        for m in module.methods()
    }
    for name, method in loading.methods.items():
        if id(method) not in held:
            raise UsageError(
                f"{name} was replaced since the model was loaded, so it is no longer what its format would say; save the adapter alone"
            )


def _as_stored(loading: Loading, name: str) -> Tensor:
    tensor = loading.source.read(name)
    if loading.source.tensors[name].dtype == "F8_E8M0":
        return tensor.view(torch.float8_e8m0fnu)
    return tensor


def _take_current(model: Any, loading: Loading, state: State) -> None:
    """Plain parameters as they are in the model now, where they are not what the file said."""
    current = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    plain = {
        slot.name: names[0]
        for slot in loading.described.slots
        if (names := slot_names(slot, loading.source)) and len(names) == 1
    }
    for decision in loading.plan.decisions:
        parts = decision.segments[0].parts
        if (
            decision.layer.name not in loading.methods
            and len(parts) == 1
            and parts[0].rows is None
            and parts[0].expert is None
        ):
            plain[f"{decision.layer.name}.weight"] = f"{parts[0].name}.weight"
    for own, name in plain.items():
        value = current.get(own)
        if value is None or name not in state or type(value.data) is not Tensor:
            continue
        if value.shape == state[name].shape and not torch.equal(state[name].to(value.dtype), value.detach().cpu()):
            state[name] = value.detach().cpu()


def _encoded(loading: Loading, config: QplugConfig) -> State:
    """A model that was quantized at load, in the first format that holds it."""
    reasons = []
    for decl in _formats(loading, config):
        try:
            return _write(loading, config, loading.registry.load(decl))
        except (CannotEncode, NotImplementedError, PluginError) as reason:
            reasons.append(f"{decl.name}: {reason}")
    raise CannotEncode(
        f"no format holds {config.scheme}: {'; '.join(reasons)}; quantize with another scheme, or save the 16-bit model"
    )


def _formats(loading: Loading, config: QplugConfig) -> list[FormatDecl]:
    """The format that was asked for, or all, in the order in which they are tried."""
    registry = loading.registry
    if config.format is not None:
        known = [e.decl for e in registry.formats if config.format == e.decl.name or config.format in e.decl.detects]
        return [known[0] if known else registry.format(config.format).decl]
    return sorted(
        (entry.decl for entry in registry.formats),
        key=lambda decl: (FIRST.index(decl.name) if decl.name in FIRST else len(FIRST), decl.name),
    )


def _write(loading: Loading, config: QplugConfig, fmt: CheckpointFormat) -> State:
    state: State = {}
    layers: dict[str, LayerQuant | None] = {}
    taken: set[str] = set()
    for decision in loading.plan.decisions:
        method = loading.methods.get(decision.layer.name)
        if not isinstance(method, HubMethod):
            layers.update({part.name: None for part in _parts(decision) if decision.layer.op != "embedding"})
            continue
        for part, _, weight in method.weights(loading.source):
            taken.add(part.name if part.name in loading.source.tensors else f"{part.name}.weight")
            for name, piece in _named(decision, part, weight):
                quant = fmt.quant_for_scheme(piece)
                layers[name] = quant
                stored = {t.name: t for t in fmt.tensors(quant)}
                state.update({stored[key].full_name(name): value for key, value in fmt.encode(piece, quant).items()})
    kept = [n for n in loading.source.tensors if n not in taken and n not in loading.planner.cover.ignored]
    state.update({name: _as_stored(loading, name) for name in kept})
    config.stored = fmt.quantization_config(layers)
    return state


def _parts(decision: Decision) -> list[StoredPart]:
    return [part for segment in decision.segments for part in segment.parts]


def _named(decision: Decision, part: StoredPart, weight: Any) -> list[tuple[str, QuantWeight]]:
    """A part under the names that a quantized checkpoint has for it: experts one by one, gate and up apart."""
    if not isinstance(weight, QuantWeight):
        raise CannotEncode(f"{part.name} is no weight of the hub")
    own = decision.layer.alternatives[0]
    if part.expert is None and part.rows is None:
        return [(part.name, weight)]
    if len(own) > 1 and sum(p.n for p in own) != weight.n:
        raise CannotEncode(f"{part.name} holds rows of {decision.layer.name} that are no part of it")
    named, start = [], 0
    for target in own:
        named.append((target.name, weight.narrow((start, start + target.n), (0, weight.k))))
        start += target.n
    return named
