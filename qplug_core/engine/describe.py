"""describe(): the layers and plain slots of a Hugging Face model, for the planner."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..layer import LayerSpec, Op, PlainSlot, StoredPart
from .names import StoredNames
from .skeleton import TransposedLinear, persistent_buffers

FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "qkv_proj": ("q_proj", "k_proj", "v_proj")}
"""Projections that some models and checkpoints hold as one, with their parts in the order of the rows."""

EXPERT_PARTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Names of one expert's projections on disk: gate, up, down."""

FUSED_EXPERT = ("gate_up_proj", "up_gate_proj")
"""Names under which one expert's gate and up projections are stored as one, gate rows first (FastDeploy says up_gate)."""

STACK = "it looks like the weights of experts, in a layout that is not known here, and stays at 16 bit"


@dataclass
class Description:
    """A model as the planner sees it.

    ``experts``: names of modules that hold experts, with their number; ``attention``: names of attention modules, with the
    index of the layer in a cache.
    """

    layers: list[LayerSpec] = field(default_factory=list)
    slots: list[PlainSlot] = field(default_factory=list)
    experts: dict[str, int] = field(default_factory=dict)
    attention: dict[str, int] = field(default_factory=dict)


def describe(model: Any, stored: StoredNames) -> Description:
    """Linear layers, embeddings and experts as LayerSpecs; every other parameter and persistent buffer as a slot."""
    found = Description()
    owned: set[str] = set()
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}) or {})
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    language = language_parts(model)
    for name, module in model.named_modules():
        if _is_layer(module):
            found.layers.append(_layer(model, name, module, stored, tied, is_head=module is head))
            owned.add(f"{name}.weight")
        elif _keeps_cache(module) and _is_in(name, language):
            found.layers.append(_cache(model, name, module, stored))
            found.attention[name] = module.layer_idx
        elif _is_experts(module):
            found.layers += _experts(name, module, stored)
            found.experts[name] = module.down_proj.shape[0]
            owned |= {f"{name}.{up_name(module)}", f"{name}.down_proj"}
    found.layers = [replace(layer, online=_is_in(layer.name, language)) for layer in found.layers]
    state = {**dict(model.named_parameters(remove_duplicate=False)), **persistent_buffers(model)}
    for name, value in state.items():
        if name not in owned:
            note = STACK if _is_in(name, language) and _is_stack(model, name, value) else ""
            pieces = _pieces(name, value, stored)
            found.slots.append(PlainSlot(name, stored.of(name), tuple(value.shape), name in tied, pieces, note))
    return found


