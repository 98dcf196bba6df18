"""The optimum-quanto checkpoint format: stored tensors, decode, encode.

Of one layer ``[N, K]``; int4 and int2 in G = N*K/g groups, ``v`` (2 or 4) codes to a byte:

=================== ==================== ================ =============================================================
weight._data        [N, K]               int8, float8     codes of 8 bits
weight._data._data  [ceil(G/v), g]       uint8            codes of 4 and 2 bits: the first G/v groups in the lowest bits
weight._scale       [N, 1] or [G, 1]     float            by row, or by group
weight._shift       [G, 1]               float            ``w = q * scale - shift``; int4 and int2 only
  or                                     uint8, int8      ``w = (q - shift) * scale``
input_scale         []                   float            static scale of the input; 1 where that stays 16 bit
output_scale        []                   float            not used; 1 where activations stay 16 bit
=================== ==================== ================ =============================================================

Rows that are one group (see :data:`qplug_quanto.config.GROUPS`) are ``[ceil(N/v), K]`` with ``[N, 1]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qplug_core.axes import FLOATS, StoredTensor
from qplug_core.config import LayerQuant, QuantizationConfig
from qplug_core.errors import CannotEncode, DecodeError
from qplug_core.format import CheckpointFormat
from qplug_core.scheme import TensorQuant
from qplug_core.weight import OpaqueWeight, QuantWeight

from .config import GROUPS, STORED, VALUES, parse, write

if TYPE_CHECKING:
    from qplug_core.source import Source


class QuantoFormat(CheckpointFormat):
    """One layout."""

    name = "quanto"

    def parse(self, source: Source) -> QuantizationConfig:
        """See :func:`qplug_quanto.config.parse`."""
        return parse(source)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The tensors of the table above. The group size follows from K, so that any of them may be found."""
        part, act = _part(quant), quant.scheme.act
        scales = (
            StoredTensor("input_scale", (), FLOATS, optional=act is None, alt=(("1",),), meta=act is None),
            StoredTensor("output_scale", (), FLOATS, optional=True, alt=(("1",),), meta=True),
        )
        if part.dtype in STORED:
            rows = StoredTensor("weight._scale", ("N", "1"), FLOATS)
            return (StoredTensor("weight._data", ("N", "K"), (STORED[part.dtype],)), rows, *scales)
        values = VALUES[part.dtype]
        sizes = dict.fromkeys([part.block[1], *GROUPS, 0])
        packed = [(f"ceil(N*K/{g * values})", str(g)) if g else (f"ceil(N/{values})", "K") for g in sizes]
        grids = [(f"N*K/{g}" if g else "N", "1") for g in sizes]
        return (
            # Bytes hold rows from far apart, so the layer is read whole.
            StoredTensor("weight._data._data", packed[0], ("U8",), alt=tuple(packed[1:]), local=False),
            StoredTensor("weight._scale", grids[0], FLOATS, alt=tuple(grids[1:])),
            StoredTensor("weight._shift", grids[0], (*FLOATS, "U8", "I8"), alt=tuple(grids[1:])),
            *scales,
        )

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """Codes int8 or float8; of 4 and 2 bits uint8 with a float ``shift`` or int16 zeros, in the group size that is stored.

        :raises DecodeError: for activation scales that contradict the config, and scales that are not those of the codes.
        """
        part = _part(quant)
        act_scale = _act_scale(tensors, quant)
        scale = tensors["weight._scale"]
        if part.dtype in STORED:
            return QuantWeight(quant.scheme, tensors["weight._data"], scale, part.block, act_scale=act_scale)
        words, shift = tensors["weight._data._data"], tensors["weight._shift"]
        group, count = words.shape[1], scale.shape[0]
        if count * group != n * k or shift.shape[0] != count:
            raise DecodeError(
                f"weight._scale has {count} groups, weight._shift {shift.shape[0]}, of {group} values; [{n}, {k}] needs "
                f"{n * k // group}, so the file is damaged: fetch it again"
            )
        if group != (part.block[1] or k):
            part = replace(part, block=(1, group if group < k else 0))
        values = _unpack(words, part.bits, count).reshape(n, k)
        offset = shift.reshape(n, -1)
        shifted = shift.is_floating_point()
        return QuantWeight(
            replace(quant.scheme, weight=part),
            values,
            scale.reshape(n, -1),
            part.block,
            zeros=None if shifted else offset.to(torch.int16),
            shift=offset if shifted else None,
            act_scale=act_scale,
        )

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`, as quanto reads it.

        :raises CannotEncode: for anything but 16-bit activations, rows of 8 bits, and 4 or 2 bits in the groups that quanto takes.
        """
        weight = _storable(weight)
        part = _part(quant)
        if weight.scheme != quant.scheme:
            raise CannotEncode(f"a weight of scheme {weight.scheme} was given; the layer is to be stored as {quant.scheme}")
        one = torch.ones((), dtype=weight.scales.dtype)
        tensors = {"input_scale": one, "output_scale": one.clone()}
        if part.dtype in STORED:
            return {"weight._data": weight.codes.contiguous(), "weight._scale": weight.scales.contiguous(), **tensors}
        group, wanted = part.block[1] or weight.k, _group(weight.k)
        if group != (wanted or weight.k):
            raise CannotEncode(
                f"groups of {group} were given for {weight.k} columns; quanto reads {wanted or 'one group for each row'} there, so "
                "quantize with that"
            )
        offset = weight.shift
        if weight.zeros is not None:
            if weight.zeros.is_floating_point() or bool(((weight.zeros < 0) | (weight.zeros > 127)).any()):
                raise CannotEncode(
                    "zero points that are no integers from 0 to 127 were given; quanto has no tensor for them, so store them as hqq"
                )
            offset = weight.zeros.to(torch.uint8)
        assert offset is not None
        return {
            "weight._data._data": _pack(weight.codes.reshape(-1, group), part.bits),
            "weight._scale": weight.scales.reshape(-1, 1).contiguous(),
            "weight._shift": offset.reshape(-1, 1).contiguous(),
            **tensors,
        }

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """The one layout.

        :raises CannotEncode: for a weight that quanto has no numbers for.
        """
        return LayerQuant(_storable(weight).scheme, "quanto")

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """See :func:`qplug_quanto.config.write`."""
        return write(layers)


def _part(quant: LayerQuant) -> TensorQuant:
    part = quant.scheme.weight
    assert part is not None, "a layer that stays 16 bit has no quanto tensors"
    return part


def _group(k: int) -> int:
    """The group size that quanto takes for rows of ``k`` columns, 0 for one group."""
    return next((group for group in GROUPS if k % group == 0), 0) if k > GROUPS[0] else 0


def _unpack(words: Tensor, bits: int, rows: int) -> Tensor:
    """uint8 codes ``[rows, C]`` of bytes ``[R, C]`` that hold run after run of R rows, the first in the lowest bits."""
    return torch.cat([(words >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])[:rows]


def _pack(codes: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`_unpack`; there are zeros behind the last row."""
    height = -(-codes.shape[0] * bits // 8)
    words = torch.zeros(height, codes.shape[1], dtype=torch.uint8)
    for i in range(8 // bits):
        run = codes[i * height : (i + 1) * height]
        words[: len(run)] |= run << bits * i
    return words


def _act_scale(tensors: Mapping[str, Tensor], quant: LayerQuant) -> Tensor | None:
    """The static activation scale, or None where there is none. 1 is what quanto starts from, and stands for "not calibrated"."""
    if quant.scheme.act is None:
        for name in ("input_scale", "output_scale"):
            if name in tensors and float(tensors[name]) != 1.0:
                raise DecodeError(
                    f"{name} is {float(tensors[name]):g} and the config leaves activations at 16 bit; add quanto_qmap.json, which says how "
                    "they are quantized"
                )
        return None
    scale = tensors["input_scale"].float().reshape(())
    if not 0 < float(scale) < float("inf") or float(scale) == 1.0:
        raise DecodeError(
            f"input_scale is {float(scale):g}: the activations were never calibrated; run the model once in optimum.quanto.Calibration, "
            "or say activations 'none'"
        )
    return scale


def _storable(weight: QuantWeight | OpaqueWeight) -> QuantWeight:
    """``weight``, where every field of it has a tensor."""
    if isinstance(weight, OpaqueWeight) or weight.experts is not None:
        what = "an opaque encoding" if isinstance(weight, OpaqueWeight) else "a stack of experts"
        raise CannotEncode(f"{what} was given; quanto stores one matrix for each module, so choose another format")
    part, extra = weight.scheme.weight, weight.tensors().keys() - {"codes", "scales"}
    rows = part is not None and part.dtype in STORED and part.block == (1, 0) and part.symmetric and not extra
    affine = part is not None and part.dtype in VALUES and part.block[0] == 1 and (extra in ({"shift"}, {"zeros"}))
    if not (rows or affine) or weight.scheme.act is not None or weight.scheme.act_order or weight.scheme.sparsity:
        raise CannotEncode(
            f"scheme {weight.scheme} with {', '.join(sorted(extra)) or 'scales alone'} was given; quanto is written as W8A16 and Wfp8A16 by "
            "channel, W4A16 and W2A16 asym by group, so choose another format"
        )
    return weight
