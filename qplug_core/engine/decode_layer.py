"""Decoder layers of Hugging Face models that compute what one C call computes, found by their parts and by trying them.

The parts are named as nearly all models name them: a norm, attention of four projections, a norm, gate, up and down. What happens between them
the names do not tell, so a layer's first token with some context behind it is computed both ways, and only the same result is accepted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..kernels.cpu_decoder_layer import DecoderLayer, Linear, Norm, missing, taken
from ..kernels.torch_c import KINDS, plain
from .attention import NAME, UNDERSTOOD
from .decode_norm import own_norm
from .modules import QuantLinear
from .slab import SlabLayer

_CHILDREN = ("input_layernorm", "mlp", "post_attention_layernorm", "self_attn")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_TAKEN = UNDERSTOOD | {"attention_mask", "past_key_values"}
CONTEXT = 8
"""Tokens, at least, that are attended when a layer is tried: over a single one, all kinds of attention are the same."""

log = logging.getLogger(__name__)


def use_own_layers(model: nn.Module) -> int:
    """Let layers of ``model`` decode in C once their results have been compared; how many are candidates."""
    if missing():
        return 0
    found = [module for module in model.modules() if _parts(module) is not None]
    for module in found:
        module.forward = _Forward(module)
    return len(found)


class _Parts:
    """What a layer is made of, and what must stay so for the C call to be the layer."""

    def __init__(self, module: Any) -> None:
        attention, mlp = module.self_attn, module.mlp
        self.attention = attention
        self.linears = [*(getattr(attention, n) for n in _PROJECTIONS), *(getattr(mlp, n) for n in _MLP)]
        self.norms = [module.input_layernorm, module.post_attention_layernorm]
        self.norms += [getattr(attention, n, None) for n in ("q_norm", "k_norm")]
        parents = (module, attention, mlp)
        self.children = [(p._modules, list(p._modules.values())) for p in parents]
        inner = [attention, mlp, *(m for _, children in self.children[1:] for m in children), *self.norms[:2]]
        self.hooks = [hooks for m in inner if m is not None for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def places(self) -> list[int | torch.dtype]:
        """Where everything is that C reads: whoever gives a module other storage, or another dtype, changes it."""
        found: list[int | torch.dtype] = []
        for norm in self.norms:
            if norm is not None:
                found += [norm.weight.data_ptr(), norm.weight.dtype]
        for linear in self.linears:
            found += [id(linear.method.packed[0]), 0 if linear.bias is None else linear.bias.data_ptr()]
        return found

    def unchanged(self) -> bool:
        """Whether no child was exchanged, as an adapter does, and nobody looks at what is between."""
        return not any(self.hooks) and all([*now.values()] == then for now, then in self.children)


def _parts(module: Any) -> _Parts | None:
    """The parts of a layer, None where it has others, or its products are not C's."""
    if sorted(module._modules) != list(_CHILDREN):
        return None
    attention, mlp = module.self_attn, module.mlp
    if {*attention._modules} - {"q_norm", "k_norm"} != {*_PROJECTIONS} or {*mlp._modules} != {*_MLP, "act_fn"}:
        return None
    if not all(hasattr(attention, name) for name in ("config", "layer_idx", "head_dim", "scaling")):
        return None
    parts = _Parts(module)
    if any("forward" in vars(m) for m in (module, attention, *mlp._modules.values(), *parts.linears)):
        return None
    direct = any(m._parameters or m._buffers for m in (module, attention, mlp))
    if direct or not all(m is None or own_norm(m) for m in parts.norms):
        return None
    return parts if all(type(m) is QuantLinear and _linear(m) is not None for m in parts.linears) else None


def _linear(module: QuantLinear) -> Linear | None:
    runs: Sequence[Any] = getattr(module.method, "_runs", ())
    if len(runs) != 1 or runs[0].kernel is None:
        return None
    linear = Linear(runs[0].kernel, runs[0].packed, module.bias)
    return linear if taken(linear) else None