def _is_stack(model: Any, name: str, value: Tensor) -> bool:
    """Matrices ``[E, ...]`` that no layer owns: weights of experts, not of a convolution."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return value.ndim == 3 and min(value.shape) > 1 and not isinstance(owner, nn.modules.conv._ConvNd)


def language_parts(model: Any) -> tuple[str, ...]:
    """Modules that hold the language model of a multimodal one, which is what quantization at load is for; ``""`` is all of it.

    They are those whose config is of the class of the model's text config. Vision and audio encoders, and what projects
    their output, stay at 16 bit.
    """
    try:
        text = model.config.get_text_config()
    except ValueError:  # Two text models, as encoder and decoder: nothing is to be left out.
        text = model.config
    if text is model.config:
        return ("",)
    inner = [(n, m) for n, m in model.named_modules() if n and isinstance(m, PreTrainedModel)]
    return tuple(name for name, module in inner if type(module.config) is type(text))


def _is_in(name: str, places: tuple[str, ...]) -> bool:
    return any(not place or name.startswith(f"{place}.") for place in places)


def _keeps_cache(module: Any) -> bool:
    """Attention that keeps keys and values from token to token: not that of an encoder, nor what a decoder sees of one."""
    if "Attention" not in type(module).__name__ or getattr(module, "layer_idx", None) is None:
        return False
    return bool(getattr(module, "is_causal", getattr(module, "is_decoder", True)))


def _is_layer(module: nn.Module) -> bool:
    """A linear layer or an embedding."""
    return isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and _computes_linear(type(module)))


def _computes_linear(kind: type[nn.Linear]) -> bool:
    """True where a class computes what ``nn.Linear`` does. Falcon's does, in its own words; Llama 4's router does not."""
    if kind.forward is nn.Linear.forward:
        return True
    try:
        small = kind(3, 2)
        x = torch.tensor([[1.0, -2.0, 0.5]])
        return torch.allclose(kind.forward(small, x), nn.functional.linear(x, small.weight, small.bias))
    except (AttributeError, TypeError, ValueError, RuntimeError):  # Its constructor or its forward takes something else.
        return False


def _layer(
    model: Any, name: str, module: nn.Linear | nn.Embedding, stored: StoredNames, tied: dict[str, str], is_head: bool
) -> LayerSpec:
    n, k = module.weight.shape
    flipped = isinstance(module, TransposedLinear)
    alternatives: list[tuple[StoredPart, ...]] = [(StoredPart(s, n, transposed=flipped),) for s in stored.of(name)]
    parent, _, leaf = name.rpartition(".")
    if leaf in FUSED:
        heights = _heights(model.config, leaf, n)
        for place in stored.of(parent) if heights else ():
            alternatives.append(tuple(StoredPart(f"{place}.{p}", h) for p, h in zip(FUSED[leaf], heights, strict=True)))
    for fused, parts in FUSED.items():
        if leaf in parts:
            alternatives += _slices(model, parent, leaf, fused, n, stored)
    op: Op = "embedding" if isinstance(module, nn.Embedding) else "lm_head" if is_head else "linear"
    weight_of = tied.get(f"{name}.weight", "").removesuffix(".weight")
    kind = "Embedding" if op == "embedding" else "Linear"
    return LayerSpec(name, op, n, k, tuple(alternatives), module_class=kind, tied_to=weight_of or None)


def _cache(model: Any, name: str, module: Any, stored: StoredNames) -> LayerSpec:
    """Keys and values of one attention module: N heads of depth K."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    depth = getattr(module, "head_dim", None) or text.hidden_size // text.num_attention_heads
    places = tuple((StoredPart(place, heads),) for place in stored.of(name))
    return LayerSpec(name, "kv_cache", heads, depth, places, module_class=type(module).__name__)


def _slices(model: Any, parent: str, leaf: str, fused: str, n: int, stored: StoredNames) -> list[tuple[StoredPart, ...]]:
    """A layer of the model as rows of a module that is fused on disk."""
    siblings = FUSED[fused]
    try:
        heights = [model.get_submodule(f"{parent}.{p}").weight.shape[0] for p in siblings]
    except AttributeError:
        return []
    start = sum(heights[: siblings.index(leaf)])
    total = sum(heights)
    places = stored.of(f"{parent}.{fused}")
    return [(StoredPart(place, n, (start, start + n), total),) for place in places]


