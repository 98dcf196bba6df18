"""describe(): the layers and plain slots of a Hugging Face model, for the planner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..layer import LayerSpec, Op, PlainSlot, StoredPart
from .names import StoredNames
from .skeleton import persistent_buffers

FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "qkv_proj": ("q_proj", "k_proj", "v_proj")}
"""Projections that some models and checkpoints hold as one, with their parts in the order of the rows."""

EXPERT_PARTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Names of one expert's projections on disk: gate, up, down."""


@dataclass
class Description:
    """A model as the planner sees it. ``experts``: names of modules that hold experts, with their number."""

    layers: list[LayerSpec] = field(default_factory=list)
    slots: list[PlainSlot] = field(default_factory=list)
    experts: dict[str, int] = field(default_factory=dict)


def describe(model: Any, stored: StoredNames) -> Description:
    """Linear layers, embeddings and experts as LayerSpecs; every other parameter and persistent buffer as a slot."""
    found = Description()
    owned: set[str] = set()
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}) or {})
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            found.layers.append(_layer(model, name, module, stored, tied, is_head=module is head))
            owned.add(f"{name}.weight")
        elif _is_experts(module):
            found.layers += _experts(name, module, stored)
            found.experts[name] = module.gate_up_proj.shape[0]
            owned |= {f"{name}.gate_up_proj", f"{name}.down_proj"}
    state = {**dict(model.named_parameters(remove_duplicate=False)), **persistent_buffers(model)}
    for name, value in state.items():
        if name not in owned:
            found.slots.append(
                PlainSlot(name, stored.of(name), tuple(value.shape), optional=name in tied, pieces=_pieces(name, stored))
            )
    return found


def _layer(
    model: Any, name: str, module: nn.Linear | nn.Embedding, stored: StoredNames, tied: dict[str, str], is_head: bool
) -> LayerSpec:
    n, k = module.weight.shape
    alternatives: list[tuple[StoredPart, ...]] = [(StoredPart(s, n),) for s in stored.of(name)]
    parent, _, leaf = name.rpartition(".")
    if leaf in FUSED:
        heights = _heights(model.config, leaf, n)
        for place in stored.of(parent):
            alternatives.append(tuple(StoredPart(f"{place}.{p}", h) for p, h in zip(FUSED[leaf], heights, strict=True)))
    for fused, parts in FUSED.items():
        if leaf in parts:
            alternatives += _slices(model, parent, leaf, fused, n, stored)
    op: Op = "embedding" if isinstance(module, nn.Embedding) else "lm_head" if is_head else "linear"
    weight_of = tied.get(f"{name}.weight", "").removesuffix(".weight")
    kind = "Embedding" if op == "embedding" else "Linear"
    return LayerSpec(name, op, n, k, tuple(alternatives), module_class=kind, tied_to=weight_of or None)


def _slices(model: Any, parent: str, leaf: str, fused: str, n: int, stored: StoredNames) -> list[tuple[StoredPart, ...]]:
    """A layer of the model as rows of a module that is fused on disk."""
    siblings = FUSED[fused]
    try:
        heights = [model.get_submodule(f"{parent}.{p}").weight.shape[0] for p in siblings]
    except AttributeError:
        return []
    start = sum(heights[: siblings.index(leaf)])
    total = sum(heights)
    return [(StoredPart(f"{place}.{fused}", n, (start, start + n), total),) for place in stored.of(parent)]


def _heights(config: Any, leaf: str, n: int) -> tuple[int, ...]:
    if leaf == "gate_up_proj":
        return (n // 2, n // 2)
    text = config.get_text_config()
    depth = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    q, kv = text.num_attention_heads * depth, text.num_key_value_heads * depth
    if q + 2 * kv != n:
        raise ConfigError(
            f"qkv_proj has {n} rows and config.json says {text.num_attention_heads} heads, {text.num_key_value_heads} key-value heads of "
            f"{depth}; they must add up, so correct config.json"
        )
    return (q, kv, kv)


def _is_experts(module: nn.Module) -> bool:
    """A module of transformers' layout: ``gate_up_proj [E, 2I, H]`` and ``down_proj [E, H, I]``."""
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not (isinstance(up, nn.Parameter) and isinstance(down, nn.Parameter) and up.ndim == 3):
        return False
    plain = not getattr(module, "is_transposed", False) and getattr(module, "gate_up_proj_bias", None) is None
    return plain and up.shape[1] == 2 * down.shape[2] and up.shape[2] == down.shape[1]


def _experts(name: str, module: Any, stored: StoredNames) -> list[LayerSpec]:
    count, rows, hidden = module.gate_up_proj.shape
    inner = rows // 2
    layers = []
    for e in range(count):
        up: list[tuple[StoredPart, ...]] = []
        down: list[tuple[StoredPart, ...]] = []
        for place in stored.of(name):
            for gate_name, up_name, down_name in EXPERT_PARTS:
                up.append((StoredPart(f"{place}.{e}.{gate_name}", inner), StoredPart(f"{place}.{e}.{up_name}", inner)))
                down.append((StoredPart(f"{place}.{e}.{down_name}", hidden),))
            up.append((StoredPart(f"{place}.gate_up_proj", rows, expert=e),))
            down.append((StoredPart(f"{place}.down_proj", hidden, expert=e),))
        layers.append(LayerSpec(f"{name}.{e}.gate_up_proj", "experts", rows, hidden, tuple(up)))
        layers.append(LayerSpec(f"{name}.{e}.down_proj", "experts", hidden, inner, tuple(down)))
    return layers


def _pieces(name: str, stored: StoredNames) -> tuple[tuple[str, ...], ...]:
    """A bias of a fused layer as the biases of its parts."""
    module, _, leaf = name.rpartition(".")
    parent, _, projection = module.rpartition(".")
    if projection not in FUSED:
        return ()
    return tuple(tuple(f"{place}.{p}.{leaf}" for p in FUSED[projection]) for place in stored.of(parent))
