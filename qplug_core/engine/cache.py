"""The KV cache of the reference engine: transformers' own with layers that are written in place, and hold bytes where there are coders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import UsageError
from .slab import Coders, SlabLayer, SlabSlidingLayer


def quant_cache(config: Any, coders: Mapping[int, Coders]) -> DynamicCache:
    """An empty cache for a model of ``config``; ``coders`` by layer index, layers without stay at 16 bit.

    :raises UsageError: for a kind of layer (linear attention, an indexer) whose state is not keys and values.
    """
    cache = DynamicCache(config=config)
    cache.layers += [DynamicLayer() for _ in range(max(coders, default=-1) + 1 - len(cache.layers))]
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = SlabLayer(coders.get(index))
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = SlabSlidingLayer(layer.sliding_window, coders.get(index))
        elif index in coders:
            raise UsageError(
                f"layer {index} keeps a {type(layer).__name__}, which is not a cache of keys and values alone; load with kv_cache='16bit'"
            )
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = None if coders else SlabLayer
    return cache


def bytes_per_token(cache: DynamicCache) -> int:
    """Bytes that one token of one sequence takes in all layers of a filled cache."""
    held = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None and t.ndim == 4]
    return sum(t.shape[1] * t.shape[3] * t.element_size() for t in held)
