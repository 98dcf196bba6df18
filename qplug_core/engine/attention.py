"""Own attention for Hugging Face models, through transformers' registry: one new token in C, a long prompt in bfloat16 block by block with matrix
products, everything else as ``sdpa`` does it.

A model takes part where transformers chose ``sdpa`` for it and it asks the registry by name. Models with soft caps or attention sinks, for
which transformers chooses its eager attention, keep that.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..kernels import cpu_attention
from ..kernels.torch_c import plain
from .describe import Description
from .slab import Held

NAME = "qplug"
UNDERSTOOD = frozenset(
    (
        "position_ids",
        "use_cache",
        "sliding_window",
        "cache_position",
        "position_embeddings",
        "is_causal",
        "output_router_logits",
    )
)
"""Arguments of models that change nothing for one token: what they say is in the mask and the cache already."""

LONG, ROWS, MOST = 64, 64, 1 << 18
"""Tokens of a prompt from which on it is multiplied block by block; tokens of a block; sequences x heads x tokens up to which, for the memory."""

log = logging.getLogger(__name__)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers.

    query ``[B, H, T, D]``, key and value ``[B, HKV, S, D]``, which may be :class:`~qplug_core.engine.slab.Held`, attention_mask
    ``[B, 1 or H, T, S]`` bool or None; to ``[B, T, H, D]``.
    """
    if (
        query.shape[2] >= LONG
        and attention_mask is None
        and not dropout
        and _takes_prompt(module, query, key, value, kwargs)
    ):
        return _prompt(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None
    if query.shape[2] == 1 and not dropout:
        if unknown := [name for name, given in kwargs.items() if given is not None and name not in UNDERSTOOD]:
            _say_once(f"the model gives {', '.join(unknown)}")
        elif (
            out := _one_token(query, key, value, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
        ) is not None:
            return out, None
    out, weights = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return out, weights


def _takes_prompt(module: Any, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether all tokens are new and see those before them, in numbers that this CPU has products for."""
    asked = any(given is not None and (name not in UNDERSTOOD or name == "is_causal") for name, given in kwargs.items())
    if (
        asked
        or getattr(module, "is_causal", True) is not True
        or query.shape[2] != key.shape[2]
        or query.shape[1] % key.shape[1]
    ):
        return False
    if not all(plain(t) and t.dtype == torch.bfloat16 for t in (query, key, value)) or torch.is_grad_enabled():
        return False
    return query.shape[0] * query.shape[1] * query.shape[2] <= MOST and _products()


@functools.cache
def _products() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _prompt(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention ``[B, T, H, DV]``: scores in float32, probabilities rounded to bfloat16, ``ROWS`` tokens at a time over those before them."""
    (batch, heads, tokens, depth), kv_heads = query.shape, key.shape[1]
    out = query.new_empty(batch, tokens, heads, value.shape[3])
    hidden = torch.ones(ROWS, ROWS, dtype=torch.bool).triu(1)
    scaled = (key.float() * scaling).transpose(2, 3)
    for start in range(0, tokens, ROWS):
        end = min(start + ROWS, tokens)
        shared = batch, kv_heads, heads // kv_heads * (end - start)
        scores = query[:, :, start:end].reshape(*shared, depth).float() @ scaled[..., :end]
        scores = scores.view(batch, heads, end - start, end)
        scores[..., start:].masked_fill_(hidden[: end - start, : end - start], float("-inf"))
        weights = torch.softmax(scores, -1).to(query.dtype).view(*shared, end)
        seen = (weights @ value[:, :, :end]).view(batch, heads, end - start, -1)
        out[:, start:end] = seen.transpose(1, 2)
    return out


def _one_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor | None:
    depth = value.shape[-1]
    rows = None
    if isinstance(key, Held) and isinstance(value, Held):
        # What was decoded already may have been changed since.
        if key.rows is not None and value.rows is not None and key.decoded is None and value.decoded is None:
            rows = key.rows, value.rows
            key, value = key.data_bytes, value.data_bytes
        else:
            key, value = key.numbers(), value.numbers()
    if torch.is_grad_enabled() and query.requires_grad:
        return None
    if found := cpu_attention.refusals(query, key, value, mask, depth):
        _say_once(str(found[0]))
        return None
    if rows is None:
        return cpu_attention.attention(query, key, value, mask, scaling, depth)
    return cpu_attention.attention(query, key, value, mask, scaling, depth, rows[0].held, rows[0].scale, rows[1].scale)


def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        log.info("attention of one token is torch's: %s", reason)


_said: set[str] = set()

AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def kept_attention(model: Any, described: Description) -> tuple[str, ...]:
    """Why ``model`` keeps the attention that transformers chose, as a sentence; nothing where it takes this one or has none."""
    if not described.attention:
        return ()
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and (reason := _kept(part)):
            return (f"attention is transformers' own ({part.config._attn_implementation}): {type(part).__name__} {reason}",)
    return ()


def _kept(model: Any) -> str | None:
    if model.config._attn_implementation != "sdpa":
        return "has no sdpa attention there, as models with soft caps, attention sinks or alibi have none"
    if not model._can_set_attn_implementation():
        return "does not ask transformers' attention registry"
    code = inspect.getsource(sys.modules[type(model).__module__])
    if re.search(r"_attn_implementation\b[^\n]*[\"']sdpa[\"']", code):
        return "looks for sdpa by name in its own code"
    return None


def use_own_attention(model: Any, described: Description) -> tuple[str, ...]:
    """Make ``model`` attend with :func:`attend`; where it cannot, the reason comes back and nothing was changed."""
    reasons = kept_attention(model, described)
    if not reasons and described.attention:
        model.set_attn_implementation(NAME)
    return reasons
