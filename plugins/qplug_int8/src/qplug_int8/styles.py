"""Style: what one layer's INT8 tensors are called and how they lie. One reader and one writer serve all engines.

Of a layer ``[N, K]``, in a style that has them:

========== ============================================================ ====== ==========================================
weight     [N, K]; transposed [K, N], a fused qkv also [K, 3, N/3]      int8   codes
scales     [N], [N, 1] or [1, N]; [], [1] or [1, 1]; [3, N/3], [3, 1]   float  a step: codes times scale is the weight
smoother   [K] or [1, K]                                                float  divides x
shift      [K]                                                          float  is added to x after that
input      [] or [1]                                                    float  step of static activation codes
========== ============================================================ ====== ==========================================

So ``y = (x / smoother + shift) W^T``. The hub says ``(x - act_shift) * pre_scale``: ``pre_scale = 1 / smoother`` and
``act_shift = -shift * smoother``, each rounded once to float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qplug_core.axes import FLOATS, StoredTensor
from qplug_core.config import LayerQuant
from qplug_core.errors import CannotEncode, DecodeError
from qplug_core.scheme import QuantScheme
from qplug_core.weight import OpaqueWeight, QuantWeight

ROWS = (("N",), ("N", "1"), ("1", "N"))
SCALAR: tuple[tuple[str, ...], ...] = ((), ("1",), ("1", "1"))
PARTS = (("3", "N/3"), ("3", "1"))
"""Shapes of scales: of rows, of the tensor, and of a fused query, key and value that keep their axis."""


@dataclass(frozen=True)
class Style:
    """Names are suffixes after the module, ``""`` for a tensor that the style does not have.

    rows, scalar
        The shape of scales that is written; every shape of the table is read.
    input_scale
        Template of the static activation scale; ``input_shared`` that of one that query, key and value share.
    unused
        Tensors that exporters write beside these, for other ways to run the same layer: claimed and not read.
    """

    weight: str
    scales: str
    transposed: bool = False
    rows: tuple[str, ...] = ("N",)
    scalar: tuple[str, ...] = ()
    smoother: str = ""
    shift: str = ""
    input_scale: str = ""
    input_shared: str = ""
    unused: tuple[str, ...] = ()

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The tensors of one layer. ``opts``: ``parts`` 3 for a weight [K, 3, N/3], ``shared`` for a shared input scale."""
        parts, local = quant.opt("parts", 1), quant.opt("parts", 1) == 1
        axes = ("K", "N") if self.transposed else ("N", "K")
        stored = [StoredTensor(self.weight, axes if local else ("K", "3", "N/3"), ("I8",), local=local)]
        main = self._shape(quant.scheme)
        shapes = (SCALAR if main in SCALAR else ROWS) if parts == 1 else (*PARTS, *ROWS)
        main = main if parts == 1 else PARTS[0]
        alt = tuple(shape for shape in shapes if shape != main)
        stored.append(StoredTensor(self.scales, main, FLOATS, alt=alt, local=local))
        if self.smoother:
            stored.append(StoredTensor(self.smoother, ("K",), FLOATS, optional=True, alt=(("1", "K"),)))
        if self.shift:
            stored.append(StoredTensor(self.shift, ("K",), FLOATS, optional=True, alt=(("1", "K"),)))
        if self.input_scale:
            shared = bool(quant.opt("shared"))
            name = self.input_shared if shared else self.input_scale
            stored.append(StoredTensor(name, (), FLOATS, alt=SCALAR[1:], shared=shared))
        for name in self.unused:
            codes = name.startswith("weight")
            others = (("K", "N"), ("K", "3", "N/3")) if codes else (*SCALAR, *ROWS, *PARTS)
            dtypes = ("I8",) if codes else FLOATS
            stored.append(StoredTensor(name, others[0], dtypes, optional=True, alt=others[1:], meta=True, local=local))
        return tuple(stored)

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """The weight of a window ``[n, k]``.

        :raises DecodeError: for a smoother or scale that no producer writes: zero, negative, NaN or infinite.
        """
        codes = tensors[self.weight]
        if self.transposed:
            codes = codes.reshape(k, n).t().contiguous()
        part = quant.scheme.weight
        assert part is not None
        scales = tensors[self.scales]
        if quant.opt("parts", 1) == 3 and scales.numel() == 3:
            scales = scales.reshape(3, 1).expand(3, n // 3)
        scales = scales.reshape(n if part.block[0] else 1, 1)
        _check(scales, self.scales, zero=True)
        smoother, shift = (_row(tensors, name) for name in (self.smoother, self.shift))
        if smoother is not None:
            _check(smoother, self.smoother)
        act_scale = None
        if self.input_scale:
            act_scale = next(tensors[name] for name in (self.input_scale, self.input_shared) if name in tensors)
            _check(act_scale, "the input scale")
            act_scale = act_scale.float().reshape(())
        return QuantWeight(
            quant.scheme,
            codes,
            scales.contiguous(),
            part.block,
            pre_scale=None if smoother is None else smoother.reciprocal(),
            act_shift=None if shift is None else -shift if smoother is None else -shift * smoother,
            act_scale=act_scale,
        )

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`.

        :raises CannotEncode: for fields that the style has no tensor for, or a factor that no float32 inverts to.
        """
        weight = self._storable(weight, quant)
        parts = quant.opt("parts", 1)
        codes = weight.codes.t() if self.transposed else weight.codes
        shape = (
            (3, weight.n // 3) if parts == 3 else tuple({"N": weight.n, "1": 1}[axis] for axis in self._shape(quant.scheme))
        )
        stored = {
            self.weight: codes.reshape(weight.k, 3, -1).contiguous() if parts == 3 else codes.contiguous(),
            self.scales: weight.scales.reshape(shape).contiguous(),
        }
        for name, value in zip((self.smoother, self.shift), _factors(weight.pre_scale, weight.act_shift), strict=True):
            if value is not None:
                stored[name] = value
        if weight.act_scale is not None:
            stored[self.input_shared if quant.opt("shared") else self.input_scale] = weight.act_scale.reshape(())
        return stored

    def _shape(self, scheme: QuantScheme) -> tuple[str, ...]:
        return self.rows if scheme.weight is not None and scheme.weight.block[0] else self.scalar

    def _storable(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> QuantWeight:
        """``weight``, where every field of it has a tensor."""
        if isinstance(weight, OpaqueWeight) or weight.experts is not None:
            what = "an opaque encoding" if isinstance(weight, OpaqueWeight) else "a stack of experts"
            raise CannotEncode(
                f"{what} was given; {quant.layout} stores one matrix for each module, so choose another format"
            )
        if weight.scheme != quant.scheme:
            raise CannotEncode(
                f"a weight of scheme {weight.scheme} was given; the layer is to be stored as {quant.scheme}, so quantize it to that"
            )
        if (act := weight.scheme.act) is None or act.dynamic == bool(self.input_scale):
            wanted = "static" if self.input_scale else "dynamic"
            raise CannotEncode(
                f"scheme {weight.scheme} was given; {quant.layout} holds {wanted} int8 activations, so choose another format"
            )
        names = {"pre_scale": self.smoother, "act_shift": self.shift, "act_scale": self.input_scale}
        held = {"codes", "scales", *(field for field, name in names.items() if name)}
        if extra := weight.tensors().keys() - held:
            raise CannotEncode(
                f"a weight with {', '.join(sorted(extra))} was given; {quant.layout} has no tensor for it, so choose another format"
            )
        for field in ("pre_scale", "act_shift"):
            if (value := getattr(weight, field)) is not None and value.dtype != torch.float32:
                raise CannotEncode(
                    f"{field} is {value.dtype}; {quant.layout} holds it as float32, so convert it where the weight is made"
                )
        return weight


def _row(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    value = tensors.get(name) if name else None
    return None if value is None else value.float().reshape(-1)


def _check(value: Tensor, name: str, zero: bool = False) -> None:
    good = torch.isfinite(value) & ((value >= 0) if zero else (value > 0))
    if not bool(good.all()):
        bad = float(value[~good].flatten()[0])
        raise DecodeError(f"{name} holds {bad}; finite positive numbers were needed, so calibrate the checkpoint again")


def _factors(pre_scale: Tensor | None, act_shift: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The smoother and the shift, float32, that :meth:`Style.decode` turns into ``pre_scale`` and ``act_shift``, bit for bit.

    Rounding moves each by one unit in the last place at most, so three candidates of each are all that there are.
    """
    if pre_scale is None:
        return None, None if act_shift is None else -act_shift
    shifts = torch.zeros_like(pre_scale) if act_shift is None else act_shift
    smoother, shift = torch.ones_like(pre_scale), torch.zeros_like(pre_scale)
    missing = torch.ones_like(pre_scale, dtype=torch.bool)
    for s in _near(pre_scale.reciprocal()):
        for d in _near(-shifts / s) if act_shift is not None else (shift,):
            good = missing & (s.reciprocal() == pre_scale) & (-d * s == shifts)
            smoother, shift, missing = torch.where(good, s, smoother), torch.where(good, d, shift), missing & ~good
    if bool(missing.any()):
        at = int(missing.nonzero()[0])
        raise CannotEncode(
            f"column {at} has pre_scale {float(pre_scale[at])!r} and act_shift {float(shifts[at])!r}, which no float32 smoother and "
            "shift give back; write a format that stores the factor itself, such as modelopt"
        )
    return smoother, None if act_shift is None else shift


def _near(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    up, down = (torch.nextafter(values, torch.full_like(values, end)) for end in (float("inf"), float("-inf")))
    return values, up, down
