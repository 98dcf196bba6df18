"""Plain FP8: one byte for each weight, scales beside it, under the names of different tools.

Of one layer ``[N, K]`` (names of layout ``fp8_block``; :mod:`qplug_fp8.layouts` has the others):

================ ================================================ ============== ======================================
weight           [N, K]                                           e4m3, e5m2     codes
weight_scale_inv [] or [1], [N] or [N, 1], [ceil(N/bn), ceil(K/bk)] float, E8M0  by tensor, channel or block
activation_scale [] or [1]                                        float          static activation schemes only
================ ================================================ ============== ======================================

``w = weight * scale``: ``weight_scale_inv`` is amax / 448, a multiplier like ``weight_scale``; the name is the inverse of the
factor that the weights were multiplied with. E8M0 scales are powers of two (DeepSeek-V4, ``scale_fmt: ue8m0``).
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
from qplug_core.scheme import TensorQuant
from qplug_core.weight import OpaqueWeight, QuantWeight

from .config import parse, write
from .layouts import LAYOUTS, Layout

if TYPE_CHECKING:
    from qplug_core.source import Source

STORED = {"fp8_e4m3": "F8_E4M3", "fp8_e5m2": "F8_E5M2"}


class FP8Format(CheckpointFormat):
    """All layouts of :data:`qplug_fp8.layouts.LAYOUTS` whose config is ``quant_method: fp8``."""

    name = "fp8"

    def parse(self, source: Source) -> QuantizationConfig:
        """See :func:`qplug_fp8.config.parse`."""
        return parse(source)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """Codes, scales and, for static activations, their scale, under the names of the layout."""
        layout, part = LAYOUTS[quant.layout], _part(quant)
        lead = ("E",) if layout.experts else ()
        scale_axes, alt, dtypes = scale_axes_of(part)
        stored = [
            StoredTensor(layout.weight_name, (*lead, "N", "K"), (STORED[part.dtype],)),
            StoredTensor(layout.scale_name, (*lead, *scale_axes), dtypes, alt=tuple((*lead, *axes) for axes in alt)),
        ]
        if quant.scheme.act is not None and not quant.scheme.act.dynamic:
            stored.append(StoredTensor(layout.act or "input_scale", (), FLOATS, alt=(("1",),)))
        return tuple(stored)

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """The codes as they are stored, with scales ``[ceil(N/bn), ceil(K/bk)]`` (``[1, 1]`` by tensor, ``[N, 1]`` by channel).

        Scales that turn out to be E8M0 make the scheme say so, whatever the config said.

        :raises DecodeError: for scales that no tool computes, and for codes that are NaN.
        """
        layout = LAYOUTS[quant.layout]
        act = tensors.get(layout.act or "input_scale")
        return affine(quant, tensors[layout.weight_name], tensors[layout.scale_name], act)

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`.

        :raises CannotEncode: for fields and granularities that the layout has no tensor for.
        """
        layout = LAYOUTS[quant.layout]
        weight = storable(weight, quant, layout)
        if layout.experts:
            raise CannotEncode(
                "one expert was given; layout fp8_experts is a stack of all of them, so store experts as fp8_block"
            )
        if weight.scheme.act is not None and not weight.scheme.act.dynamic and not layout.act:
            raise CannotEncode(
                f"a static activation scale was given; layout {layout.name} has no tensor for it, so store the layer as fp8"
            )
        tensors = {layout.weight_name: weight.codes.contiguous(), layout.scale_name: stored_scales(weight)}
        if weight.act_scale is not None:
            tensors[layout.act] = weight.act_scale.reshape(())
        return tensors

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """Blocks as ``fp8_block``, everything else as ``fp8``: the names that most engines read.

        :raises CannotEncode: as :meth:`encode`.
        """
        part = weight.scheme.weight
        blocks = part is not None and part.granularity in LAYOUTS["fp8_block"].granularities
        quant = LayerQuant(weight.scheme, "fp8_block" if blocks else "fp8")
        storable(weight, quant, LAYOUTS[quant.layout])
        return quant

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """See :func:`qplug_fp8.config.write`."""
        return write(layers)

    def kv_tensors(self, attention: str) -> dict[str, tuple[str, ...]]:
        """Scales of the attention module or of its projections; ``kv_scale`` (AutoFP8) is one for keys and values."""
        names = {
            f"{x}_scale": (f"{attention}.{x}_scale", f"{attention}.{x}_proj.{x}_scale", f"{attention}.{x}_proj.output_scale")
            for x in "kvq"
        }
        shared = f"{attention}.kv_scale"
        return {**names, "k_scale": (*names["k_scale"], shared), "v_scale": (*names["v_scale"], shared)}


