"""Kernel: who multiplies, on which hardware, and what it takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .device import Device
from .layer import Op
from .scheme import QuantScheme
from .support import Refusal

if TYPE_CHECKING:
    from torch import Tensor

    from .weight import OpaqueWeight, QuantWeight


@dataclass(frozen=True)
class Problem:
    """What a kernel is asked to multiply, without any tensor: everything that ``supports`` may look at.

    ``n``, ``k``: the shape on this rank. ``dtype``: of activations, ``float32``, ``bfloat16`` or ``float16``.
    ``scheme``: of the weight as it is cut here (a cut through a group has smaller groups). ``encoding``: of an opaque weight.
    ``act_shift``: whether x is shifted before it is scaled (OmniQuant). ``float_zeros``: zero points that are not integers.
    """

    op: Op
    scheme: QuantScheme
    n: int
    k: int
    dtype: str = "bfloat16"
    encoding: str = ""
    pre_scale: bool = False
    act_shift: bool = False
    float_zeros: bool = False
    shift: bool = False


@dataclass
class PackedWeight:
    """A weight in the layout of one kernel.

    ``tensors`` are what ``apply`` reads, in an order that the kernel fixes; ``meta`` holds what is no tensor. Packing
    again into the same PackedWeight refills the same storage.
    """

    kernel: str
    n: int
    k: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def refill(self, other: PackedWeight) -> PackedWeight:
        """Copy the tensors of ``other`` into the storage of this one, which keeps every address.

        :raises ValueError: where shapes or dtypes differ; nothing is copied then.
        """
        if self.tensors.keys() != other.tensors.keys():
            raise ValueError(f"packed tensors {sorted(other.tensors)} were given; {sorted(self.tensors)} are in use")
        for name, tensor in self.tensors.items():
            new = other.tensors[name]
            if new.shape != tensor.shape or new.dtype != tensor.dtype:
                raise ValueError(
                    f"packed {name} is {new.dtype} {tuple(new.shape)}; {tensor.dtype} {tuple(tensor.shape)} is in use"
                )
        for name, tensor in self.tensors.items():
            tensor.copy_(other.tensors[name])
        self.meta = other.meta
        return self


class Kernel(ABC):
    """One implementation of one operation for some schemes and devices.

    ``name`` is the declared name, ``plugin.backend_scheme``. A kernel holds no state of any layer.
    """

    name: str
    grouped: bool = False
    """Whether :meth:`apply_experts` is there: one call for all experts of a projection. Without it, each has a call of its own."""

    @abstractmethod
    def supports(self, problem: Problem, device: Device) -> list[Refusal]:
        """Every reason why this kernel cannot take ``problem`` on ``device``; an empty list means that it can. Pure."""

    @abstractmethod
    def pack(self, weight: QuantWeight | OpaqueWeight, out: PackedWeight | None = None) -> PackedWeight:
        """The weight in this kernel's layout; with ``out``, in the storage of ``out``."""

    @abstractmethod
    def apply(self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """``x [*, K]`` times the weight ``[N, K]`` transposed, plus ``bias [N]``: ``[*, N]`` in the dtype of x.

        For ``op="embedding"``: x is a LongTensor of rows, the result is ``[*, K]``.
        """

    def apply_experts(self, x: Tensor, packed: PackedWeight, ends: Tensor, bias: Tensor | None = None) -> Tensor:
        """Rows ``ends[e-1]`` to ``ends[e]`` of ``x [T, K]`` times expert e, plus ``bias [E, N]``: ``[T, N]`` in the dtype of x.

        ``packed``: the tensors of :meth:`pack` with E in front. ``ends``: LongTensor ``[E]``, ascending; rows past the last come out as 0.
        """
        raise NotImplementedError(f"{self.name} multiplies one expert at a time")


def problem_of(weight: QuantWeight | OpaqueWeight, op: Op, dtype: str) -> Problem:
    """The problem that a decoded weight really poses, which may be more general than its config said."""
    from .weight import OpaqueWeight

    if isinstance(weight, OpaqueWeight):
        return Problem(op, weight.scheme, weight.n, weight.k, dtype, weight.encoding, weight.pre_scale is not None)
    assert weight.scheme.weight is not None
    scheme = replace(
        weight.scheme,
        weight=replace(weight.scheme.weight, block=weight.block),
        act_order=weight.group_index is not None,
    )
    return Problem(
        op,
        scheme,
        weight.n,
        weight.k,
        dtype,
        pre_scale=weight.pre_scale is not None,
        act_shift=weight.act_shift is not None,
        float_zeros=weight.zeros is not None and weight.zeros.is_floating_point(),
        shift=weight.shift is not None,
    )
