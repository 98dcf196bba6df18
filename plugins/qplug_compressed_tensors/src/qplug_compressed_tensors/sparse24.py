"""2:4 sparse weights of compressed-tensors, as llm-compressor wrote them up to 0.8; read, not written.

Of one layer ``[N, K]``, of which exactly two of every four columns are kept in each row:

=========== ================ ===================== ========================================================
compressed  [N, 2*K/4]       float, e4m3 or int8   kept values, from left to right
bitmask     [N, ceil(K/8)]   uint8                 a bit for each column, the first in the lowest bit
shape       [2, 1] or [2]    int64                 N and K, checked
=========== ================ ===================== ========================================================

and the scales of the dense layouts where values are quantized. The hub gets dense codes with zeros among them.
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
from qplug_core.packing import unpack
from qplug_core.weight import OpaqueWeight, QuantWeight

from .config import parse
from .stored import (
    act_tensors,
    check_no_zeros,
    decode_act,
    decode_act_zero,
    decode_scales,
    plain_zeros,
    scale_tensors,
    weight_part,
)

if TYPE_CHECKING:
    from qplug_core.source import Source


class Sparse24Format(CheckpointFormat):
    """The layout ``sparse-24-bitmask``, over 16-bit, INT8 and FP8 values."""

    name = "compressed_tensors.sparse24"

    def parse(self, source: Source) -> QuantizationConfig:
        """See :func:`qplug_compressed_tensors.config.parse`."""
        return parse(source)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The tensors of the table above, and scales where values are quantized."""
        part = weight_part(quant)
        dtypes = {"fp16": FLOATS, "int8": ("I8",), "fp8_e4m3": ("F8_E4M3",)}[part.dtype]
        stored = [
            StoredTensor("compressed", ("N", "2*K/4"), dtypes),
            StoredTensor("bitmask", ("N", "ceil(K/8)"), ("U8",)),
            StoredTensor("shape", ("2", "1"), ("I64",), optional=True, meta=True, alt=(("2",),)),
        ]
        if part.dtype == "fp16":
            return tuple(stored)
        zeros = plain_zeros(quant)
        return (*stored, *([zeros] if zeros else []), *scale_tensors(quant), *act_tensors(quant))

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """Dense codes ``[N, K]`` of the stored dtype; 16-bit values get a scale of 1.

        :raises DecodeError: for a mask that does not keep two of four.
        """
        part = weight_part(quant)
        values = tensors["compressed"]
        kept = unpack(tensors["bitmask"].contiguous(), 1)[:, :k]
        if k % 4 or not bool((kept.view(n, k // 4, 4).sum(2) == 2).all()):
            raise DecodeError(
                "a bitmask that does not keep two of every four columns was found in a 2:4 sparse layer; the file is damaged, so "
                "fetch it again"
            )
        codes = torch.zeros(n, k, dtype=values.dtype)
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()]
        codes.view(bits)[kept.bool()] = values.contiguous().view(bits).flatten()
        if part.dtype == "fp16":
            return QuantWeight(quant.scheme, codes, torch.ones(1, 1, dtype=values.dtype), part.block)
        if "weight_zero_point" in tensors:
            check_no_zeros(tensors["weight_zero_point"], "weight_zero_point")
        fields = {**decode_scales(tensors, part, n), **decode_act(tensors)}
        fields["act_zero"] = decode_act_zero(tensors, quant.scheme.act)
        return QuantWeight(quant.scheme, codes, block=part.block, **fields)

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """Refuses: engines have dropped these files.

        :raises CannotEncode: always.
        """
        raise _not_written()

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """Refuses: see :meth:`encode`.

        :raises CannotEncode: always.
        """
        raise _not_written()

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """Refuses: see :meth:`encode`.

        :raises CannotEncode: always.
        """
        raise _not_written()


def _not_written() -> CannotEncode:
    return CannotEncode(
        "2:4 sparse files were asked for, which engines have stopped to read; store the pruned weights dense, for example in FP8 "
        "(Wfp8Afp8)"
    )
