"""GPTQ checkpoints that were packed for the Marlin kernel before they were saved, dense and 2:4 sparse.

``checkpoint_format: marlin`` (``is_marlin_format: true``), 4 bits, symmetric; of a layer ``[N, K]`` with G groups:

======= ==================== ======= ==============================================================================
B       [K/16, N*2]          int32   codes plus 8, in the order of :mod:`qplug_gptq.tiles`
s       [G, N]               float   permuted within 64 columns, or 32 where G is 1
======= ==================== ======= ==============================================================================

``gptq_marlin_24``, 4 or 8 bits (b), two of every four columns stored:

======= ==================== ======= ==============================================================================
B_24    [K/32, N*16*b/32]    int32   the kept codes plus 2**(b-1), K/2 of each row
B_meta  [K/32, N*2]          int16   which two of four: 4 quadruples in each value, two 2-bit positions each
s       [G, N]               float   permuted within 64 columns where G is not 1
======= ==================== ======= ==============================================================================
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

from . import tiles
from .config import parse
from .hub import affine, part_of
from .writing import write

if TYPE_CHECKING:
    from qplug_core.source import Source

NOT_WRITTEN = (
    "2:4 sparse Marlin files are read and no longer written, because engines removed their readers; store the pruned weights "
    "dense, in FP8"
)

GROUPS = (0, 128)
"""Groups that readers of packed files take."""


class MarlinFormat(CheckpointFormat):
    """Layout ``marlin``: read by text-generation-inference and by vLLM up to 2025, which removed it since."""

    name = "marlin"

    def parse(self, source: Source) -> QuantizationConfig:
        """See :func:`qplug_gptq.config.parse`."""
        return parse(source)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The two tensors of the first table."""
        return (
            StoredTensor("B", ("K/16", f"{2 * tiles.UNIT}*N/{tiles.UNIT}"), ("I32",)),
            _scales(part_of(quant).block[1]),
        )

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """Signed codes ``[N, K]`` int8, scales ``[N, G]`` as stored."""
        part = part_of(quant)
        # In uint8 this wraps round, which is the two's complement that is wanted.
        signed = tiles.codes(tensors["B"], part.bits).sub_(2 ** (part.bits - 1)).view(torch.int8)
        return QuantWeight(quant.scheme, signed, tiles.scales(tensors["s"]), part.block)

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`, for what readers of this layout take.

        :raises CannotEncode: for anything but symmetric int4 in whole units, per channel or in groups of 128.
        """
        weight = _packable(affine(weight, "marlin"))
        part = part_of(quant)
        if weight.scheme != quant.scheme or weight.block != part.block:
            raise CannotEncode(f"a weight of scheme {weight.scheme} was given; the layer is to be stored as {quant.scheme}")
        group = part.block[1]
        if weight.n % tiles.UNIT or weight.k % tiles.TILE or (group and weight.k % group):
            raise CannotEncode(
                f"a weight [{weight.n}, {weight.k}] was given; marlin packs {tiles.UNIT} rows by {group or tiles.TILE} columns at a "
                "time, so store this layer as gptq"
            )
        codes = weight.codes.view(torch.uint8).add(2 ** (part.bits - 1))
        return {"B": tiles.words(codes, part.bits), "s": tiles.stored_scales(weight.scales)}

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """Layout ``marlin``.

        :raises CannotEncode: as :meth:`encode`.
        """
        return LayerQuant(_packable(affine(weight, "marlin")).scheme, "marlin")

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """See :func:`qplug_gptq.writing.write`."""
        return write(layers)


class Marlin24Format(CheckpointFormat):
    """Layout ``marlin_24``: read only, because every reader of it was removed."""

    name = "gptq_marlin_24"

    def parse(self, source: Source) -> QuantizationConfig:
        """See :func:`qplug_gptq.config.parse`."""
        return parse(source)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The three tensors of the second table."""
        part = part_of(quant)
        unit = tiles.UNIT
        return (
            StoredTensor("B_24", (f"K/{2 * tiles.TILE}", f"{unit * tiles.TILE * part.bits // 32}*N/{unit}"), ("I32",)),
            StoredTensor("B_meta", (f"K/{2 * tiles.TILE}", f"{2 * unit}*N/{unit}"), ("I16",)),
            _scales(part.block[1]),
        )

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """Signed codes ``[N, K]`` int8 with 0 where nothing is stored.

        :raises DecodeError: where the positions of a quadruple are not two different ones in ascending order.
        """
        part = part_of(quant)
        kept = tiles.codes(tensors["B_24"], part.bits, sparse=True).sub_(2 ** (part.bits - 1))
        places = _places(tensors["B_meta"], n)
        first, second = places & 3, places >> 2
        if not bool((first < second).all()):
            raise DecodeError(
                "B_meta names positions of kept weights that are not ascending; it is damaged, or not of a 2:4 sparse layer, so "
                "fetch the file again"
            )
        dense = torch.zeros(n, k // 4, 4, dtype=torch.uint8)
        pairs = kept.view(n, k // 4, 2)
        dense.scatter_(2, torch.stack((first, second), dim=-1).long(), pairs)
        return QuantWeight(
            quant.scheme, dense.view(n, k).view(torch.int8), tiles.scales(tensors["s"], sparse=True), part.block
        )

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """Refused.

        :raises CannotEncode: always.
        """
        raise CannotEncode(NOT_WRITTEN)

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """Refused, as :meth:`encode`.

        :raises CannotEncode: always.
        """
        raise CannotEncode(NOT_WRITTEN)


def _scales(group: int) -> StoredTensor:
    """``s``. The order of columns depends on whether the whole layer has one group, which a cut of it cannot know."""
    return StoredTensor("s", (f"K/{group}" if group else "1", f"{tiles.UNIT}*N/{tiles.UNIT}"), FLOATS, local=not group)


def _packable(weight: QuantWeight) -> QuantWeight:
    part = weight.scheme.weight
    assert part is not None
    plain = part.symmetric and weight.scheme.weight_only and not weight.scheme.act_order
    if part.bits != 4 or not plain or part.block[1] not in GROUPS:
        raise CannotEncode(
            f"scheme {weight.scheme} was given; marlin stores symmetric W4A16 per channel or in groups of 128, without act order, so "
            "choose the format gptq"
        )
    return weight


def _places(meta: Tensor, n: int) -> Tensor:
    """uint8 ``[N, K/4]`` of ``B_meta`` ``[K/32, 2*N]``: the first kept position of a quadruple in bits 0 and 1, the second above.

    The order is that of CUTLASS's metadata operand (``reorder_meta`` and column-major interleaved by 2): rows are
    permuted within 64, and in each 2 x 2 block of values the off-diagonal ones are exchanged.
    """
    columns = 2 * meta.shape[0]
    row = torch.arange(n)[:, None].expand(n, columns)
    column = torch.arange(columns)[None, :].expand(n, columns)
    row = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % 64 // 8 * 4
    swap = (row % 2 == 0).long() * (column % 2 == 1).long() - (row % 2 == 1).long() * (column % 2 == 0).long()
    row, column = row + swap, column - swap
    values = meta.reshape(-1)[column // 2 * (2 * n) + row * 2 + column % 2]
    nibbles = torch.stack([values.to(torch.int32) >> shift & 15 for shift in (0, 4, 8, 12)], dim=-1)
    return nibbles.to(torch.uint8).view(n, 4 * columns)
