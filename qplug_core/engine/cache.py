"""A quantized KV cache in the place of transformers' own: its layers hold bytes, attention sees numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import UsageError
from ..reference.kv_cache import CacheCoder

Coders = tuple[CacheCoder, CacheCoder]


class _Quantized:
    """Stores what coders make of keys and values. Growing, sliding, cropping and reordering are the base class's: bytes of a
    token stay together along the last dimension, which none of them touches."""

    keys: Tensor
    values: Tensor
    coders: Coders

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """New keys and values ``[B, H, T, D]`` in, all of them out, in the dtype that came in."""
        encoded = [coder.encode(x) for coder, x in zip(self.coders, (key_states, value_states), strict=True)]
        held = super().update(*encoded, *args, **kwargs)  # type: ignore[misc]
        news = (key_states, value_states)
        keys, values = (c.decode(h, x.shape[-1], x.dtype) for c, h, x in zip(self.coders, held, news, strict=True))
        return keys, values


class QuantCacheLayer(_Quantized, DynamicLayer):  # type: ignore[misc]
    """A layer that sees all tokens."""

    def __init__(self, coders: Coders) -> None:
        super().__init__()
        self.coders = coders


class QuantSlidingLayer(_Quantized, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A layer that sees the last tokens."""

    def __init__(self, sliding_window: int, coders: Coders) -> None:
        super().__init__(sliding_window)
        self.coders = coders


def quant_cache(config: Any, coders: Mapping[int, Coders]) -> DynamicCache:
    """An empty cache for a model of ``config``; ``coders`` by layer index, layers without stay at 16 bit.

    :raises UsageError: for a kind of layer (linear attention, an indexer) whose state is not keys and values.
    """
    cache = DynamicCache(config=config)
    cache.layers += [DynamicLayer() for _ in range(max(coders, default=-1) + 1 - len(cache.layers))]
    for index, pair in coders.items():
        layer = cache.layers[index]
        if type(layer) is DynamicLayer:
            cache.layers[index] = QuantCacheLayer(pair)
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = QuantSlidingLayer(layer.sliding_window, pair)
        else:
            raise UsageError(
                f"layer {index} keeps a {type(layer).__name__}, which is not a cache of keys and values alone; load with kv_cache='16bit'"
            )
    cache.layer_class_to_replicate = None
    return cache


def bytes_per_token(cache: DynamicCache) -> int:
    """Bytes that one token of one sequence takes in all layers of a filled cache."""
    held = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None and t.ndim == 4]
    return sum(t.shape[1] * t.shape[3] * t.element_size() for t in held)
