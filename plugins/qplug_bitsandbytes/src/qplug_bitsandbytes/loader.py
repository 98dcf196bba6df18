"""The bitsandbytes checkpoint format: stored tensors, decode, encode.

Of one layer ``[N, K]``; blocks of B codes run over the flattened weight, from row to row:

=================================== ======================= ========= ====================================================
bnb_4bit
weight                              [N*K/2, 1]              uint8     two codes in a byte, the first in the high bits; option
                                                                      ``storage``: the bytes under another dtype, [N*K/4, 1]
weight.absmax                       [N*K/B]                 float32   a scale for each block; uint8 if ``double``
weight.nested_absmax                [N*K/(256*B)]           float32   ``double``: a scale for 256 scales
weight.nested_quant_map             [256]                   float32   ``double``: values of the codes in absmax
weight.quant_map                    [16]                    float32   values of the codes
weight.quant_state.bitsandbytes__*  [?]                     uint8     JSON: blocksize, dtype, shape; ``double``: the offset
bnb_8bit
weight                              [N, K]                  int8      codes
SCB                                 [N]                     float32   amax of each row: 127 times its scale
weight_format                       []                      uint8     0: rows in their order
=================================== ======================= ========= ====================================================

``double`` scales are ``nested_quant_map[absmax] * nested_absmax + nested_offset``; the offset is in the JSON alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qplug_core.axes import FLOATS, StoredTensor
from qplug_core.config import LayerQuant, QuantizationConfig
from qplug_core.errors import CannotEncode, DecodeError
from qplug_core.format import CheckpointFormat
from qplug_core.quantizer import codebook_of
from qplug_core.scheme import QuantScheme, TensorQuant
from qplug_core.source import ITEM_BYTES
from qplug_core.weight import OpaqueWeight, QuantWeight

from .config import BLOCKSIZES, int8_quant, parse, write
from .state import NESTED, QuantState

if TYPE_CHECKING:
    from qplug_core.source import Source

REMEDY = "so choose another format"


class BitsAndBytesFormat(CheckpointFormat):
    """The layouts above. Options: ``double`` (default False), ``storage`` (safetensors dtype, default U8)."""

    name = "bitsandbytes"

    def parse(self, source: Source) -> QuantizationConfig:
        """See :func:`qplug_bitsandbytes.config.parse`."""
        return parse(source)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The tensors of the table above."""
        if quant.layout == "bnb_8bit":
            return (
                StoredTensor("weight", ("N", "K"), ("I8",)),
                StoredTensor("SCB", ("N",), FLOATS),
                # Files of the first versions have none, and rows in their order.
                StoredTensor("weight_format", (), ("U8",), optional=True, meta=True),
            )
        size, double, dtype = _part(quant).block[1], bool(quant.opt("double")), quant.opt("storage", "U8")
        # Codes of an odd count end in half a byte.
        packed = "ceil(N*K/2)" if ITEM_BYTES[dtype] == 1 else f"N*K/{2 * ITEM_BYTES[dtype]}"
        stored = [
            StoredTensor("weight", (packed, "1"), (dtype,)),
            StoredTensor("weight.absmax", (f"ceil(N*K/{size})",), ("U8",) if double else ("F32",)),
            StoredTensor("weight.quant_map", ("16",), ("F32",)),
            StoredTensor(_state_name(quant), ("?",), ("U8",), meta=True),
        ]
        if double:
            stored.append(StoredTensor("weight.nested_absmax", (f"ceil(N*K/{size * NESTED})",), ("F32",)))
            stored.append(StoredTensor("weight.nested_quant_map", ("256",), ("F32",)))
        return tuple(stored)

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """int8 codes with scales ``[N, 1]``; or codes 0 to 15 with scales ``[N, K/B]`` and the stored codebook.

        Where blocks do not end with rows, scales are repeated for the largest groups that do: gcd(B, K) columns.

        :raises DecodeError: where the JSON or the codebook is not of this layer, or rows are permuted for a kernel.
        """
        if quant.layout == "bnb_8bit":
            return self._decode_int8(tensors, quant, n)
        part = _part(quant)
        state = QuantState.read(tensors[_state_name(quant)])
        state.check("nf4" if part.dtype == "nf4" else "fp4", n, k, bool(quant.opt("double")))
        absmax = state.absmax(tensors)
        if absmax.numel() != -(-n * k // state.blocksize):
            raise DecodeError(
                f"{absmax.numel()} scales and a blocksize of {state.blocksize} were found for a weight [{n}, {k}], which has "
                f"{-(-n * k // state.blocksize)} blocks of that size; the file is damaged, so fetch it again"
            )
        data = tensors["weight"].contiguous().view(torch.uint8).reshape(-1)
        codes = torch.empty(2 * data.numel(), dtype=torch.uint8)
        torch.bitwise_right_shift(data, 4, out=codes[0::2])
        torch.bitwise_and(data, 15, out=codes[1::2])
        width = gcd(state.blocksize, k)
        scales = absmax.repeat_interleave(state.blocksize // width)[: n * k // width].view(n, k // width)
        scheme = replace(quant.scheme, weight=replace(part, block=(1, width)))
        return QuantWeight(
            scheme, codes[: n * k].view(n, k), scales, (1, width), codebook=_checked_map(tensors["weight.quant_map"], part)
        )

    def _decode_int8(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int) -> QuantWeight:
        order = tensors.get("weight_format")
        if order is not None and int(order):
            raise DecodeError(
                f"weight_format {int(order)} was found, rows permuted for a kernel of one GPU; 0 (row) was needed, so load the file "
                "with the bitsandbytes that wrote it and save it again"
            )
        scales = tensors["SCB"].float().reshape(n, 1) / 127.0
        return QuantWeight(quant.scheme, tensors["weight"], scales, (1, 0))

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`.

        :raises CannotEncode: for scales that are no blocks of the flattened weight, or no 127th of a float32; for ``double``.
        """
        weight = _storable(weight)
        if _flat(weight.scheme) != _flat(quant.scheme) or (_part(quant).dtype == "int8") != (quant.layout == "bnb_8bit"):
            raise CannotEncode(
                f"a weight of scheme {weight.scheme} was given; the layer is to be stored as {quant.layout} {quant.scheme}"
            )
        if quant.layout == "bnb_8bit":
            stored = {"weight": weight.codes.contiguous(), "SCB": _scb(weight.scales)}
            return {**stored, "weight_format": torch.zeros((), dtype=torch.uint8)}
        if quant.opt("double"):
            raise CannotEncode(
                "double quantization was asked for, which rounds the scales again; store them as they are, without double"
            )
        part = _part(quant)
        size, (n, k) = part.block[1], weight.codes.shape
        assert weight.codebook is not None
        codes = weight.codes.reshape(-1)
        codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
        packed = codes[0::2].bitwise_left_shift(4).bitwise_or_(codes[1::2])
        dtype = quant.opt("storage", "U8")
        if packed.numel() % ITEM_BYTES[dtype]:
            raise CannotEncode(f"[{n}, {k}] codes of 4 bits were given, which fill no whole {dtype}; store them as U8")
        absmax = _absmax(weight, size)
        return {
            "weight": packed.view(_DTYPES[dtype]).view(-1, 1),
            "weight.absmax": absmax,
            "weight.quant_map": weight.codebook.float(),
            _state_name(quant): QuantState("nf4" if part.dtype == "nf4" else "fp4", size, (n, k)).write(),
        }

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """``bnb_8bit`` for int8, else ``bnb_4bit`` in bytes.

        :raises CannotEncode: as :meth:`encode`.
        """
        weight = _storable(weight)
        part, act = weight.scheme.weight, weight.scheme.act
        assert part is not None
        if part.dtype == "int8" and act:
            _scb(weight.scales)
            return int8_quant(act.outlier)
        _absmax(weight, part.block[1])
        return LayerQuant(weight.scheme, "bnb_4bit")

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """See :func:`qplug_bitsandbytes.config.write`."""
        return write(layers)


_DTYPES = {
    "U8": torch.uint8, "I8": torch.int8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
}  # fmt: skip


def _part(quant: LayerQuant) -> TensorQuant:
    part = quant.scheme.weight
    assert part is not None
    return part


def _state_name(quant: LayerQuant) -> str:
    return f"weight.quant_state.bitsandbytes__{'nf4' if _part(quant).dtype == 'nf4' else 'fp4'}"


def _checked_map(stored: Tensor, part: TensorQuant) -> Tensor:
    """The codebook as it is stored: tools round its constants differently, by less than 1e-4."""
    known = codebook_of(part.dtype)
    assert known is not None
    if not torch.allclose(stored, known, rtol=0, atol=1e-4):
        raise DecodeError(
            f"a quant_map with the values {[round(float(v), 4) for v in stored]} was found, which is not {part.dtype}; no kernel knows "
            "this type, so quantize the model again as nf4 or fp4"
        )
    return stored


def _flat(scheme: QuantScheme) -> QuantScheme:
    """The scheme without the width of its groups, which is that of the blocks only where these end with rows."""
    return replace(scheme, weight=scheme.weight and replace(scheme.weight, block=(1, 0)))


def _storable(weight: QuantWeight | OpaqueWeight) -> QuantWeight:
    """``weight``, where bitsandbytes has a tensor for every field of it."""
    if isinstance(weight, OpaqueWeight) or weight.experts is not None:
        what = "an opaque encoding" if isinstance(weight, OpaqueWeight) else "a stack of experts"
        raise CannotEncode(f"{what} was given; bitsandbytes stores one matrix for each module, {REMEDY}")
    scheme = weight.scheme
    part, act = scheme.weight, scheme.act
    int8 = part is not None and part.dtype == "int8" and part.block == (1, 0) and part.symmetric
    plain = act is not None and scheme.without_act() == int8_quant(0.0).scheme.without_act()
    if int8 and (not plain or act is None or replace(act, outlier=0.0) != int8_quant(0.0).scheme.act):
        raise CannotEncode(f"scheme {scheme} was given; LLM.int8 is W8A8 by channel and token (W8A8_a:outlier=6), {REMEDY}")
    if not int8 and (part is None or part.dtype not in ("nf4", "fp4_bnb") or part.block[0] != 1 or act is not None):
        raise CannotEncode(f"scheme {scheme} was given; bitsandbytes stores WNF4A16, Wfp4bnbA16 and W8A8, {REMEDY}")
    if extra := weight.tensors().keys() - {"codes", "scales", "codebook"}:
        raise CannotEncode(
            f"a weight with {', '.join(sorted(extra))} was given; bitsandbytes has no tensor for it, {REMEDY}"
        )
    if weight.scales.dtype != torch.float32:
        raise CannotEncode(
            f"{str(weight.scales.dtype).removeprefix('torch.')} scales were given; bitsandbytes stores float32, so quantize with "
            "float32 scales"
        )
    return weight


def _absmax(weight: QuantWeight, size: int) -> Tensor:
    """Scales float32 of blocks of ``size`` codes of the flattened weight."""
    width = weight.block[1] or weight.k
    if size not in BLOCKSIZES or width != gcd(size, weight.k):
        raise CannotEncode(
            f"groups of {width} columns of {weight.k} were given; bitsandbytes stores blocks of {', '.join(map(str, BLOCKSIZES))} "
            f"values that run from row to row, {REMEDY}"
        )
    flat = weight.scales.reshape(-1)
    short = -flat.numel() % (size // width)
    blocks = torch.cat([flat, flat[-1:].expand(short)]).view(-1, size // width)
    if not bool((blocks == blocks[:, :1]).all()):
        raise CannotEncode(
            f"groups of {width} columns with scales of their own were given; blocks of {size} values span several, {REMEDY}"
        )
    return blocks[:, 0].contiguous()


def _scb(scales: Tensor) -> Tensor:
    """float32 ``[N]`` that give ``scales [N, 1]`` when they are divided by 127."""
    flat = scales.reshape(-1)
    found = flat * 127.0
    for step in (float("inf"), -float("inf")):
        other = torch.nextafter(flat * 127.0, torch.full_like(flat, step))
        found = torch.where((found / 127.0 != flat) & (other / 127.0 == flat), other, found)
    if not torch.equal(found / 127.0, flat):
        raise CannotEncode(
            "scales were given that are no float32 divided by 127, which is what LLM.int8 stores; quantize with "
            "bitsandbytes.llm_int8, or choose another format"
        )
    return found
