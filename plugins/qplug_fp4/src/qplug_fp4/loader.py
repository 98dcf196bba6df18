"""FP4 and microscaling checkpoints: stored tensors, decode and encode.

Of one layer ``[N, K]``; ``g`` columns share a scale (16 for NVFP4, 32 for MX). FP4 codes are e2m1, the even column in the low
four bits of a byte:

====== ======================== ====================== ============== =========================================================
layout tensor                   shape                  dtype          meaning
====== ======================== ====================== ============== =========================================================
nvfp4  weight                   [N, K/2]               uint8          codes
\\      weight_scale             [N, K/g]               e4m3           row by row, never swizzled
\\      weight_scale_2           [] or [1]              float32        multiplies the scales (ModelOpt); *or*
\\      weight_global_scale      [] or [1]              float32        divides them (compressed-tensors)
\\      input_scale              [] or [1]              float32        multiplier of static or two-level activations; beside
\\                                                                     weight_global_scale it is input_global_scale, a divisor
mxfp4  weight                   [N, K/2]               uint8          codes
\\      weight_scale             [N, K/32]              uint8 or E8M0  byte b means 2**(b - 127), 255 is NaN
mxfp8  weight                   [N, K]                 e4m3           codes
\\      weight_scale             [N, K/32]              uint8 or E8M0  the same; weight_scale_inv is another name, not an inverse
blocks <module>_blocks          [E, N, K/32, 16]       uint8          gpt-oss (layout ``mxfp4_blocks``): 32 codes in 16 bytes
\\      <module>_scales          [E, N, K/32]           uint8          one expert of them is ``[N, K/32, 16]`` and ``[N, K/32]``
====== ======================== ====================== ============== =========================================================

``w = e2m1(code) * scale * global`` (OCP Microscaling Formats 1.0, 5.2 and 6.3; NVFP4 as ModelOpt and compressed-tensors write it).
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
from qplug_core.packing import pack, unpack
from qplug_core.quantizer import codebook_of
from qplug_core.scheme import TensorQuant
from qplug_core.weight import OpaqueWeight, QuantWeight

from .config import DIVISOR, parse, problem, write

if TYPE_CHECKING:
    from qplug_core.source import Source

SCALAR = (("1",),)
BYTES = ("U8", "F8_E8M0")
BLOCKS, SCALES = "{module}_blocks", "{module}_scales"
OWN = {"codes", "scales", "global_scale", "codebook", "act_scale"}
"""Fields of the hub that these formats have a tensor, or a constant, for."""


class _Microscaled(CheckpointFormat):
    """What NVFP4, MXFP4 and MXFP8 share. Option ``scale_name``: the stored name of the block scales.

    Option ``global_scale``: ``weight_scale_2`` (a multiplier, the default) or ``weight_global_scale`` (a divisor).
    """

    name = ""

    def parse(self, source: Source) -> QuantizationConfig:
        """See :func:`qplug_fp4.config.parse`."""
        return parse(source, self.name)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The tensors of the table above."""
        part, act = _part(quant), quant.scheme.act
        if quant.layout == "mxfp4_blocks":
            return (
                StoredTensor(BLOCKS, ("E", "N", "K/32", "16"), ("U8",), alt=(("N", "K/32", "16"),)),
                StoredTensor(SCALES, ("E", "N", "K/32"), BYTES, alt=(("N", "K/32"),)),
            )
        two_level = part.scale_dtype == "e4m3"
        packed = part.dtype == "fp4_e2m1"
        stored = [
            StoredTensor("weight", ("N", "K/2" if packed else "K"), ("U8",) if packed else ("F8_E4M3",)),
            StoredTensor(_scale_name(quant), ("N", f"ceil(K/{part.block[1]})"), ("F8_E4M3",) if two_level else BYTES),
        ]
        if two_level:
            stored.append(StoredTensor(_global_name(quant), (), ("F32",), alt=SCALAR))
        if act is not None and act.dynamic is not True:
            stored.append(StoredTensor(_input_name(quant), (), FLOATS, alt=SCALAR))
        return tuple(stored)

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """Codes ``[N, K]``: uint8 with the codebook of e2m1, or float8; scales ``[N, K/g]`` as stored (E8M0 as bytes).

        :raises DecodeError: for NaN scales, and for a global scale that only the other convention could mean.
        """
        part = _part(quant)
        if quant.layout == "mxfp4_blocks":
            stored, scales = tensors[BLOCKS].reshape(n, k // 2), tensors[SCALES].reshape(n, -1)
        else:
            stored, scales = tensors["weight"], tensors[_scale_name(quant)]
        packed = part.dtype == "fp4_e2m1"
        if part.scale_dtype == "e8m0":
            scales = scales.view(torch.uint8)
        _check_scales(scales, quant)
        global_scale = tensors.get(_global_name(quant)) if part.scale_dtype == "e4m3" else None
        if global_scale is not None:
            _check_global(float(global_scale), quant)
        divides = _divides(quant)
        act_scale = tensors.get(_input_name(quant))
        if act_scale is not None and not 0 < float(act_scale) < float("inf"):
            raise DecodeError(
                f"{_input_name(quant)} is {float(act_scale)}; a positive finite number was needed, so calibrate the checkpoint again"
            )
        return QuantWeight(
            quant.scheme,
            unpack(stored.contiguous(), 4) if packed else stored,
            scales,
            part.block,
            global_scale=None if global_scale is None else global_scale.reshape(()),
            global_div=divides and global_scale is not None,
            codebook=codebook_of(part.dtype),
            act_scale=None if act_scale is None else act_scale.float().reshape(()),
            act_div=divides and act_scale is not None,
        )

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`. A stack ``[E, N, K]`` is stored as one by the layout ``mxfp4_blocks`` only.

        :raises CannotEncode: for numbers that the layout has no tensor for, or a K that does not fill its bytes.
        """
        weight = self._storable(weight, quant.layout)
        part = _part(quant)
        if weight.scheme != quant.scheme or weight.block != part.block:
            raise CannotEncode(f"a weight of scheme {weight.scheme} was given; the layer is to be stored as {quant.scheme}")
        packed = part.dtype == "fp4_e2m1"
        unit = 32 if quant.layout == "mxfp4_blocks" else 2 if packed else 1
        if weight.k % unit:
            raise CannotEncode(
                f"a weight with {weight.k} columns was given; {quant.layout} stores {unit} at a time, so leave the layer at 16 bit"
            )
        codes = pack(weight.codes.reshape(-1, weight.k), 4, torch.uint8) if packed else weight.codes.contiguous()
        scales = weight.scales.contiguous()
        if quant.layout == "mxfp4_blocks":
            return {BLOCKS: codes.reshape(*weight.codes.shape[:-1], weight.k // 32, 16), SCALES: scales}
        tensors = {"weight": codes, _scale_name(quant): scales}
        if weight.global_scale is not None:
            tensors[_global_name(quant)] = _scalar(weight.global_scale, "global scale")
        if weight.act_scale is not None:
            tensors[_input_name(quant)] = _scalar(weight.act_scale, "activation scale")
        self._check_flags(weight, quant)
        return tensors

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """The plain layout, with a stored divisor where the weight has one; a stack of MXFP4 experts as ``mxfp4_blocks``."""
        stacked = isinstance(weight, QuantWeight) and weight.experts is not None and self.name == "mxfp4"
        layout = "mxfp4_blocks" if stacked else self.name
        weight = self._storable(weight, layout)
        opts = (("global_scale", DIVISOR),) if weight.global_div else ()
        return LayerQuant(replace(weight.scheme, kv=None), layout, opts)

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """See :func:`qplug_fp4.config.write`."""
        return write(layers, self.name)

    def kv_tensors(self, attention: str) -> dict[str, str]:
        """FP8 scales beside the projections, as ModelOpt writes them."""
        return {"k_scale": f"{attention}.k_proj.k_scale", "v_scale": f"{attention}.v_proj.v_scale"}

    def _storable(self, weight: QuantWeight | OpaqueWeight, layout: str) -> QuantWeight:
        """``weight``, where its scheme and its fields are those of ``layout``."""
        if isinstance(weight, OpaqueWeight):
            raise CannotEncode(
                f"an opaque encoding was given; {self.name} stores FP4 or FP8 codes, so choose another format"
            )
        if weight.experts is not None and layout != "mxfp4_blocks":
            raise CannotEncode(
                f"a stack of experts was given; {layout} stores one matrix for each module, so store them one by one"
            )
        reason = problem(weight.scheme, self.name, layout)
        if reason:
            raise CannotEncode(f"scheme {weight.scheme} was given; {reason}, so choose another format")
        extra = weight.tensors().keys() - OWN
        if extra:
            raise CannotEncode(
                f"a weight with {', '.join(sorted(extra))} was given; {self.name} has no tensor for it, so choose another format"
            )
        return weight

    def _check_flags(self, weight: QuantWeight, quant: LayerQuant) -> None:
        divides = _divides(quant)
        held = {
            flag
            for flag, value in ((weight.global_div, weight.global_scale), (weight.act_div, weight.act_scale))
            if value is not None
        }
        if held - {divides}:
            raise CannotEncode(
                "a weight whose global or activation scale "
                f"{'multiplies' if divides else 'divides'} was given; {_global_name(quant)} stores "
                f"{'divisors' if divides else 'multipliers'} and a reciprocal is not exact, so store it as {quant.layout} with the other name"
            )
        if weight.global_scale is not None:
            try:
                _check_global(float(weight.global_scale), quant)
            except DecodeError as error:
                raise CannotEncode(f"{error}; a reader would refuse it") from None


class NVFP4Format(_Microscaled):
    """Layout ``nvfp4``."""

    name = "nvfp4"


class MXFP4Format(_Microscaled):
    """Layouts ``mxfp4`` and ``mxfp4_blocks`` (gpt-oss)."""

    name = "mxfp4"


class MXFP8Format(_Microscaled):
    """Layout ``mxfp8``."""

    name = "mxfp8"


def _part(quant: LayerQuant) -> TensorQuant:
    part = quant.scheme.weight
    assert part is not None, "a layer that stays 16 bit has no FP4 tensors"
    return part


def _divides(quant: LayerQuant) -> bool:
    return bool(quant.opt("global_scale") == DIVISOR)


def _scale_name(quant: LayerQuant) -> str:
    return str(quant.opt("scale_name", "weight_scale"))


def _global_name(quant: LayerQuant) -> str:
    return DIVISOR if _divides(quant) else "weight_scale_2"


def _input_name(quant: LayerQuant) -> str:
    return "input_global_scale" if _divides(quant) else "input_scale"


def _scalar(value: Tensor, what: str) -> Tensor:
    if value.numel() != 1:
        raise CannotEncode(
            f"a {what} {list(value.shape)} was given; one number for the tensor is stored, so store the parts one by one"
        )
    return value.float().reshape(())


def _check_scales(scales: Tensor, quant: LayerQuant) -> None:
    """Refuse NaN: E8M0 255, e4m3 0x7F and 0xFF. A scale of 0 is a block of zeros and right."""
    values = scales.view(torch.uint8)
    bad = values == 255 if scales.dtype == torch.uint8 else (values & 0x7F) == 0x7F
    if bool(bad.any()):
        raise DecodeError(
            f"{int(bad.sum())} of {bad.numel()} block scales are NaN; {quant.layout} has finite ones, so quantize the layer again or "
            "fetch the file again"
        )


def _check_global(value: float, quant: LayerQuant) -> None:
    """Multipliers are amax / 2688 and divisors 2688 / amax: beyond 1 either would mean weights in the thousands."""
    name, divides = _global_name(quant), _divides(quant)
    if not 0 < value < float("inf"):
        raise DecodeError(f"{name} is {value}; a positive finite number was needed, so fetch the file again")
    if value < 1 if divides else value > 1:
        other = "weight_scale_2" if divides else DIVISOR
        raise DecodeError(
            f"{name} is {value:g}, a {'divisor' if divides else 'multiplier'} that makes weights of up to "
            f"{2688 / value if divides else 2688 * value:.0f}; it looks like the reciprocal, so rename it to {other}"
        )
