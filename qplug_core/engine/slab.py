"""A KV cache that is written in place: layers for transformers' cache whose keys and values lie in storage with room for more tokens.

With coders a layer holds bytes. What ``update`` gives then is a :class:`Held`: own attention reads the bytes, and any other operation
gets the numbers that they stand for, so no model can mistake them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..kernels import cpu_kv_cache, triton_kv_cache
from ..kernels.cpu_kv_cache import Rows
from ..reference.kv_cache import CacheCoder

Coders = tuple[CacheCoder, CacheCoder]
LEAST = 64
"""Tokens that the first storage has room for."""


class Held(Tensor):
    """Keys or values ``[B, H, T, D]`` that are kept as bytes: numbers for every operation of torch, decoded when the first asks.

    data
        uint8 ``[B, H, T, W]``, as ``coder`` made it.
    rows
        How the C kernels read ``data``; None where they do not.
    """

    data_bytes: Tensor
    coder: CacheCoder
    rows: Rows | None
    decoded: Tensor | None

    @staticmethod
    def __new__(cls, data: Tensor, coder: CacheCoder, rows: Rows | None, depth: int, dtype: torch.dtype) -> Held:
        """``depth``: channels of a head; ``dtype``: of the numbers."""
        made: Held = torch.Tensor._make_wrapper_subclass(cls, (*data.shape[:-1], depth), dtype=dtype, device=data.device)
        made.data_bytes, made.coder, made.rows = data, coder, rows
        made.decoded = None
        return made

    def numbers(self) -> Tensor:
        """All of it decoded; kept, because attention may ask twice."""
        if self.decoded is None:
            if self.rows is None:
                self.decoded = self.coder.decode(self.data_bytes, self.shape[-1], self.dtype)
            else:
                self.decoded = cpu_kv_cache.decode(self.rows, self.data_bytes, self.shape[-1], self.dtype)
        return self.decoded

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(Held, lambda held: held.numbers(), (args, kwargs or {}))
        return func(*args, **kwargs)


class Room:
    """Storage ``[B, H, capacity, W]`` for the keys or the values of one layer; ``used`` is the view of it that holds tokens."""

    def __init__(self, coder: CacheCoder | None) -> None:
        self.coder = coder
        self.rows: Rows | None = None
        self.slab: Tensor | None = None
        self.used: Tensor | None = None
        self.start = 0

    def append(self, held: Tensor | None, new: Tensor) -> Tensor:
        """Tokens ``new [B, H, T, D]`` behind ``held``: the view that was given last, or what something else made of it."""
        count = 0 if held is None or held.ndim != 4 else held.shape[2]
        tokens = new.shape[2]
        slab = self.slab
        if slab is None or held is not self.used or self.start + count + tokens > slab.shape[2]:
            slab = self._allocate(new, count + tokens)
            if held is not None and count:
                slab[:, :, :count] = held
            self.slab, self.start = slab, 0
        self._write(slab.narrow(2, self.start + count, tokens), new)
        self.used = slab.narrow(2, self.start, count + tokens)
        return self.used

    def fits(self, held: Tensor | None) -> bool:
        """Whether one more token goes behind ``held`` without a copy."""
        return (
            held is not None
            and held is self.used
            and self.slab is not None
            and self.start + held.shape[2] < self.slab.shape[2]
        )

    def extend(self) -> Tensor:
        """One token more, which the caller writes."""
        assert self.slab is not None
        assert self.used is not None
        self.used = self.slab.narrow(2, self.start, self.used.shape[2] + 1)
        return self.used

    def last(self, tokens: int) -> Tensor:
        """Forget all but the last ``tokens``."""
        assert self.used is not None
        if (extra := self.used.shape[2] - tokens) > 0:
            self.start += extra
            self.used = self.used.narrow(2, extra, tokens)
        return self.used

    def shown(self, used: Tensor, new: Tensor) -> Tensor:
        """``used`` as numbers like ``new``."""
        return used if self.coder is None else Held(used, self.coder, self.rows, new.shape[3], new.dtype)

    def _allocate(self, new: Tensor, tokens: int) -> Tensor:
        batch, heads, _, depth = new.shape
        if self.coder is None:
            return new.new_empty(batch, heads, max(2 * tokens, LEAST), depth)
        if not cpu_kv_cache.refusals(self.coder, depth, new.dtype, new.device):
            self.rows = cpu_kv_cache.rows_of(self.coder, new.dtype)
        shape = (batch, heads, max(2 * tokens, LEAST), self.coder.width(depth))
        return torch.empty(shape, dtype=torch.uint8, device=new.device)

    def _write(self, to: Tensor, new: Tensor) -> None:
        if self.coder is None:
            to.copy_(new)
        elif self.rows is not None:
            cpu_kv_cache.encode(self.rows, new, to)
        elif triton_kv_cache.takes(self.coder, new):
            triton_kv_cache.store(self.coder, new, to)
        else:
            to.copy_(self.coder.encode(new))


class SlabLayer(DynamicLayer):  # type: ignore[misc]
    """A layer that sees all tokens. ``coders``: what quantizes keys and values, None at 16 bit.

    Cropping, reordering and choosing sequences are the base class's: what they leave is taken over at the next token.
    """

    keys: Tensor | None
    values: Tensor | None

    def __init__(self, coders: Coders | None = None) -> None:
        super().__init__()
        self.coders = coders
        self.rooms = tuple(Room(coder) for coder in coders or (None, None))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """New keys and values ``[B, H, T, D]`` in, all of them out."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        k, v = self.rooms
        self.keys, self.values = k.append(self.keys, key_states), v.append(self.values, value_states)
        return k.shown(self.keys, key_states), v.shown(self.values, value_states)

    def extend(self) -> tuple[Tensor, Tensor] | None:
        """All keys and values with one token more, which the caller writes; None where that takes more than storage at hand."""
        k, v = self.rooms
        if self.coders is not None or not k.fits(self.keys) or not v.fits(self.values):
            return None
        self.keys, self.values = k.extend(), v.extend()
        return self.keys, self.values


class SlabSlidingLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A layer that sees the last ``sliding_window`` tokens, otherwise as :class:`SlabLayer`."""

    keys: Tensor | None
    values: Tensor | None

    def __init__(self, sliding_window: int, coders: Coders | None = None) -> None:
        super().__init__(sliding_window)
        self.coders = coders
        self.rooms = tuple(Room(coder) for coder in coders or (None, None))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """New keys and values ``[B, H, T, D]`` in; the window before them and they come out."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        k, v = self.rooms
        news, before = (key_states, value_states), self.sliding_window - 1
        used = [room.append(held, new) for room, held, new in zip(self.rooms, (self.keys, self.values), news, strict=True)]
        if self.record_past:
            # What is to be taken back by `crop` stays; what is seen is what `get_mask_sizes` tells.
            self.keys, self.values = used
            used = [t[:, :, -(before + key_states.shape[2]) :] for t in used]
        else:
            self.keys, self.values = k.last(before), v.last(before)
        return k.shown(used[0], key_states), v.shown(used[1], value_states)
