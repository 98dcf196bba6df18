"""The weight-only checkpoints of FastDeploy: one scale for each row of INT8 or INT4 codes.

============ ============================ ======= ====================================================================
quant_weight [N, K] or [K, N]             int8    layouts ``wint8*``: codes in the order that the layout's ending names
quant_weight [N/2, K] or [K/2, N]         int8    layouts ``wint4*``: two codes in each byte
weight_scale [N]                          float   one for each row of the weight
============ ============================ ======= ====================================================================

``w[n, k] = weight_scale[n] * code[n, k]``. The orders are those of :mod:`qplug_int8.paddle.orders`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qplug_core import paddle
from qplug_core.axes import FLOATS, StoredTensor
from qplug_core.config import LayerQuant, QuantizationConfig
from qplug_core.errors import CannotEncode, DecodeError
from qplug_core.format import CheckpointFormat
from qplug_core.scheme import QuantScheme
from qplug_core.weight import OpaqueWeight, QuantWeight

from . import config
from .orders import UNITS4, UNITS8, read4, read8, write4, write8

if TYPE_CHECKING:
    from qplug_core.source import Source

BYTES = ("I8", "U8")
FAR = 0.8
"""Share of codes in the outer half of their range from which they are taken to be read in a wrong order.

Weights gather around zero, where one scale serves a whole row: their share is below 0.2, uniform codes have 0.5. To read codes
without their bias, or with one that is not there, flips the top bit of each, which turns the share into one minus itself."""
SEEN = 4096
"""Codes that are enough to tell."""


class WeightOnlyFormat(CheckpointFormat):
    """WINT8 and WINT4, each in four orders; also reads the config of every checkpoint that FastDeploy wrote."""

    name = "fastdeploy"

    def parse(self, source: Source) -> QuantizationConfig:
        """See :func:`qplug_int8.paddle.config.parse`."""
        return config.parse(source)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """Codes and scales. Permuted codes are read whole and cut after they are decoded."""
        bits, order = _kind(quant.layout)
        rows, columns = (UNITS8 if bits == 8 else UNITS4)[order]
        halves = 8 // bits
        n, k = f"{rows}*N/{rows}", f"{columns}*K/{columns}"
        if order == "_kn":
            axes: tuple[str, ...] = ("K" if bits == 8 else "K/2", "N")
        else:
            axes = (n if bits == 8 else f"{rows // halves}*N/{rows}", k)
        alt: tuple[tuple[str, ...], ...] = ()
        if order == "_sm70":
            # The same bytes: older versions of Paddle call the shape [K, N].
            alt = ((k, n if bits == 8 else f"{rows // halves}*N/{rows}"),)
        local = order in ("_nk", "_kn")
        return (
            StoredTensor("quant_weight", axes, BYTES, alt=alt, local=local),
            StoredTensor("weight_scale", ("N",), FLOATS, alt=(("1", "N"), ("N", "1"))),
        )

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """int8 codes ``[N, K]`` and scales ``[N, 1]``.

        :raises DecodeError: where the codes lie at the ends of their range, which is what a wrong order looks like.
        """
        bits, order = _kind(quant.layout)
        stored = tensors["quant_weight"]
        codes = read8(stored, order, n, k) if bits == 8 else read4(stored, order, n, k)
        _check_order(codes, bits, quant.layout)
        return QuantWeight(quant.scheme, codes, tensors["weight_scale"].reshape(n, 1), (1, 0))

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`.

        :raises CannotEncode: for other schemes, and for shapes that the order has no place for.
        """
        weight = _storable(weight)
        bits, order = _kind(quant.layout)
        if weight.scheme != quant.scheme or weight.scheme.weight is None or weight.scheme.weight.bits != bits:
            raise CannotEncode(
                f"a weight of scheme {weight.scheme} was given for layout {quant.layout} as {quant.scheme}; the layout holds W{bits}A16 "
                "by channel, so choose the other one"
            )
        rows, columns = (UNITS8 if bits == 8 else UNITS4)[order]
        if weight.n % rows or weight.k % columns:
            raise CannotEncode(
                f"a weight [{weight.n}, {weight.k}] was given; layout {quant.layout} needs N in multiples of {rows} and K in multiples of "
                f"{columns}, so write {'int8' if bits == 8 else 'gptq'} or compressed-tensors instead"
            )
        codes = write8(weight.codes, order) if bits == 8 else write4(weight.codes, order)
        return {"quant_weight": codes, "weight_scale": weight.scales.reshape(weight.n).contiguous()}

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """``wint8`` or ``wint4``, the order that FastDeploy loads on sm_75 to sm_90.

        :raises CannotEncode: as :meth:`encode`.
        """
        scheme = _storable(weight).scheme
        assert scheme.weight is not None
        return LayerQuant(scheme, f"wint{scheme.weight.bits}")

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """See :func:`qplug_int8.paddle.config.write`."""
        return config.write(layers)

    def model_name(self, stored: str) -> str:
        """See :func:`qplug_core.paddle.model_name`."""
        return paddle.model_name(stored)

    def kv_tensors(self, attention: str) -> dict[str, str]:
        """Largest magnitudes of keys and values, which the config's scheme says by ``rule="amax"``."""
        return config.kv_tensors(attention)


def _kind(layout: str) -> tuple[int, str]:
    """Bits and order of a layout: ``wint4_sm70`` is ``(4, "_sm70")``."""
    return int(layout[4]), layout[5:]


def _check_order(codes: Tensor, bits: int, layout: str) -> None:
    seen = codes.reshape(-1)[:SEEN].short()
    edge = 2 ** (bits - 2)
    # Zero and its neighbours fall on the ends of the range, code 0 on the lowest.
    far = ((seen >= edge) | (seen < -edge)).float().mean()
    if len(seen) >= 256 and float(far) > FAR:
        raise DecodeError(
            f"{float(far):.0%} of the codes lie in the outer half of the range of INT{bits}, which no weights do; layout {layout} is not "
            'the order of this file, so say "weight_layout" in its quantization_config: sm80, sm70, nk or kn'
        )


def _storable(weight: QuantWeight | OpaqueWeight) -> QuantWeight:
    """``weight``, where codes and scales by row are all there is to it."""
    if isinstance(weight, OpaqueWeight) or weight.experts is not None:
        what = f"the encoding {weight.encoding}" if isinstance(weight, OpaqueWeight) else "a stack of experts"
        raise CannotEncode(f"{what} was given; WINT8 and WINT4 store one matrix of plain codes, so choose another format")
    part = weight.scheme.weight
    plain = part is not None and part.dtype in ("int8", "int4") and part.symmetric and part.block == weight.block == (1, 0)
    if not plain or weight.scheme != QuantScheme(part) or weight.scales.shape != (weight.n, 1):
        raise CannotEncode(
            f"scheme {weight.scheme} was given; WINT8 and WINT4 store W8A16 and W4A16 by channel, symmetric, so choose another format, "
            "such as compressed-tensors"
        )
    extra = weight.tensors().keys() - {"codes", "scales"}
    if extra or not weight.scales.is_floating_point() or weight.codes.dtype != torch.int8:
        what = ", ".join(sorted(extra)) or "codes or scales of another dtype"
        raise CannotEncode(
            f"a weight with {what} was given; WINT8 and WINT4 have no tensor for it, so choose another format"
        )
    return weight