def scale_axes_of(part: TensorQuant) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Axes of the scale, other shapes under which it is seen, and its dtypes."""
    bn, bk = part.block
    match part.granularity:
        case "tensor":
            return (), (("1",), ("1", "1")), FLOATS
        case "channel":
            return ("N", "1"), (("N",),), FLOATS
    rows = "N" if bn == 1 else f"ceil(N/{bn})" if bn else "1"
    columns = f"ceil(K/{bk})" if bk else "1"
    return (rows, columns), (), (*FLOATS, "F8_E8M0", "U8")


def affine(quant: LayerQuant, codes: Tensor, scales: Tensor, act: Tensor | None) -> QuantWeight:
    """The hub's weight of codes ``[N, K]`` and a stored scale in any of its shapes, checked."""
    part, scheme = _part(quant), quant.scheme
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        scales = scales.view(torch.uint8)
        scheme = replace(scheme, weight=replace(part, scale_dtype="e8m0"))
    elif part.scale_dtype == "e8m0":
        scheme = replace(scheme, weight=replace(part, scale_dtype="float"))
    scales = scales.reshape({"tensor": (1, 1), "channel": (codes.shape[0], 1)}.get(part.granularity, scales.shape))
    _check_scales(scales)
    _check_codes(codes)
    if act is not None:
        act = act.float().reshape(())
        if not 0 < float(act) < float("inf"):
            raise DecodeError(
                f"the activation scale is {float(act)}; a positive finite number was needed, so calibrate the checkpoint again"
            )
    return QuantWeight(scheme, codes, scales, part.block, act_scale=act)


def _check_scales(scales: Tensor) -> None:
    bad = scales == 255 if scales.dtype == torch.uint8 else ~(torch.isfinite(scales) & (scales >= 0))
    if bool(bad.any()):
        value = "NaN" if scales.dtype == torch.uint8 else f"{float(scales[bad][0]):g}"
        raise DecodeError(
            f"{int(bad.sum())} of {scales.numel()} weight scales are not usable, the first is {value}; finite numbers of at "
            "least 0 were needed, so the file is damaged or was never filled: fetch or quantize it again"
        )


def _check_codes(codes: Tensor) -> None:
    magnitudes = codes.view(torch.uint8) & 0x7F
    bad = magnitudes == 0x7F if codes.dtype == torch.float8_e4m3fn else magnitudes >= 0x7C
    if bool(bad.any()):
        raise DecodeError(
            f"{int(bad.sum())} of {codes.numel()} FP8 codes are NaN or infinite, which a cast without clamping leaves of large "
            "weights; quantize the model again"
        )


def storable(weight: QuantWeight | OpaqueWeight, quant: LayerQuant, layout: Layout) -> QuantWeight:
    """``weight``, where every field of it has a tensor in ``layout``.

    :raises CannotEncode: otherwise.
    """
    scheme, remedy = weight.scheme, "choose another format"
    if isinstance(weight, OpaqueWeight) or weight.experts is not None:
        what = "an opaque encoding" if isinstance(weight, OpaqueWeight) else "a stack of experts"
        raise CannotEncode(f"{what} was given; {layout.name} stores one matrix for each module, so {remedy}")
    part, act = scheme.weight, scheme.act
    if part is None or part.dtype not in STORED or scheme.sparsity or scheme.act_order:
        raise CannotEncode(f"scheme {scheme} was given; {layout.name} stores FP8 weights, so {remedy}")
    if act is not None and act.dtype != "fp8_e4m3":
        raise CannotEncode(f"scheme {scheme} was given; {layout.name} has 16-bit or FP8 activations, so {remedy}")
    if scheme != quant.scheme:
        raise CannotEncode(f"a weight of scheme {scheme} was given; the layer is to be stored as {quant.scheme}")
    if part.granularity not in layout.granularities or (part.block[0] == 0 and part.block[1]):
        raise CannotEncode(
            f"scales by {part.granularity} were given; layout {layout.name} has them by {', '.join(layout.granularities)}, so "
            "choose another layout"
        )
    extra = weight.tensors().keys() - {"codes", "scales", "act_scale"}
    if extra:
        raise CannotEncode(
            f"a weight with {', '.join(sorted(extra))} was given; {layout.name} has no tensor for it, so {remedy}"
        )
    if weight.act_div:
        raise CannotEncode(f"an activation scale that divides was given; {layout.name} stores multipliers, so {remedy}")
    return weight


def stored_scales(weight: QuantWeight) -> Tensor:
    """Scales as they are written: ``[]`` by tensor, ``[N, 1]`` by channel, a grid by block; powers of two as E8M0."""
    part = weight.scheme.weight
    assert part is not None
    if part.granularity == "tensor":
        return weight.scales.reshape(())
    scales = weight.scales.contiguous()
    return scales.view(torch.float8_e8m0fnu) if part.scale_dtype == "e8m0" else scales


def _part(quant: LayerQuant) -> TensorQuant:
    part = quant.scheme.weight
    assert part is not None, "a layer that stays 16 bit has no FP8 tensors"
    return part
