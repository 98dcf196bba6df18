"""The compressed-tensors checkpoint format, in all dense layouts: stored tensors, decode, encode.

Of one layer ``[N, K]`` with ``b`` bits, by layout:

======================== ========================================= ======================================================
pack-quantized           weight_packed [N, ceil(b*K/32)] int32     q + 2**(b-1), one little-endian bit stream for each row
\\                        weight_zero_point [ceil(b*N/32), G] int32 the same, packed along N; asymmetric only
int-, naive-quantized    weight [N, K] int8                        q, signed, also where b < 8
\\                        weight_zero_point, like weight_scale int8 asymmetric only
float-, naive-quantized  weight [N, K] e4m3
mxfp8-quantized          weight [N, K] e4m3                        with E8M0 scales
nvfp4-, mxfp4-pack-q...  weight_packed [N, K/2] uint8              two e2m1 codes, the even column in the low nibble
dense                    weight [N, K] float                       16-bit numbers that the scales turn into codes
all                      weight_scale                              [1] | [N, 1] | [N, K/g] | [ceil(N/bn), ceil(K/bk)]
nvfp4-pack-quantized     weight_global_scale [1] float32           divides the scales
pack-quantized           weight_shape [2] int64                    N and K, checked
act order                weight_g_idx [K] int32                    group of each column
static activations       input_scale [1], input_zero_point [1]     float, int8
NVFP4 activations        input_global_scale [1] float32            divides the scales
======================== ========================================= ======================================================

Option ``padded``: widths that do not divide 32 have ``32 // b`` values in each word, along K and along N.
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
from qplug_core.packing import pack, transposed, unpack
from qplug_core.quantizer import codebook_of
from qplug_core.scheme import TensorQuant
from qplug_core.weight import OpaqueWeight, QuantWeight

from .args import write_args
from .config import parse
from .groups import trivial_index
from .layouts import PACKED, default_layout, holds
from .packing import pack_rows, unpack_rows, words_axis
from .stored import (
    act_tensors,
    check_no_zeros,
    decode_act,
    decode_act_zero,
    decode_scales,
    encode_act,
    encode_scales,
    plain_zeros,
    scale_axes,
    scale_tensors,
    weight_part,
)
from .write import write

if TYPE_CHECKING:
    from qplug_core.source import Source


class CompressedTensorsFormat(CheckpointFormat):
    """The layouts of the table above."""

    name = "compressed_tensors"

    def parse(self, source: Source) -> QuantizationConfig:
        """See :func:`qplug_compressed_tensors.config.parse`."""
        return parse(source)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The tensors of the table above that this layout and scheme have."""
        part, padded = weight_part(quant), bool(quant.opt("padded"))
        stored: list[StoredTensor | None]
        if quant.layout == "pack-quantized":
            axes, _, whole = scale_axes(quant)
            packed = (words_axis("N", part.bits, padded), axes[-1])
            stored = [
                StoredTensor("weight_packed", ("N", words_axis("K", part.bits, padded)), ("I32",)),
                StoredTensor("weight_zero_point", packed, ("I32",), optional=part.symmetric, whole=whole),
                StoredTensor("weight_shape", ("2",), ("I64",), optional=True, meta=True),
            ]
        elif quant.layout in PACKED:
            stored = [StoredTensor("weight_packed", ("N", "K/2"), ("U8",))]
        elif quant.layout == "dense":
            stored = [StoredTensor("weight", ("N", "K"), FLOATS), plain_zeros(quant)]
        else:
            dtype = "I8" if part.dtype.startswith("int") else "F8_E4M3"
            stored = [StoredTensor("weight", ("N", "K"), (dtype,)), plain_zeros(quant)]
        return (*(t for t in stored if t is not None), *scale_tensors(quant), *act_tensors(quant))

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """Codes ``[N, K]``: int8 where symmetric, uint8 with int16 zeros where not, e4m3, or uint8 indices of e2m1.

        An order of columns that says what position says anyway is dropped.

        :raises DecodeError: where values contradict the config.
        """
        part = weight_part(quant)
        fields = decode_scales(tensors, part, n)
        fields |= decode_act(tensors)
        fields["act_zero"] = decode_act_zero(tensors, quant.scheme.act)
        fields["codebook"] = codebook_of(part.dtype)
        codes, zeros = _codes(tensors, quant, n, k)
        index = tensors.get("weight_g_idx")
        if index is not None:
            index, groups = trivial_index(index, part.block[1], fields["scales"].shape[1], k)
            fields["scales"] = fields["scales"][:, groups].contiguous()
            zeros = None if zeros is None else zeros[:, groups].contiguous()
        scheme = replace(quant.scheme, act_order=index is not None)
        return QuantWeight(scheme, codes, block=part.block, zeros=zeros, group_index=index, **fields)

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`.

        :raises CannotEncode: for numbers or fields that the layout has no tensor for.
        """
        weight = _affine(weight, quant)
        part = weight_part(quant)
        if part.granularity == "group" and weight.k % part.block[1]:
            raise CannotEncode(
                f"a weight [{weight.n}, {weight.k}] in groups of {part.block[1]} was given; readers of compressed-tensors need "
                "whole groups, so choose a group size that divides the columns, or one scale for each channel"
            )
        tensors = {**_encode_codes(weight, quant), **encode_scales(weight), **encode_act(weight)}
        if quant.scheme.act_order:
            positions = torch.arange(weight.k, dtype=torch.int32) // (part.block[1] or weight.k)
            tensors["weight_g_idx"] = positions if weight.group_index is None else weight.group_index.to(torch.int32)
        elif weight.group_index is not None:
            raise CannotEncode("a weight with act order was given for a layer without; store it with act order")
        if quant.layout == "dense" and not self.decode(tensors, quant, weight.n, weight.k).equal(weight):
            raise CannotEncode(
                f"codes of {part.dtype} do not survive as {weight.scales.dtype} numbers; store them as int-quantized or "
                "float-quantized"
            )
        return tensors

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """The layout that llm-compressor writes the scheme in.

        :raises CannotEncode: where there is none.
        """
        quant = LayerQuant(weight.scheme, default_layout(weight.scheme))
        _affine(weight, quant)
        return quant

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """See :func:`qplug_compressed_tensors.write.write`."""
        return write(layers)

    def kv_tensors(self, attention: str) -> Mapping[str, str | tuple[str, ...]]:
        """Scales of keys, values and queries, ``[1]`` or ``[heads, 1, 1]``, and their zero points.

        Old files have them as output scales of the projections.
        """
        found: dict[str, str | tuple[str, ...]] = {}
        for which in "kvq":
            found[f"{which}_scale"] = (f"{attention}.{which}_scale", f"{attention}.{which}_proj.output_scale")
            found[f"{which}_zero"] = (f"{attention}.{which}_zero_point", f"{attention}.{which}_proj.output_zero_point")
        return found


def _codes(tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> tuple[Tensor, Tensor | None]:
    """Codes ``[N, K]``, and int16 zeros ``[N, G]`` where there are any."""
    part, padded = weight_part(quant), bool(quant.opt("padded"))
    zeros = tensors.get("weight_zero_point")
    if quant.layout == "pack-quantized":
        _check_shape(tensors, n, k)
        codes = unpack_rows(tensors["weight_packed"], part.bits, k, padded)
        if zeros is not None:
            zeros = unpack_rows(transposed(zeros), part.bits, n, padded).t()
        return _hub_integers(codes, zeros, part)
    if quant.layout in PACKED:
        return unpack(tensors["weight_packed"].contiguous(), 4), None
    stored = tensors["weight"]
    if quant.layout == "dense":
        stored = _quantized(stored, tensors, part)
    if part.symmetric:
        if part.dtype.startswith("int"):
            _check_range(stored, part)
        if zeros is not None:
            check_no_zeros(zeros, "weight_zero_point")
        return stored, None
    assert zeros is not None
    zeros = _offset(zeros, part).reshape(n if part.block[0] else 1, -1)
    return _offset(stored, part), zeros.to(torch.int16)


def _check_shape(tensors: Mapping[str, Tensor], n: int, k: int) -> None:
    shape = tensors.get("weight_shape")
    if shape is not None and not (int(shape[0]) >= n and int(shape[1]) >= k):
        raise DecodeError(
            f"weight_shape says {shape.tolist()} and the layer has at least {[n, k]}; the file belongs to another model, or is damaged"
        )


def _hub_integers(codes: Tensor, zeros: Tensor | None, part: TensorQuant) -> tuple[Tensor, Tensor | None]:
    """Codes and zero points from ``q + 2**(b-1)``, uint8."""
    middle = 2 ** (part.bits - 1)
    if not part.symmetric:
        assert zeros is not None
        return codes, zeros.to(torch.int16).contiguous()
    if zeros is not None:
        check_no_zeros(zeros.to(torch.int16) - middle, "weight_zero_point")
    # In uint8 this wraps round, which is the two's complement that is wanted.
    return codes.sub_(middle).view(torch.int8), None


def _offset(stored: Tensor, part: TensorQuant) -> Tensor:
    """``q + 2**(b-1)`` uint8 of signed bytes, in memory of its own; they must be in the range of ``b`` bits."""
    _check_range(stored, part)
    shifted: Tensor = stored.contiguous().view(torch.uint8) + 2 ** (part.bits - 1)
    return shifted


def _check_range(stored: Tensor, part: TensorQuant) -> None:
    middle = 2 ** (part.bits - 1)
    if part.bits < 8 and stored.numel() and not -middle <= int(stored.min()) <= int(stored.max()) < middle:
        raise DecodeError(
            f"values from {int(stored.min())} to {int(stored.max())} were found in a layer of {part.bits} bits, which hold "
            f"{-middle} to {middle - 1}; correct num_bits in the quantization config"
        )


def _quantized(stored: Tensor, tensors: Mapping[str, Tensor], part: TensorQuant) -> Tensor:
    """Signed codes, or e4m3, of 16-bit numbers: ``round(w / scale + zero)``, in their own dtype as the producer does."""
    n, k = stored.shape
    index = tensors.get("weight_g_idx")

    def spread(grid: Tensor) -> Tensor:
        bn, bk = part.block
        grid = grid.reshape({0: 1, 1: n}.get(bn, grid.shape[0]), -1)
        grid = grid.repeat_interleave(bn, dim=0)[:n] if bn > 1 else grid
        if index is not None and int(index.min()) >= 0:
            return grid[:, index.long()]
        return grid.repeat_interleave(bk, dim=1)[:, :k] if bk else grid

    scales = tensors["weight_scale"].to(stored.dtype)
    scaled = stored / spread(scales.masked_fill(scales == 0, 1.0))
    zeros = tensors.get("weight_zero_point")
    if zeros is not None:
        scaled = scaled + spread(zeros.to(stored.dtype))
    if not part.dtype.startswith("int"):
        return scaled.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    middle = 2 ** (part.bits - 1)
    return torch.round(scaled.clamp(-middle, middle - 1)).to(torch.int8)


def _encode_codes(weight: QuantWeight, quant: LayerQuant) -> dict[str, Tensor]:
    part, padded = weight_part(quant), bool(quant.opt("padded"))
    middle = 2 ** (part.bits - 1)
    if quant.layout == "pack-quantized":
        codes = weight.codes.view(torch.uint8).add(middle) if part.symmetric else weight.codes
        tensors = {
            "weight_packed": pack_rows(codes, part.bits, padded),
            "weight_shape": torch.tensor([weight.n, weight.k], dtype=torch.int64),
        }
        if weight.zeros is not None:
            values = weight.zeros.to(torch.uint8).t().contiguous()
            tensors["weight_zero_point"] = transposed(pack_rows(values, part.bits, padded))
        return tensors
    if quant.layout in PACKED:
        if weight.k % 2:
            raise CannotEncode(f"a weight of {weight.k} columns was given; two codes share a byte, so choose another format")
        return {"weight_packed": pack(weight.codes, 4, torch.uint8)}
    tensors = {}
    if weight.zeros is not None:
        shape = (1,) if part.block == (0, 0) else tuple(weight.scales.shape)
        tensors["weight_zero_point"] = (weight.zeros - middle).to(torch.int8).reshape(shape)
    if quant.layout == "dense":
        tensors["weight"] = weight.dequantize(weight.scales.dtype)
    elif part.dtype.startswith("int") and not part.symmetric:
        tensors["weight"] = weight.codes.sub(middle).view(torch.int8)
    else:
        tensors["weight"] = weight.codes.contiguous()
    return tensors


def _affine(weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> QuantWeight:
    """``weight``, where every field of it has a tensor and its scheme has words in the config."""
    remedy = "choose another format"
    if isinstance(weight, OpaqueWeight) or weight.experts is not None:
        what = "an opaque encoding" if isinstance(weight, OpaqueWeight) else "a stack of experts"
        raise CannotEncode(f"{what} was given; compressed-tensors stores one matrix for each module, so {remedy}")
    scheme = weight.scheme
    if scheme.sparsity:
        default_layout(scheme)
    part = scheme.weight
    # An order of columns is a fact of each weight: one with a single group has none.
    if part is None or replace(scheme, act_order=quant.scheme.act_order) != quant.scheme or weight.block != part.block:
        raise CannotEncode(f"a weight of scheme {scheme} was given; the layer is to be stored as {quant.scheme}")
    if not holds(quant.layout, part):
        raise CannotEncode(
            f"scheme {scheme} was given; layout {quant.layout} does not hold it, so choose another layout or format"
        )
    write_args(part)
    encode_scales(weight)
    encode_act(weight)
    if scheme.act is not None:
        write_args(scheme.act, kind="act")
    extra = weight.tensors().keys() - {
        "codes", "scales", "zeros", "global_scale", "group_index", "codebook", "act_scale", "act_zero",
    }  # fmt: skip
    if extra or (weight.zeros is not None and weight.zeros.is_floating_point()):
        what = ", ".join(sorted(extra)) or "float zero points"
        raise CannotEncode(f"a weight with {what} was given; compressed-tensors has no tensor for it, so {remedy}")
    if weight.zeros is not None and bool(((weight.zeros < 0) | (weight.zeros >= 2**part.bits)).any()):
        low, high = int(weight.zeros.min()), int(weight.zeros.max())
        raise CannotEncode(
            f"zero points from {low} to {high} were given; {part.bits} bits hold 0 to {2**part.bits - 1}, so {remedy}"
        )
    return weight