class _Forward:
    """The forward of a layer: its own, and in C for one token of one sequence once that was found to be the same."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.parts: _Parts | None = None
        self.layer: DecoderLayer | None = None
        self.places: list[int | torch.dtype] = []
        self.refused = False

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        x = hidden_states
        if not args and not self.refused and x.shape[:-1] == (1, 1) and (turns := self._turns(x, kwargs)) is not None:
            held = kwargs["past_key_values"].layers[self.module.self_attn.layer_idx]
            if self.layer is None or self.places != self._places(x):
                return self._try(x, turns, held, kwargs)
            if (rows := held.extend()) is not None:
                return self.layer(x, *turns, *rows)
        return type(self.module).forward(self.module, x, *args, **kwargs)

    def _turns(self, x: Tensor, given: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of a call that C can take over; None where it cannot."""
        if given.get("attention_mask") is not None or not plain(x) or not x.is_contiguous() or torch.is_grad_enabled():
            return None
        if any(value is not None and name not in _TAKEN for name, value in given.items()):
            return None
        cache, turns = given.get("past_key_values"), given.get("position_embeddings")
        if not isinstance(cache, DynamicCache) or type(turns) is not tuple or len(turns) != 2:
            return None
        if self.parts is None:
            self.parts = _Parts(self.module)
        attention = self.parts.attention
        if attention.training or attention.config._attn_implementation != NAME or attention.layer_idx >= len(cache.layers):
            return None
        held = cache.layers[attention.layer_idx]
        if type(held) is not SlabLayer or held.coders is not None:
            return None
        like = x.shape[:-1]
        if not all(plain(t) and t.dtype == x.dtype and t.shape[:-1] == like and t.is_contiguous() for t in turns):
            return None
        return turns if self.parts.unchanged() else None

    def _places(self, x: Tensor) -> list[int | torch.dtype]:
        assert self.parts is not None
        return [x.dtype, *self.parts.places()]

    def _try(self, x: Tensor, turns: tuple[Tensor, Tensor], held: SlabLayer, kwargs: dict[str, Any]) -> Any:
        """The layer's own result. From ``CONTEXT`` tokens on, it is compared."""
        before = held.get_seq_length()
        theirs = type(self.module).forward(self.module, x, **kwargs)
        if held.keys is None or held.values is None or held.keys.shape[2] < CONTEXT:
            return theirs
        layer = self._build(x, turns[0].shape[-1])
        self.refused = True
        if layer is None or not isinstance(theirs, Tensor) or held.get_seq_length() != before + 1:
            log.info("a %s stays as it is: its shapes or dtypes are not what the C code takes", type(self.module).__name__)
            return theirs
        rows = [t[:, :, -1:] for t in (held.keys, held.values)]
        kept = [row.clone() for row in rows]
        ours = layer(x, *turns, held.keys, held.values)
        same = _near(ours - x, theirs - x) and all(_near(row, right) for row, right in zip(rows, kept, strict=True))
        for row, right in zip(rows, kept, strict=True):
            row.copy_(right)
        if same:
            self.layer, self.places, self.refused = layer, self._places(x), False
        else:
            log.info("a %s stays as it is: the C code computes something else", type(self.module).__name__)
        return theirs

    def _build(self, x: Tensor, turned: int) -> DecoderLayer | None:
        parts = _parts_again(self.module)
        if parts is None:
            return None
        attention, linears = parts.attention, [_linear(m) for m in parts.linears]
        depth, scaling = attention.head_dim, attention.scaling
        norms = [None if m is None else Norm(m.weight, m.forward.eps) for m in parts.norms]
        if not isinstance(depth, int) or not isinstance(scaling, float) or x.dtype not in KINDS or None in linears:
            return None
        found = [linear for linear in linears if linear is not None]
        wide, inner, queries, keys = x.shape[-1], found[6].packed.k, found[0].packed.n, found[1].packed.n
        shapes = [(w.packed.n, w.packed.k) for w in found]
        wanted = [(queries, wide), (keys, wide), (keys, wide), (wide, queries), (inner, wide), (inner, wide), (wide, inner)]
        lengths = [wide, wide, depth, depth]
        likes = [(x.dtype, (k,)) for k in lengths]
        fits = all(n is None or (n.weight.dtype, n.weight.shape) == like for n, like in zip(norms, likes, strict=True))
        whole = wide % 16 == inner % 16 == depth % 16 == turned % 32 == queries % depth == keys % depth == 0
        if shapes != wanted or not fits or not whole or turned > depth or queries % keys:
            return None
        return DecoderLayer(found, norms, depth, scaling, x.dtype)


def _parts_again(module: Any) -> _Parts | None:
    """The parts of a layer whose forward is ours already."""
    forward = module.__dict__.pop("forward")
    try:
        return _parts(module)
    finally:
        module.forward = forward


def _near(ours: Tensor, theirs: Tensor) -> bool:
    """Equal but for roundings: apart by half a unit of the last place in the root mean square, at float32 by what sums in another order are."""
    limit = max(torch.finfo(theirs.dtype).eps / 2, 1e-5)
    return bool((ours.float() - theirs.float()).norm() <= limit * theirs.float().norm())
