"""Declared axes: how a stored tensor follows the logical axes of its layer, so that core can cut any of them.

An axis is written as it is said: ``"N"``, ``"K/8"`` (one stored element for 8 logical), ``"3*K/32"`` (three for 32;
numerator and denominator are kept as written, because a unit of 32 cannot be cut at 16), ``"ceil(K/128)"`` (a ragged
end is allowed), ``"8*ceil(K/1024)"`` (eight for every unit of 1024 that is begun: padded), ``"N*K/2"`` (flattened
row-major), ``"E"``, a plain number, or ``"?"`` (any length: text, which says its own).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

_AXIS = re.compile(r"^(?:(?P<num>\d+)\*)?(?P<var>N\*K|N|K|E)(?:/(?P<den>\d+))?$")
_PADDED = re.compile(r"^(\d+)\*ceil\(([NKE])/(\d+)\)$")


@dataclass(frozen=True)
class Axis:
    """``num`` stored elements for every ``den`` logical ones of ``var`` (``""`` for a constant length ``num``)."""

    var: str
    num: int = 1
    den: int = 1
    ceil: bool = False
    padded: bool = False

    @classmethod
    def parse(cls, text: str) -> Axis:
        """The axis that ``text`` says.

        :raises ValueError: for text that is not an axis.
        """
        if text.isdigit():
            return cls("", int(text))
        if text == "?":
            return cls("?")
        if padded := _PADDED.match(text):
            return cls(padded[2], int(padded[1]), int(padded[3]), ceil=True, padded=True)
        ragged = text.startswith("ceil(") and text.endswith(")")
        found = _AXIS.match(text[5:-1] if ragged else text)
        if not found:
            raise ValueError(f"{text!r} is not an axis; write N, K/8, 3*K/32, ceil(K/128), N*K/2, E, ? or a number")
        return cls(found["var"], int(found["num"] or 1), int(found["den"] or 1), ragged)

    def length(self, sizes: Mapping[str, int]) -> int | None:
        """Stored length for logical ``sizes`` of N, K and E; None where they do not divide and the axis is not ragged."""
        if not self.var:
            return self.num
        if self.var == "?":
            return None
        if self.var == "E" and "E" not in sizes:
            return None  # One matrix was asked for, and this is the shape of a stack.
        logical = sizes["N"] * sizes["K"] if self.var == "N*K" else sizes[self.var]
        if self.padded:
            return -(-logical // self.den) * self.num
        if self.ceil:
            return -(-logical * self.num // self.den)
        return None if logical % self.den else logical // self.den * self.num

    def cut(self, start: int, stop: int) -> slice:
        """Stored elements of the logical range ``start:stop``, which begins on a unit."""
        return slice(start // self.den * self.num, -(-stop * self.num // self.den))


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a layer as a format stores it.

    name
        Suffix after the layer's stored name: ``"qweight"`` is ``<layer>.qweight``; a name with ``{module}`` in it
        is a template of its own, such as ``"{module}_scale_inv"``; ``{parent}`` is the module that the layer is in.
    axes
        One string for each dimension.
    dtypes
        safetensors names that are taken: ``("I32",)``; ``FLOATS`` stands for F16, BF16 and F32.
    optional, meta
        May be absent; holds no numbers of the weight, is claimed and checked only.
    whole
        Axes along which the tensor is never cut: a look-up table, such as the scales of an act-order layer.
    alt
        Other shapes under which the same tensor is seen, such as ``(("N", "1"),)`` beside ``("N",)``.
    local
        False where a cut of the tensor is not the tensor of a cut: it is read whole, decoded, then narrowed.
    shared
        Stored once for several layers, each of which takes all of it: one input scale beside query, key and value.
    """

    name: str
    axes: tuple[str, ...]
    dtypes: tuple[str, ...]
    optional: bool = False
    whole: tuple[str, ...] = ()
    alt: tuple[tuple[str, ...], ...] = ()
    meta: bool = False
    local: bool = True
    shared: bool = False

    def full_name(self, module: str) -> str:
        """Name in the checkpoint for a layer stored as ``module``."""
        if "{" not in self.name:
            return f"{module}.{self.name}"
        return self.name.format(module=module, parent=module.rpartition(".")[0])

    def match(self, shape: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[Axis, ...] | None:
        """The declared axes that give ``shape``, or None."""
        for names in (self.axes, *self.alt):
            axes = tuple(Axis.parse(a) for a in names)
            lengths = [shape[i] if a.var == "?" and i < len(shape) else a.length(sizes) for i, a in enumerate(axes)]
            if tuple(lengths) == shape:
                return axes
        return None

    def shapes(self, sizes: Mapping[str, int]) -> str:
        """The declared shapes for ``sizes``, for error messages."""
        found = []
        for names in (self.axes, *self.alt):
            lengths = [Axis.parse(a).length(sizes) for a in names]
            found.append("[" + ", ".join(a if n is None else str(n) for a, n in zip(names, lengths, strict=True)) + "]")
        return " or ".join(found)


FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Window:
    """A half-open window of rows and columns of one layer."""

    n0: int
    n1: int
    k0: int
    k1: int

    @property
    def sizes(self) -> dict[str, int]:
        """Logical N and K of the window."""
        return {"N": self.n1 - self.n0, "K": self.k1 - self.k0}


def covering(stored: Mapping[StoredTensor, tuple[Axis, ...]], window: Window, n: int, k: int) -> Window:
    """The smallest window around ``window`` that every tensor can be cut at: ends rounded out to the lcm of the units."""
    if any(not tensor.local for tensor in stored):
        return Window(0, n, 0, k)
    units = {"N": 1, "K": 1}
    for tensor, axes in stored.items():
        for axis in axes:
            if axis.var == "N*K":
                # A flattened tensor can be cut at rows only, where a row ends on a unit.
                if (window.k0, window.k1) != (0, k):
                    window = Window(window.n0, window.n1, 0, k)
                units["N"] = math.lcm(units["N"], axis.den // math.gcd(axis.den, k))
            elif axis.var in units and axis.var not in tensor.whole:
                units[axis.var] = math.lcm(units[axis.var], axis.den)
    rows, columns = units["N"], units["K"]
    return Window(
        window.n0 // rows * rows,
        min(n, -(-window.n1 // rows) * rows),
        window.k0 // columns * columns,
        min(k, -(-window.k1 // columns) * columns),
    )


def slices(tensor: StoredTensor, axes: tuple[Axis, ...], window: Window, k: int) -> tuple[slice, ...]:
    """Index of ``window`` in a stored tensor with declared ``axes``; the window is a covering one."""
    cuts: list[slice] = []
    for axis in axes:
        if axis.var == "N" and "N" not in tensor.whole:
            cuts.append(axis.cut(window.n0, window.n1))
        elif axis.var == "K" and "K" not in tensor.whole:
            cuts.append(axis.cut(window.k0, window.k1))
        elif axis.var == "N*K":
            cuts.append(axis.cut(window.n0 * k, window.n1 * k))
        else:
            cuts.append(slice(None))
    return tuple(cuts)
