"""The torchao checkpoint format, as transformers writes it with torchao 0.15 and later: stored tensors, decode, encode.

Of one layer ``[N, K]`` with groups of g columns:

=================== =============================== =============== ======================================================
_weight_qdata       [N, K]                          int8, float8    codes, one in a byte whatever their width
_weight_scale       [1, 1], [N, 1] or [N, K/g]      float
_weight_zero_point  like _weight_scale              int8            integers only; zero where they are symmetric
_weight_act_pre_scale [K]                           float           multiplies x; of AWQ and SmoothQuant
=================== =============================== =============== ======================================================

``w = (q - z) * scale`` with q and z in [-2**(b-1), 2**(b-1) - 1]. The hub holds asymmetric codes and zero points shifted up
by 2**(b-1). Which class of tensor a weight is, its groups, its width and the quantization of activations are in the
``__metadata__`` of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qplug_core.axes import FLOATS, StoredTensor
from qplug_core.config import LayerQuant, QuantizationConfig
from qplug_core.errors import CannotEncode, DecodeError
from qplug_core.format import CheckpointFormat
from qplug_core.scheme import TensorQuant
from qplug_core.weight import OpaqueWeight, QuantWeight

from .config import parse
from .write import check_scheme, write

if TYPE_CHECKING:
    from qplug_core.source import Source

_F8 = {"fp8_e4m3": "F8_E4M3", "fp8_e5m2": "F8_E5M2"}


class TorchAOFormat(CheckpointFormat):
    """One layout."""

    name = "torchao"

    def parse(self, source: Source) -> QuantizationConfig:
        """See :func:`qplug_torchao.config.parse`."""
        return parse(source)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The tensors of the table above."""
        part = _part(quant)
        axes: tuple[str, ...]
        alt: tuple[tuple[str, ...], ...] = ()
        match part.granularity:
            case "tensor":
                axes, alt = ("1", "1"), (("1",), ())
            case "channel":
                axes, alt = ("N", "1"), (("N",),)
            case _:
                axes = ("N", f"K/{part.block[1]}")
        stored = [
            StoredTensor("_weight_qdata", ("N", "K"), (_F8.get(part.dtype, "I8"),)),
            StoredTensor("_weight_scale", axes, FLOATS, alt=alt),
            StoredTensor("_weight_act_pre_scale", ("K",), FLOATS, optional=True),
        ]
        if part.dtype not in _F8:
            # The first versions stored none for symmetric weights.
            stored.append(StoredTensor("_weight_zero_point", axes, ("I8",), optional=part.symmetric, alt=alt))
        return tuple(stored)

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """Codes ``[N, K]``: int8 and float8 as stored, uint8 where the scheme is asymmetric.

        :raises DecodeError: for codes beyond the width, or zero points of weights that the config calls symmetric.
        """
        part = _part(quant)
        rows = n if part.block[0] else 1
        codes, zeros = tensors["_weight_qdata"], tensors.get("_weight_zero_point")
        if part.dtype not in _F8:
            _check_codes(codes, part.bits)
            if part.symmetric:
                _check_zeros(zeros)
                zeros = None
            else:
                assert zeros is not None
                middle = 2 ** (part.bits - 1)
                codes = codes.to(torch.int16).add_(middle).to(torch.uint8)
                zeros = zeros.to(torch.int16).add_(middle).reshape(rows, -1)
        return QuantWeight(
            quant.scheme,
            codes,
            tensors["_weight_scale"].reshape(rows, -1),
            part.block,
            zeros=zeros,
            pre_scale=tensors.get("_weight_act_pre_scale"),
        )

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`.

        :raises CannotEncode: for a scheme that no tensor class has, ragged groups, or zero points that int8 does not hold.
        """
        weight = _storable(weight)
        if weight.scheme != quant.scheme:
            raise CannotEncode(f"a weight of scheme {weight.scheme} was given; the layer is to be stored as {quant.scheme}")
        part = _part(quant)
        if part.block[1] and weight.k % part.block[1]:
            raise CannotEncode(
                f"groups of {part.block[1]} were given for {weight.k} columns; torchao has whole groups, so choose a size that "
                "divides the columns"
            )
        stored = {"_weight_qdata": weight.codes.contiguous(), "_weight_scale": weight.scales.contiguous()}
        if weight.pre_scale is not None:
            stored["_weight_act_pre_scale"] = weight.pre_scale.contiguous()
        if part.dtype in _F8:
            return stored
        zeros = _stored_zeros(weight)
        if weight.zeros is not None:
            stored["_weight_qdata"] = weight.codes.to(torch.int16).sub_(2 ** (part.bits - 1)).to(torch.int8)
        return {**stored, "_weight_zero_point": zeros}

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """The one layout.

        :raises CannotEncode: as :meth:`encode`.
        """
        weight = _storable(weight)
        _stored_zeros(weight)
        return LayerQuant(weight.scheme, self.name)

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """See :func:`qplug_torchao.write.write`."""
        return write(layers)


def _part(quant: LayerQuant) -> TensorQuant:
    part = quant.scheme.weight
    assert part is not None
    return part


def _check_codes(codes: Tensor, bits: int) -> None:
    if bits == 8 or not codes.numel():
        return
    low, high = (int(v) for v in torch.aminmax(codes))
    if low < -(2 ** (bits - 1)) or high >= 2 ** (bits - 1):
        raise DecodeError(
            f"codes from {low} to {high} were found in a layer of {bits} bits; the metadata of the file is of another "
            "checkpoint, so fetch both again"
        )


def _check_zeros(zeros: Tensor | None) -> None:
    if zeros is not None and bool((zeros != 0).any()):
        raise DecodeError(
            f"zero points from {int(zeros.min())} to {int(zeros.max())} were found in a layer that the config calls symmetric; set "
            "its mapping_type to ASYMMETRIC in the quantization config"
        )


def _storable(weight: QuantWeight | OpaqueWeight) -> QuantWeight:
    """``weight``, where every field of it has a tensor."""
    if isinstance(weight, OpaqueWeight) or weight.experts is not None:
        what = "an opaque encoding" if isinstance(weight, OpaqueWeight) else "a stack of experts"
        raise CannotEncode(f"{what} was given; torchao stores one matrix for each module, so choose another format")
    check_scheme(weight.scheme)
    if extra := weight.tensors().keys() - {"codes", "scales", "zeros", "pre_scale"}:
        raise CannotEncode(
            f"a weight with {', '.join(sorted(extra))} was given; torchao has no tensor for it, so choose another format"
        )
    return weight


def _stored_zeros(weight: QuantWeight) -> Tensor:
    """Zero points int8, shaped like the scales."""
    part = weight.scheme.weight
    assert part is not None
    zeros, middle = weight.zeros, 2 ** (part.bits - 1)
    if zeros is None:
        return torch.zeros(weight.scales.shape, dtype=torch.int8)
    shifted: Tensor = zeros - middle
    if zeros.is_floating_point() or bool(((shifted < -128) | (shifted > 127)).any()):
        raise CannotEncode(
            f"zero points from {float(zeros.min()):g} to {float(zeros.max()):g} were given; torchao stores integers from "
            f"{middle - 128} to {middle + 127} here, so choose another format"
        )
    return shifted.to(torch.int8)
