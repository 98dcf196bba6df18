"""Peer: a kernel of another library, as a contender. Guarded: an absent library is a row that says how to install it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.util import find_spec

import torch
from torch import Tensor

from ..device import Device
from ..scheme import QuantScheme
from ..weight import QuantWeight
from .contender import Contender

BF16 = torch.bfloat16
ROUNDS = "quantizes x to int8"
"""In the note of a peer that does so where the scheme keeps x: a faster product, and another one."""


class Peer(ABC):
    """One kernel of another library.

    name
        As reports show it.
    install
        The command that brings it; empty for what comes with torch.
    modules
        Modules that it needs; they are looked for, and imported only when it runs.
    vendors
        Devices that it runs on: ``cpu``, ``nvidia``, ``amd``.
    """

    name: str
    install: str = ""
    modules: tuple[str, ...] = ()
    vendors: tuple[str, ...] = ("cpu",)

    def missing(self) -> str:
        """How to get what is absent, or an empty string."""
        absent = [module for module in self.modules if find_spec(module) is None]
        return f"{' and '.join(absent)} not installed: {self.install}" if absent else ""

    @abstractmethod
    def takes(self, scheme: QuantScheme, n: int, k: int) -> bool:
        """True where it multiplies with weights ``[n, k]`` of ``scheme``."""

    @abstractmethod
    def contender(self, weight: QuantWeight, beyond: int, device: Device) -> Contender:
        """Ready to be timed, with ``weight``, which is on ``device``, on copies that fill more than ``beyond`` bytes."""


def integers(scheme: QuantScheme, bits: int, *, symmetric_only: bool = False) -> int | None:
    """The group of weight-only integers of ``bits`` (0: the whole row), or None for every other scheme."""
    part = scheme.weight
    plain = scheme.act is None and not scheme.act_order and not scheme.sparsity
    if part is None or not plain or part.dtype != f"int{bits}" or part.block[0] != 1 or part.scale_dtype != "float":
        return None
    return None if symmetric_only and not part.symmetric else part.block[1]


def unsigned(weight: QuantWeight) -> Tensor:
    """Codes ``[N, K]`` uint8, with symmetric ones moved by half of their range."""
    assert weight.scheme.weight is not None
    if weight.codes.dtype == torch.uint8:
        return weight.codes
    return (weight.codes.to(torch.int16) + half(weight)).to(torch.uint8)


def half(weight: QuantWeight) -> int:
    """The code that means 0 where a symmetric weight is stored without signs."""
    assert weight.scheme.weight is not None
    return 1 << (weight.scheme.weight.bits - 1)


def zeros(weight: QuantWeight) -> Tensor:
    """Zero points of :func:`unsigned`, float32 in the shape of the scales."""
    if weight.zeros is None:
        return torch.full(weight.scales.shape, float(half(weight)), device=weight.scales.device)
    return weight.zeros.float()
