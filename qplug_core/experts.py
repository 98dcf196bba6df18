"""Experts of one projection as one stack, for kernels that multiply all that a batch selects in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernel import Kernel, PackedWeight
from .method import HubMethod, QuantMethod


@dataclass
class Grouped:
    """A stack of packed experts. Their own packed tensors are views into it, so that a reload of one refills its part."""

    kernel: Kernel
    packed: PackedWeight

    def apply(self, x: Tensor, ends: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :meth:`qplug_core.kernel.Kernel.apply_experts`."""
        return self.kernel.apply_experts(x, self.packed, ends, bias)


def group(methods: Sequence[QuantMethod]) -> Grouped | None:
    """The experts as one stack; None where they have not one grouped kernel and equal layouts: then each is multiplied by itself.

    Each stack is made before the tensors that it replaces are freed: one tensor of all these experts more than the model.
    """
    packs = [m.packed[0] for m in methods if isinstance(m, HubMethod) and len(m.packed) == 1]
    first = packs[0] if packs else None
    if first is None or len(packs) != len(methods) or any(_layout(p) != _layout(first) for p in packs):
        return None
    owner = methods[0]
    assert isinstance(owner, HubMethod)
    if owner.kernels[0] == "16 bit":
        return None
    kernel = owner.resolver.kernel(owner.kernels[0])
    if not kernel.grouped:
        return None
    stacked = {}
    for name in first.tensors:
        # Some 8-bit floats cannot be stacked: their bytes can.
        dtype = first.tensors[name].dtype
        plain = torch.stack([p.tensors[name].view(torch.uint8) if dtype.itemsize == 1 else p.tensors[name] for p in packs])
        stacked[name] = plain.view(dtype)
        for pack, one in zip(packs, stacked[name], strict=True):
            pack.tensors[name] = one
    return Grouped(kernel, PackedWeight(first.kernel, first.n, first.k, stacked, first.meta))


def _layout(packed: PackedWeight) -> object:
    tensors = {name: (t.shape, t.dtype) for name, t in packed.tensors.items()}
    return packed.kernel, packed.n, packed.k, tensors, packed.meta
