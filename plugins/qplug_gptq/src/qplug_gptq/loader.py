"""The GPTQ checkpoint format, as AutoGPTQ, GPTQModel and auto-round write it: stored tensors, decode, encode.

Of one layer ``[N, K]`` with ``b`` bits and groups of ``g`` columns (G of them):

========== ==================== ======= ===========================================================================
qweight    [K*b/32, N]          int32   codes, packed along K
qzeros     [G, N*b/32]          int32   zero points, packed along N; layout ``gptq`` stores z - 1, the others store z
scales     [G, N]               float   one for each group and row of the weight; may be negative
g_idx      [K]                  int32   group of each column; some producers leave it out
act_scales [1]                  float   static activation scale, where the scheme has one (or ``input_scale``)
========== ==================== ======= ===========================================================================

``w[n, k] = scales[g_idx[k], n] * (q[k, n] - z[g_idx[k], n])``. For 2, 4 and 8 bits the first value of a word lies in its
lowest bits; 3 bits run on over word boundaries, 32 values in three words, except in layout ``gptq_p``, which stores 3, 5, 6
and 7 bits as planes (:mod:`qplug_gptq.planar`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qplug_core import packing
from qplug_core.axes import FLOATS, StoredTensor
from qplug_core.config import LayerQuant, QuantizationConfig
from qplug_core.errors import CannotEncode, DecodeError
from qplug_core.format import CheckpointFormat
from qplug_core.packing import transposed, unpack_columns, word_values
from qplug_core.scheme import TensorQuant
from qplug_core.weight import OpaqueWeight, QuantWeight

from . import planar
from .activation import STORED
from .config import parse
from .hub import affine, part_of
from .keys import BITS
from .writing import write
from .zeros import asymmetric, check_symmetric

if TYPE_CHECKING:
    from qplug_core.source import Source


class GPTQFormat(CheckpointFormat):
    """Layouts ``gptq`` (v1), ``gptq_v2`` and ``gptq_p`` (bit planes). Options, each left out where it is the default:

    ``g_idx``
        False: the file has none. ``"mixed"``: some layers have one.
    ``version``
        ``"unsaid"``: the config does not name the layout, so zero points may prove the other one.
    ``whole_words``
        True: the producer subtracts 1 from whole words of zero points.
    ``act_scale``
        Name of the static activation scale, ``act_scales`` where it is not said.
    """

    name = "gptq"

    def parse(self, source: Source) -> QuantizationConfig:
        """See :func:`qplug_gptq.config.parse`."""
        return parse(source)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The tensors of the table above.

        Where there is a g_idx, scales and zero points are a look-up table and are read whole: the file may assign
        columns to groups in any order, whatever its config says.
        """
        part = part_of(quant)
        bits, group = part.bits, part.block[1]
        groups = f"ceil(K/{group})" if group else "1"
        index = quant.opt("g_idx", True)
        whole = ("K",) if index and group else ()
        # Without an index a cut begins at a group by position, with one it does not: a layer that may be either is read whole,
        # and so is one whose zero points decide what they mean, because a cut of them might decide otherwise.
        local = index != "mixed" and not (quant.opt("version") and not part.symmetric)
        stored = [
            StoredTensor("qweight", (_packed("K", bits, quant.layout), "N"), ("I32",), local=local),
            StoredTensor("qzeros", (groups, _packed("N", bits, quant.layout)), ("I32",), whole=whole),
            StoredTensor("scales", (groups, "N"), FLOATS, whole=whole),
        ]
        if index:
            # Without act order a cut begins at a group, so that what is read is again groups by position.
            columns = f"ceil({group}*K/{group})" if group and not quant.scheme.act_order else "K"
            stored.append(StoredTensor("g_idx", (columns,), ("I32",), optional=index == "mixed"))
        if quant.scheme.act is not None and quant.scheme.act.dynamic is False:
            stored.append(StoredTensor(quant.opt("act_scale", STORED[0]), ("1",), FLOATS, alt=((),)))
        return tuple(stored)

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """Codes ``[N, K]``: int8 where the scheme is symmetric, else uint8 with int16 zeros ``[N, G]``.

        A g_idx that says what position says anyway is dropped; any other is kept, whatever ``desc_act`` said.

        :raises DecodeError: where zero points contradict the config, or g_idx points outside of the scales.
        """
        part = part_of(quant)
        scales, qzeros = tensors["scales"], tensors["qzeros"]
        index = tensors.get("g_idx")
        said = quant.opt("version") is None
        zeros = None
        # Of all groups, also where only some are kept below: evidence is about the layer.
        if part.symmetric:
            check_symmetric(qzeros, part, quant.layout, said)
        else:
            zeros = asymmetric(qzeros, part.bits, quant.layout, said, bool(quant.opt("whole_words")))
        if index is not None:
            index, groups = _by_position(index, part.block[1], scales.shape[0])
            scales = scales[groups]
            zeros = None if zeros is None else zeros[groups]
        middle = 2 ** (part.bits - 1) if part.symmetric else 0
        codes = _codes(tensors["qweight"], part.bits, quant.layout, middle)
        scheme = replace(quant.scheme, act_order=index is not None)
        stored_act = tensors.get(quant.opt("act_scale", STORED[0]))
        fields: dict[str, Any] = {
            "group_index": index,
            "act_scale": None if stored_act is None else stored_act.reshape(()).float(),
        }
        if zeros is not None:
            return QuantWeight(scheme, codes, transposed(scales), part.block, zeros=transposed(zeros), **fields)
        return QuantWeight(scheme, codes.view(torch.int8), transposed(scales), part.block, **fields)

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`.

        :raises CannotEncode: for numbers that are not ``(q - z) * scale`` with integers of the layout's range, or a shape
            that does not fill whole words.
        """
        weight = affine(weight, quant.layout)
        part = part_of(quant)
        if weight.scheme.weight != part or weight.block != part.block or weight.scheme.act != quant.scheme.act:
            raise CannotEncode(f"a weight of scheme {weight.scheme} was given; the layer is to be stored as {quant.scheme}")
        if part.bits not in BITS[quant.layout]:
            raise CannotEncode(
                f"{part.bits} bits were given; {quant.layout} has no packing for them, so store them as gptq_p"
            )
        unit = _unit(part.bits, quant.layout)
        if weight.n % unit or weight.k % unit:
            raise CannotEncode(
                f"a weight [{weight.n}, {weight.k}] was given; {quant.layout} packs {unit} codes of {part.bits} bits at a time "
                "along both axes, so choose another format for this layer"
            )
        offset = 1 if quant.layout == "gptq" else 0
        middle = 2 ** (part.bits - 1)
        if part.symmetric:
            codes = weight.codes.view(torch.uint8).add(middle)
            stored_zeros = torch.full(weight.scales.shape, middle - offset, dtype=torch.uint8)
        else:
            codes = weight.codes
            stored_zeros = _storable_zeros(weight, part, offset)
        pack = planar.pack if quant.layout == "gptq_p" else packing.pack
        tensors = {
            "qweight": pack(codes, part.bits).t().contiguous(),
            "qzeros": pack(stored_zeros.t().contiguous(), part.bits),
            "scales": weight.scales.t().contiguous(),
        }
        if quant.opt("g_idx", True):
            positions = torch.arange(weight.k, dtype=torch.int32) // (part.block[1] or weight.k)
            tensors["g_idx"] = positions if weight.group_index is None else weight.group_index.to(torch.int32)
        elif weight.group_index is not None:
            raise CannotEncode("a weight with act order was given; it needs g_idx, so store it with desc_act true")
        if weight.act_scale is not None:
            tensors[quant.opt("act_scale", STORED[0])] = weight.act_scale.reshape(1)
        return tensors

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """Symmetric weights as ``gptq``, which every reader knows; 5, 6 and 7 bits as ``gptq_p``.

        Weights with zero points as ``gptq_v2``, which also holds zero point 0.

        :raises CannotEncode: for a weight that no layout holds.
        """
        weight = affine(weight)
        part = weight.scheme.weight
        assert part is not None
        dense = "gptq" if weight.zeros is None else "gptq_v2"
        layout = dense if part.bits in BITS[dense] else "gptq_p"
        if weight.zeros is not None:
            _storable_zeros(weight, part, 0)
        return LayerQuant(weight.scheme, layout)

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """See :func:`qplug_gptq.writing.write`."""
        return write(layers)


def _codes(words: Tensor, bits: int, layout: str, middle: int) -> Tensor:
    """uint8 codes ``[N, K]`` of qweight, less ``middle``: in uint8 this wraps round, which is the two's complement that is wanted."""
    if layout == "gptq_p":
        return planar.unpack(transposed(words), bits).sub_(middle)
    return unpack_columns(words, bits, middle)


def _unit(bits: int, layout: str) -> int:
    """Codes after which a packing is at a word boundary again; planes of any width come in runs of 32."""
    return planar.RUN if layout == "gptq_p" and len(planar.PLANES[bits]) > 1 else word_values(bits)


def _packed(axis: str, bits: int, layout: str) -> str:
    unit = _unit(bits, layout)
    words = unit * bits // 32
    return f"{axis}/{unit}" if words == 1 else f"{words}*{axis}/{unit}"


def _by_position(index: Tensor, group: int, count: int) -> tuple[Tensor | None, slice]:
    """The index to keep (None where columns are in groups by position), and the rows of the scales that it needs."""
    if index.numel() == 0:
        return None, slice(0, 0)
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= count:
        raise DecodeError(
            f"g_idx assigns columns to groups {low} to {high}, and the file has scales of groups 0 to {count - 1}; g_idx "
            "or scales are damaged, so fetch the file again"
        )
    first = int(index[0])
    positions = torch.arange(index.numel(), dtype=index.dtype) // (group or index.numel())
    if torch.equal(index - first, positions):
        return None, slice(first, high + 1)
    return index.to(torch.int32), slice(None)


def _storable_zeros(weight: QuantWeight, part: TensorQuant, offset: int) -> Tensor:
    zeros = weight.zeros
    if zeros is None or zeros.is_floating_point():
        raise CannotEncode("float zero points were given; gptq stores integers, so choose another format")
    low, high = (int(zeros.min()), int(zeros.max())) if zeros.numel() else (offset, offset)
    top = 2**part.bits - 1
    if low < 0 or high > top:
        raise CannotEncode(
            f"zero points from {low} to {high} were given; readers of gptq agree on 0 to {top} only, so choose another format"
        )
    if low < offset:
        raise CannotEncode(
            f"zero points from {low} to {high} were given; layout gptq holds {offset} to {top}, so store this checkpoint as gptq_v2"
        )
    return (zeros - offset).to(torch.uint8)