def _heights(config: Any, leaf: str, n: int) -> tuple[int, ...]:
    if leaf == "gate_up_proj":
        return (n // 2, n // 2)
    text = config.get_text_config()
    depth = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    q, kv = (
        text.num_attention_heads * depth,
        (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * depth,
    )
    # CodeGen's and MiniMax's linear attention have as many heads of each, whatever config.json says of other layers.
    return (q, kv, kv) if q + 2 * kv == n else (n // 3, n // 3, n // 3) if n % 3 == 0 else ()


def up_name(module: Any) -> str:
    """What an experts module calls its first projection: both halves in one, or the only one where there is no gate."""
    return "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"


def _is_experts(module: nn.Module) -> bool:
    """A module of transformers' layout: ``gate_up_proj [E, 2I, H]`` (or ``up_proj [E, I, H]``) and ``down_proj [E, H, I]``, or transposed."""
    up, down = getattr(module, up_name(module), None), getattr(module, "down_proj", None)
    if not (isinstance(up, nn.Parameter) and isinstance(down, nn.Parameter) and up.ndim == down.ndim == 3):
        return False
    if getattr(module, "has_post_expert_norm", False):
        return False
    rows, hidden = _sizes(module, up)
    height, inner = _sizes(module, down)
    # LongCat has experts without weights among the others, so one tensor holds more than the other.
    return len(up) == len(down) and hidden == height and rows in (inner, 2 * inner)


def is_transposed(module: Any) -> bool:
    """True where the experts of ``module`` are held as ``[E, K, N]``: as it says, or as its shapes say."""
    said = getattr(module, "is_transposed", None)
    if said is not None:
        return bool(said)
    up, down = getattr(module, up_name(module)).shape, module.down_proj.shape
    return bool(up[2] != down[1] or up[1] not in (down[2], 2 * down[2]))


def _sizes(module: Any, weight: Tensor) -> tuple[int, int]:
    """N and K of one expert."""
    n, k = weight.shape[1:]
    return (k, n) if is_transposed(module) else (n, k)


def _experts(name: str, module: Any, stored: StoredNames) -> list[LayerSpec]:
    first = up_name(module)
    count = module.down_proj.shape[0]
    rows, hidden = _sizes(module, getattr(module, first))
    inner = _sizes(module, module.down_proj)[1]
    flipped = is_transposed(module)
    layers = []
    for e in range(count):
        up: list[tuple[StoredPart, ...]] = []
        down: list[tuple[StoredPart, ...]] = []
        for place in stored.of(name):
            for gate_name, up_part, down_name in EXPERT_PARTS:
                halves = (StoredPart(f"{place}.{e}.{gate_name}", inner), StoredPart(f"{place}.{e}.{up_part}", inner))
                up.append(halves if rows == 2 * inner else halves[1:])
                down.append((StoredPart(f"{place}.{e}.{down_name}", hidden),))
            for fused in FUSED_EXPERT:
                up.append((StoredPart(f"{place}.{e}.{fused}", rows),))
            up.append((StoredPart(f"{place}.{first}", rows, expert=e, transposed=flipped),))
            down.append((StoredPart(f"{place}.down_proj", hidden, expert=e, transposed=flipped),))
        for whole in stored.of(f"{name}.{first}"):
            up.append((StoredPart(whole.removesuffix(".weight"), rows, expert=e, transposed=flipped),))
        for whole in stored.of(f"{name}.down_proj"):
            down.append((StoredPart(whole.removesuffix(".weight"), hidden, expert=e, transposed=flipped),))
        layers.append(LayerSpec(f"{name}.{e}.{first}", "experts", rows, hidden, tuple(dict.fromkeys(up))))
        layers.append(LayerSpec(f"{name}.{e}.down_proj", "experts", hidden, inner, tuple(dict.fromkeys(down))))
    return layers


def _pieces(name: str, value: Tensor, stored: StoredNames) -> tuple[tuple[str, ...], ...]:
    """A tensor as it is held in pieces: by transformers' table, the parts of a fused layer, or experts one by one."""
    if joined := stored.joined(name):
        return joined
    module, _, leaf = name.rpartition(".")
    parent, _, projection = module.rpartition(".")
    if leaf in ("gate_up_proj_bias", "up_proj_bias", "down_proj_bias"):
        which = {"gate_up_proj_bias": slice(0, 2), "up_proj_bias": slice(1, 2), "down_proj_bias": slice(2, 3)}[leaf]
        return tuple(
            tuple(f"{place}.{e}.{p}.bias" for e in range(value.shape[0]) for p in parts[which])
            for place in stored.of(module)
            for parts in EXPERT_PARTS
        )
    if projection not in FUSED:
        return ()
    return tuple(tuple(f"{place}.{p}.{leaf}" for p in FUSED[projection]) for place in stored.of(parent))
