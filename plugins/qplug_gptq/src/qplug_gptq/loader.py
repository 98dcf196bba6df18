"""The GPTQ checkpoint format, as AutoGPTQ and GPTQModel write it: stored tensors, decode, encode.

Of one layer ``[N, K]`` with ``b`` bits and groups of ``g`` columns (G of them):

======= ==================== ======= ==============================================================================
qweight [K*b/32, N]          int32   codes, packed along K as a little-endian bit stream
qzeros  [G, N*b/32]          int32   zero points, packed along N; layout ``gptq`` stores z - 1, ``gptq_v2`` stores z
scales  [G, N]               float   one for each group and row of the weight
g_idx   [K]                  int32   group of each column; some producers leave it out
======= ==================== ======= ==============================================================================

``w[n, k] = scales[g_idx[k], n] * (q[k, n] - z[g_idx[k], n])``. For 2, 4 and 8 bits the first value of a word lies in its
lowest bits; 3 bits run on over word boundaries, 32 values in three words.
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
from qplug_core.packing import pack, transposed, unpack, word_values
from qplug_core.scheme import TensorQuant
from qplug_core.weight import OpaqueWeight, QuantWeight

from .config import BITS, parse, write

if TYPE_CHECKING:
    from qplug_core.source import Source


class GPTQFormat(CheckpointFormat):
    """Layouts ``gptq`` (v1) and ``gptq_v2``. Option ``g_idx`` (default True): whether the file holds that tensor."""

    name = "gptq"

    def parse(self, source: Source) -> QuantizationConfig:
        """See :func:`qplug_gptq.config.parse`."""
        return parse(source)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The four tensors of the table above.

        Where there is a g_idx, scales and zero points are a look-up table and are read whole: the file may assign
        columns to groups in any order, whatever its config says.
        """
        part = _part(quant)
        bits, group = part.bits, part.block[1]
        groups = f"ceil(K/{group})" if group else "1"
        indexed = quant.opt("g_idx", True)
        whole = ("K",) if indexed and group else ()
        stored = [
            StoredTensor("qweight", (_packed("K", bits), "N"), ("I32",)),
            StoredTensor("qzeros", (groups, _packed("N", bits)), ("I32",), whole=whole),
            StoredTensor("scales", (groups, "N"), FLOATS, whole=whole),
        ]
        if indexed:
            # Without act order a cut begins at a group, so that what is read is again groups by position.
            columns = f"ceil({group}*K/{group})" if group and not quant.scheme.act_order else "K"
            stored.append(StoredTensor("g_idx", (columns,), ("I32",)))
        return tuple(stored)

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """Codes ``[N, K]``: int8 where the scheme is symmetric, else uint8 with int16 zeros ``[N, G]``.

        A g_idx that says what position says anyway is dropped; any other is kept, whatever ``desc_act`` said.

        :raises DecodeError: where a symmetric layer has other zero points, or g_idx points outside of the scales.
        """
        part = _part(quant)
        scales, qzeros = tensors["scales"], tensors["qzeros"]
        index = tensors.get("g_idx")
        if index is not None:
            index, groups = _by_position(index, part.block[1], scales.shape[0])
            scales, qzeros = scales[groups], qzeros[groups]
        zeros = unpack(qzeros.contiguous(), part.bits)
        codes = unpack(transposed(tensors["qweight"]), part.bits)
        scheme = replace(quant.scheme, act_order=index is not None)
        scales = scales.t().contiguous()
        offset = 1 if quant.layout == "gptq" else 0
        if not part.symmetric:
            shifted = zeros.t().to(torch.int16).contiguous().add_(offset)
            return QuantWeight(scheme, codes, scales, part.block, zeros=shifted, group_index=index)
        middle = 2 ** (part.bits - 1)
        _check_symmetric(zeros, middle, offset)
        # In uint8 this wraps round, which is the two's complement that is wanted.
        signed = codes.sub_(middle).view(torch.int8)
        return QuantWeight(scheme, signed, scales, part.block, group_index=index)

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`.

        :raises CannotEncode: for numbers that are not ``(q - z) * scale`` with integers of the layout's range, or a shape
            that does not fill whole words.
        """
        weight = _affine(weight)
        part = _part(quant)
        if weight.scheme.weight != part or weight.block != part.block:
            raise CannotEncode(f"a weight of scheme {weight.scheme} was given; the layer is to be stored as {quant.scheme}")
        unit = word_values(part.bits)
        if weight.n % unit or weight.k % unit:
            raise CannotEncode(
                f"a weight [{weight.n}, {weight.k}] was given; gptq packs {unit} codes of {part.bits} bits at a time "
                "along both "
                "axes, so choose another format for this layer"
            )
        offset = 1 if quant.layout == "gptq" else 0
        middle = 2 ** (part.bits - 1)
        if part.symmetric:
            codes = weight.codes.view(torch.uint8).add(middle)
            stored_zeros = torch.full(weight.scales.shape, middle - offset, dtype=torch.uint8)
        else:
            codes = weight.codes
            stored_zeros = _storable_zeros(weight, part, offset)
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
        return tensors

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """Symmetric weights as ``gptq``, which every reader knows.

        Weights with zero points as ``gptq_v2``, which also holds zero point 0; as ``gptq`` where one is ``2**bits``.
        """
        weight = _affine(weight)
        part = weight.scheme.weight
        assert part is not None
        old = weight.zeros is None or (weight.zeros.numel() > 0 and int(weight.zeros.max()) == 2**part.bits)
        return LayerQuant(weight.scheme, "gptq" if old else "gptq_v2")

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """See :func:`qplug_gptq.config.write`."""
        return write(layers)


def _part(quant: LayerQuant) -> TensorQuant:
    part = quant.scheme.weight
    assert part is not None, "a layer that stays 16 bit has no GPTQ tensors"
    return part


def _packed(axis: str, bits: int) -> str:
    unit = word_values(bits)
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
            "or scales "
            "are damaged, so fetch the file again"
        )
    first = int(index[0])
    positions = torch.arange(index.numel(), dtype=index.dtype) // (group or index.numel())
    if torch.equal(index - first, positions):
        return None, slice(first, high + 1)
    return index.to(torch.int32), slice(None)


def _check_symmetric(zeros: Tensor, middle: int, offset: int) -> None:
    stored = middle - offset
    if bool((zeros == stored).all()):
        return
    other = middle if offset else middle - 1
    if bool((zeros == other).all()):
        right = "gptq_v2" if offset else "gptq"
        raise DecodeError(
            f"every stored zero point of a symmetric layer is {other}, where this checkpoint_format has {stored}; that "
            "is how "
            f"{right} stores them, so set checkpoint_format to {right!r} in the quantization config"
        )
    raise DecodeError(
        f"stored zero points from {int(zeros.min())} to {int(zeros.max())} were found in a layer that the config calls "
        "symmetric, "
        f"which has {stored} everywhere; set sym to false in the quantization config"
    )


def _affine(weight: QuantWeight | OpaqueWeight) -> QuantWeight:
    """``weight``, where its scheme and its fields are those that GPTQ has tensors for."""
    scheme = weight.scheme
    part = scheme.weight
    remedy = "choose another format"
    if isinstance(weight, OpaqueWeight) or weight.experts is not None:
        what = "an opaque encoding" if isinstance(weight, OpaqueWeight) else "a stack of experts"
        raise CannotEncode(f"{what} was given; gptq stores one integer matrix for each module, so {remedy}")
    if part is None or part.dtype not in {f"int{b}" for b in BITS} or scheme.act is not None or scheme.sparsity:
        raise CannotEncode(f"scheme {scheme} was given; gptq stores W2A16, W3A16, W4A16 and W8A16, so {remedy}")
    if part.block[0] != 1 or part.scale_dtype != "float":
        raise CannotEncode(f"scales by {part.granularity} were given; gptq stores one for each row and group, so {remedy}")
    extra = weight.tensors().keys() - {"codes", "scales", "zeros", "group_index"}
    if extra:
        raise CannotEncode(f"a weight with {', '.join(sorted(extra))} was given; gptq has no tensor for it, so {remedy}")
    return weight


def _storable_zeros(weight: QuantWeight, part: TensorQuant, offset: int) -> Tensor:
    zeros = weight.zeros
    if zeros is None or zeros.is_floating_point():
        raise CannotEncode("float zero points were given; gptq stores integers, so choose another format")
    low, high = (int(zeros.min()), int(zeros.max())) if zeros.numel() else (offset, offset)
    if low < offset or high > 2**part.bits - 1 + offset:
        right = "gptq_v2" if offset else "gptq"
        raise CannotEncode(
            f"zero points from {low} to {high} were given; layout {'gptq' if offset else 'gptq_v2'} holds {offset} to "
            f"{2**part.bits - 1 + offset}, so store this checkpoint as {right}"
        )
    return (zeros - offset).to(torch.uint8)
