"""Contender: one way to multiply with one weight, ready to be timed on copies of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..device import Device
from ..kernel import Kernel, PackedWeight
from ..weight import QuantWeight

Kind = Literal["qplug", "bf16", "peer", "limit"]
Call = Callable[[Any], Any]
"""From what ``Contender.prepare`` gives to what ``Contender.result`` takes."""


def same(x: Any) -> Any:
    """What is given; for contenders that take and return tensors."""
    return x


@dataclass
class Contender:
    """A way to multiply.

    calls
        One for each copy of the weight; together the copies are larger than the cache.
    nbytes
        Of one packed weight.
    prepare
        From x ``[M, K]`` in the dtype of the run to what a call takes; not timed.
    result
        From what a call returns to ``[M, N]``; not timed.
    note
        How it differs from the product of the run: other activations, a part that it leaves out.
    """

    name: str
    kind: Kind
    calls: Sequence[Call]
    nbytes: int
    prepare: Call = same
    result: Call = same
    note: str = ""


MOST = 256
"""Copies of one weight at most; more would take longer to make than to time. Smaller weights stay in a cache."""


def copies(beyond: int, nbytes: int, make: Callable[[int], Call]) -> list[Call]:
    """Calls on as many copies of a weight of ``nbytes`` as do not fit into ``beyond`` bytes; from 1 to :data:`MOST`."""
    return [make(i) for i in range(min(MOST, max(1, -(-beyond // max(nbytes, 1)))))]


def of_kernel(kernel: Kernel, weight: QuantWeight, name: str, beyond: int) -> Contender:
    """A kernel with ``weight``, which is on the device of the run."""
    packed = kernel.pack(weight)
    # Packing again gives memory of the kind that an engine's weights are in. Where it shares what it was given, as the reference kernel's does,
    # a deep copy does not, and keeps tensors that share storage sharing it.
    shares = bool(_storages(weight.tensors().values()) & _storages(packed.tensors.values()))

    def make(index: int) -> Call:
        own: PackedWeight = copy.deepcopy(packed) if shares else kernel.pack(weight)
        return lambda x: kernel.apply(x, own)

    return Contender(name, "qplug", copies(beyond, packed.nbytes, make), packed.nbytes)


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


def of_bf16(weight: Tensor, beyond: int) -> Contender:
    """``torch.nn.functional.linear`` with the weight ``[N, K]`` rounded to bf16."""
    plain = weight.to(torch.bfloat16)

    def make(index: int) -> Call:
        own = plain.clone()
        return lambda x: torch.nn.functional.linear(x, own)

    return Contender(
        "F.linear bfloat16", "bf16", copies(beyond, plain.nbytes, make), plain.nbytes, lambda x: x.to(torch.bfloat16)
    )


def beyond_cache(device: Device, quick: bool = False) -> int:
    """Bytes that no cache of ``device`` keeps between two calls: three times the largest cache. ``quick``: a third of it."""
    size = 32 * 2**20
    if device.vendor != "cpu":
        size = max(size, int(getattr(torch.cuda.get_device_properties(device.index), "L2_cache_size", 0)))
    else:
        size = max(size, _last_level_cache())
    return size if quick else 3 * size


def _last_level_cache() -> int:
    from pathlib import Path

    found = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            found = max(found, int(text[:-1]) * 1024)
    return found
