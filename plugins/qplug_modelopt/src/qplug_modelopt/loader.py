"""ModelOpt checkpoints: stored tensors, decode, encode. Of one layer ``[N, K]``, W = codes * scales (* weight_scale_2):

===================== =================== ======================================== ==================================
layout                weight              weight_scale                             more
===================== =================== ======================================== ==================================
modelopt_fp8          [N, K] e4m3         [] float32                               input_scale
modelopt_fp8_pc_pt    [N, K] e4m3         [N] float32
modelopt_fp8_pb       [N, K] e4m3         [ceil(N/128), 1, ceil(K/128), 1] float32
modelopt_nvfp4        [N, K/2] uint8      [N, K/16] e4m3                           weight_scale_2, input_scale
modelopt_int4_awq     [N/2, K] uint8      [N, K/g] or [N] float32
modelopt_w4a8_awq     [N/2, K] uint8      [N, K/g] float32                         weight_scale_2, input_scale
modelopt_int8_sq      [N, K] int8         [N] float32                              input_scale
modelopt_mxfp4        [N, K/2] uint8      [N, K/32] uint8 (E8M0)                   input_scale (FP8 activations)
modelopt_mxfp8        [N, K] e4m3         [N, K/32] uint8 (E8M0)
===================== =================== ======================================== ==================================

``input_scale`` and ``weight_scale_2`` are float32 ``[]`` and multiply, as all scales of this format do. ``pre_quant_scale``
``[K]`` multiplies x before its quantization; it is absent where the exporter folded it into the layer before. The
``weight_scale_2`` of modelopt_w4a8_awq is the step of FP8 weights inside of a kernel, and no factor of W.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qplug_core.axes import FLOATS, StoredTensor
from qplug_core.config import LayerQuant, QuantizationConfig
from qplug_core.errors import CannotEncode, DecodeError
from qplug_core.format import CheckpointFormat
from qplug_core.quantizer import codebook_of
from qplug_core.scheme import TensorQuant
from qplug_core.weight import OpaqueWeight, QuantWeight

from . import config
from .algos import ALGOS, SMOOTHED
from .codes import pack_fp4, pack_int4, unpack_fp4, unpack_int4

if TYPE_CHECKING:
    from qplug_core.source import Source

FP4 = ("modelopt_nvfp4", "modelopt_mxfp4")
INT4 = ("modelopt_int4_awq", "modelopt_w4a8_awq")
SMOOTHING = ("modelopt_nvfp4", *INT4, "modelopt_int8_sq")
"""Layouts whose algorithms may scale x beforehand."""

SCALAR = (("1",),)


class ModelOptFormat(CheckpointFormat):
    """The layouts of the table above. Option ``scale``: the name of the scales, where it is not ``weight_scale``."""

    name = "modelopt"

    def parse(self, source: Source) -> QuantizationConfig:
        """See :func:`qplug_modelopt.config.parse`."""
        return config.parse(source)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The tensors of the table above that this scheme has."""
        layout, part, act = quant.layout, _part(quant), quant.scheme.act
        rows, columns = part.block
        weight = {
            **dict.fromkeys(FP4, (("N", "K/2"), ("U8",))),
            **dict.fromkeys(INT4, (("N/2", "K"), ("U8", "I8"))),
            "modelopt_int8_sq": (("N", "K"), ("I8",)),
        }.get(layout, (("N", "K"), ("F8_E4M3",)))
        scale = quant.opt("scale", "weight_scale")
        stored = [StoredTensor("weight", *weight)]
        match part.granularity:
            case "tensor":
                stored.append(StoredTensor(scale, (), FLOATS, alt=SCALAR))
            case "channel":
                stored.append(StoredTensor(scale, ("N",), FLOATS, alt=(("N", "1"),)))
            case "block":
                grid = (f"ceil(N/{rows})", f"ceil(K/{columns})")
                stored.append(StoredTensor(scale, (grid[0], "1", grid[1], "1"), FLOATS, alt=(grid,)))
            case _:
                dtypes = {"e4m3": ("F8_E4M3",), "e8m0": ("U8", "F8_E8M0")}.get(part.scale_dtype, FLOATS)
                stored.append(StoredTensor(scale, ("N", f"K/{columns}"), dtypes))
        if layout == "modelopt_nvfp4":
            stored.append(StoredTensor("weight_scale_2", (), ("F32",), alt=SCALAR))
        elif layout == "modelopt_w4a8_awq":
            stored.append(StoredTensor("weight_scale_2", (), ("F32",), optional=True, alt=SCALAR, meta=True))
        if act is not None and act.dynamic is not True:
            stored.append(StoredTensor("input_scale", (), ("F32",), alt=SCALAR))
        if layout in SMOOTHING:
            stored.append(StoredTensor("pre_quant_scale", ("K",), FLOATS, optional=True, alt=(("1", "K"),)))
        return tuple(stored)

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """Codes ``[N, K]`` with scales ``[N/bn, K/bk]`` in their stored dtype.

        :raises DecodeError: for a scale of the whole tensor that is no usable number.
        """
        layout, part = quant.layout, _part(quant)
        weight = tensors["weight"]
        codes = unpack_fp4(weight) if layout in FP4 else unpack_int4(weight) if layout in INT4 else weight
        scales = tensors[quant.opt("scale", "weight_scale")]
        rows = -(-n // part.block[0]) if part.block[0] else 1
        global_scale = _scalar(tensors, "weight_scale_2", zero=True)
        pre_scale = tensors.get("pre_quant_scale")
        return QuantWeight(
            quant.scheme,
            codes,
            scales.reshape(rows, -1) if scales.numel() else scales.reshape(rows, 0),
            part.block,
            global_scale=global_scale if layout == "modelopt_nvfp4" else None,
            codebook=codebook_of(part.dtype),
            pre_scale=None if pre_scale is None else pre_scale.reshape(k),
            act_scale=_scalar(tensors, "input_scale"),
        )

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`.

        :raises CannotEncode: for fields that the layout has no tensor for, or a shape that does not fill whole bytes and groups.
        """
        weight = _storable(weight)
        layout = quant.layout
        _check_fits(weight, quant)
        part = _part(quant)
        codes = weight.codes
        stored = pack_fp4(codes) if layout in FP4 else pack_int4(codes) if layout in INT4 else codes.contiguous()
        shape: tuple[int, ...] = tuple(weight.scales.shape)
        match part.granularity:
            case "tensor":
                shape = ()
            case "channel":
                shape = (weight.n,)
            case "block":
                shape = (shape[0], 1, shape[1], 1)
        tensors = {"weight": stored, quant.opt("scale", "weight_scale"): weight.scales.reshape(shape).contiguous()}
        if weight.global_scale is not None:
            tensors["weight_scale_2"] = weight.global_scale.reshape(()).clone()
        elif layout == "modelopt_w4a8_awq":
            # What TensorRT-LLM divides the group scales by, so that 7 steps of the largest reach 448.
            tensors["weight_scale_2"] = weight.scales.float().amax() * 7 / 448
        if weight.act_scale is not None:
            tensors["input_scale"] = weight.act_scale.reshape(()).clone()
        if weight.pre_scale is not None:
            tensors["pre_quant_scale"] = weight.pre_scale.contiguous()
        return tensors

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """The first layout whose algorithm has the weight's scheme.

        :raises CannotEncode: where there is none.
        """
        weight = _storable(weight)
        smoothed = weight.pre_scale is not None
        for layout in dict.fromkeys(algo.layout for algo in ALGOS.values()):
            if smoothed and layout not in SMOOTHING:
                continue
            opts = SMOOTHED if smoothed and layout == "modelopt_nvfp4" else ()
            quant = LayerQuant(weight.scheme, layout, opts)
            try:
                config.algo_for(quant)
            except CannotEncode:
                continue
            return quant
        what = " and pre_scale" if smoothed else ""
        raise CannotEncode(
            f"a weight of scheme {weight.scheme}{what} was given; ModelOpt has no quant_algo for it, so choose another format"
        )

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """See :func:`qplug_modelopt.config.write`."""
        return config.write(layers)

    def kv_tensors(self, attention: str) -> dict[str, tuple[str, ...]]:
        """One scale for all keys and one for all values, which multiply: beside the projections, as the exporter writes them."""
        return {
            role: (f"{attention}.{role[0]}_proj.{role}", f"{attention}.qkv_proj.{role}", f"{attention}.{role}")
            for role in ("k_scale", "v_scale")
        }


def _part(quant: LayerQuant) -> TensorQuant:
    part = quant.scheme.weight
    assert part is not None, "a layer that stays 16 bit has no ModelOpt tensors"
    return part


def _scalar(tensors: Mapping[str, Tensor], name: str, zero: bool = False) -> Tensor | None:
    """A scale of a whole tensor as float32 ``[]``. ``zero``: a weight of zeros has scale 0."""
    value = tensors.get(name)
    if value is None:
        return None
    number = float(value)
    if not (0 <= number < float("inf")) or (number == 0 and not zero):
        raise DecodeError(
            f"{name} is {number}; a positive finite number was needed, so calibrate and export the model again"
        )
    return value.reshape(())


def _storable(weight: QuantWeight | OpaqueWeight) -> QuantWeight:
    """``weight``, where every field of it has a tensor in some layout."""
    remedy = "choose another format"
    if isinstance(weight, OpaqueWeight) or weight.experts is not None:
        what = "an opaque encoding" if isinstance(weight, OpaqueWeight) else "a stack of experts"
        raise CannotEncode(f"{what} was given; ModelOpt stores one matrix for each module, so {remedy}")
    known = {"codes", "scales", "codebook", "global_scale", "act_scale", "pre_scale"}
    extra = weight.tensors().keys() - known
    if extra:
        raise CannotEncode(f"a weight with {', '.join(sorted(extra))} was given; ModelOpt has no tensor for it, so {remedy}")
    if weight.global_div or weight.act_div:
        raise CannotEncode(
            "a scale that divides was given; scales of ModelOpt multiply and 1/x is not exact, so store it as compressed-tensors"
        )
    if weight.global_scale is not None and weight.global_scale.numel() != 1:
        raise CannotEncode(
            f"{weight.global_scale.numel()} global scales were given; ModelOpt stores one for each module, so store the parts unfused"
        )
    if weight.scheme.act_order or weight.scheme.sparsity:
        raise CannotEncode(f"scheme {weight.scheme} was given; ModelOpt stores neither act order nor sparsity, so {remedy}")
    return weight


def _check_fits(weight: QuantWeight, quant: LayerQuant) -> None:
    if replace(weight.scheme, kv=None) != replace(quant.scheme, kv=None):
        raise CannotEncode(f"a weight of scheme {weight.scheme} was given; the layer is to be stored as {quant.scheme}")
    config.algo_for(quant)
    rows = 2 if quant.layout in INT4 else 1
    part = _part(quant)
    columns = part.block[1] if part.granularity == "group" else 1
    if weight.n % rows or weight.k % columns:
        raise CannotEncode(
            f"a weight [{weight.n}, {weight.k}] was given; {quant.layout} needs a multiple of {rows} rows and {columns} columns, so "
            "choose another format for this layer"
        )
    if weight.pre_scale is not None and quant.layout not in SMOOTHING:
        raise CannotEncode(
            f"a weight with pre_scale was given; {quant.layout} has no tensor for it, so fold it into the weight"
        )
