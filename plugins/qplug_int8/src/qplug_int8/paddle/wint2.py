"""The 2-bit checkpoints of FastDeploy, one expert at a time: layouts ``ccq2`` (WINT2) and ``ccq2.5`` (WINT2.5, older).

Of one weight ``[N, K]`` in ``ccq2``:

============ =========== ===== =========================================================================================
quant_weight [K/4, N]    uint8 one byte for four columns, see :mod:`qplug_int8.paddle.ccq`
weight_scale [K/128, N]  uint8 local scales of two groups of 64 columns; the high nibble is the first
super_scales [N]         float multiplies the local scales; ``super_scale`` in some files
code_scale   [N]         float slope of the map from bytes to codes
code_zp      [N]         float its offset
============ =========== ===== =========================================================================================

and in ``ccq2.5``, which is a plain 3-bit code once it is taken apart:

============ ============ ====== =======================================================================================
quant_weight [10*K/64, N] 16 bit for 64 columns: nine words of seven values, and one of the last value and a local scale
weight_scale [N]          float  multiplies the local scales
============ ============ ====== =======================================================================================

Some kernels of FastDeploy find a group's nibble by counting rows from the first expert, others from its own; where K is no multiple of
128 they disagree, so such a file is refused by its shape.
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
from qplug_core.weight import OpaqueWeight, QuantWeight

from . import ccq, config

if TYPE_CHECKING:
    from qplug_core.source import Source

BYTES = ("U8", "I8")
WORD_SHIFTS = (13, 11, 9, 6, 4, 2, 0)
"""Bits at which the seven 3-bit windows of a word of WINT2.5 begin; neighbours share a bit, except 9 and 6."""
INSTEAD = "only the tool of its makers finds such a code, so write wint4 instead"


class CCQFormat(CheckpointFormat):
    """WINT2 as an opaque weight in its own bytes (encoding ``ccq2``), WINT2.5 as plain codes."""

    name = "fastdeploy_ccq"

    def parse(self, source: Source) -> QuantizationConfig:
        """See :func:`qplug_int8.paddle.config.parse`."""
        return config.parse(source)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The tensors of the tables above: any rows, and columns in units of 128 (WINT2.5: 64)."""
        rows = (("1", "N"), ("N", "1"))
        if quant.layout == "ccq2.5":
            return (
                StoredTensor("quant_weight", ("10*K/64", "N"), ("I16", "U16")),
                StoredTensor("weight_scale", ("N",), FLOATS, alt=rows),
            )
        return (
            StoredTensor("quant_weight", ("32*K/128", "N"), BYTES),
            StoredTensor("weight_scale", ("K/128", "N"), BYTES),
            StoredTensor(quant.opt("super_scales", "super_scales"), ("N",), FLOATS, alt=rows),
            StoredTensor("code_scale", ("N",), FLOATS, alt=rows),
            StoredTensor("code_zp", ("N",), FLOATS, alt=rows),
        )

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight | OpaqueWeight:
        """The stored bytes with a decoder that takes them a chunk at a time; WINT2.5: int8 codes, float32 scales ``[N, K/64]``.

        :raises DecodeError: for codes out of range, and scales that are not finite.
        """
        if quant.layout == "ccq2.5":
            return _words(tensors, quant, n, k)
        stored = dict(tensors)
        stored["super_scales"] = stored.pop(quant.opt("super_scales", "super_scales"))
        _check_finite(stored["super_scales"], "super_scales")
        ccq.check(stored["quant_weight"], stored["code_scale"], stored["code_zp"])
        return OpaqueWeight(quant.scheme, "ccq2", stored, n, k, ccq.decode)

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The bytes of a ``ccq2`` weight, as they were read.

        :raises CannotEncode: for anything else.
        """
        if not isinstance(weight, OpaqueWeight) or weight.encoding != "ccq2" or quant.layout != "ccq2":
            what = (
                f"the encoding {weight.encoding}"
                if isinstance(weight, OpaqueWeight)
                else f"a weight of scheme {weight.scheme}"
            )
            raise CannotEncode(f"{what} was given; layout {quant.layout} holds codes of its own, and {INSTEAD}")
        stored = dict(weight.stored)
        super_scales = stored.pop("super_scales")
        return {**stored, quant.opt("super_scales", "super_scales"): super_scales}

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """``ccq2`` for a weight that was read from it.

        :raises CannotEncode: for anything else.
        """
        quant = LayerQuant(weight.scheme, "ccq2")
        self.encode(weight, quant)
        return quant

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """There is none to write.

        :raises CannotEncode: always.
        """
        raise CannotEncode(f"a WINT2 checkpoint was asked for; {INSTEAD}")


def _words(tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
    _check_finite(tensors["weight_scale"], "weight_scale")
    words = tensors["quant_weight"].contiguous().view(torch.int16).view(k // 64, 10, n)
    codes = torch.empty(n, k // 64, 64, dtype=torch.int8)
    for j, shift in enumerate(WORD_SHIFTS):
        # An arithmetic shift of int16 is harmless: the mask keeps three bits, and bit 15 is the highest of them.
        codes[:, :, j:63:7] = (words[:, :9] >> shift).bitwise_and_(7).sub_(4).permute(2, 0, 1)
    last = words[:, 9]
    codes[:, :, 63] = (last >> 13).bitwise_and_(7).sub_(4).t()
    local = (last & 0x1FFF).float()
    scales = (local * tensors["weight_scale"].float().reshape(1, n)).t().contiguous()
    return QuantWeight(quant.scheme, codes.view(n, k), scales, (1, 64))


def _check_finite(scales: Tensor, name: str) -> None:
    if not bool(torch.isfinite(scales.float()).all()):
        raise DecodeError(f"{name} has NaN or infinite values; finite ones were needed, so fetch or quantize the file again")
