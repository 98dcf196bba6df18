"""AMD Quark checkpoints: stored tensors, decode and encode.

Of one layer ``[N, K]``:

================= ================= ============================ ===================================================
tensor            layout            shape                        dtype
================= ================= ============================ ===================================================
weight            quark_fp8, _mxfp8 [N, K]                       e4m3
\\                 quark_int8        [N, K]                       int8
\\                 quark_mxfp4, _nvfp4 [N, K/2]                   uint8, the even column in the low four bits
weight_scale      by tensor         [] or [1]                    float
\\                 by channel        [N] or [N, 1]                float
\\                 by block, group   [ceil(N/bn), ceil(K/bk)]     float, or E8M0 bytes (uint8)
\\                 quark_nvfp4       [N, K/16]                    e4m3
weight_zero_point quark_int8        like weight_scale            int8, all 0; left out by some exports
weight_scale_2    quark_nvfp4       [] or [1]                    float, multiplies weight_scale
input_scale       static inputs     [] or [1]                    float
input_zero_point  static int8       [] or [1]                    int8, 0 where symmetric
input_scale_2     quark_nvfp4       [] or [1]                    float, multiplies the computed block scales
================= ================= ============================ ===================================================

With option ``names`` = ``internal`` the scale of ``weight`` is ``weight_quantizer.scale``, and so on: transformers 5 saves these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qplug_core.axes import FLOATS, StoredTensor
from qplug_core.config import LayerQuant, QuantizationConfig
from qplug_core.errors import CannotEncode, ConfigError, DecodeError
from qplug_core.format import CheckpointFormat
from qplug_core.packing import pack, unpack
from qplug_core.quantizer import codebook_of
from qplug_core.scheme import QuantScheme, TensorQuant
from qplug_core.weight import OpaqueWeight, QuantWeight

from .config import layer_config, layout_of, parse, write
from .spec import input_quant, weight_quant

if TYPE_CHECKING:
    from qplug_core.source import Source

SCALAR = (("1",),)
NAMES = {
    "weight_scale": "weight_quantizer.scale",
    "weight_zero_point": "weight_quantizer.zero_point",
    "input_scale": "input_quantizer.scale",
    "input_zero_point": "input_quantizer.zero_point",
}
TWO_LEVEL = {
    **NAMES,
    "weight_scale": "weight_quantizer.0.scale",
    "weight_scale_2": "weight_quantizer.1.scale",
    "input_scale_2": "input_quantizer.1.scale",
}
OWN = {"codes", "scales", "global_scale", "codebook", "act_scale", "act_zero"}


class QuarkFormat(CheckpointFormat):
    """Layouts ``quark_fp8``, ``quark_int8``, ``quark_mxfp4``, ``quark_mxfp8`` and ``quark_nvfp4``."""

    name = "quark"

    def parse(self, source: Source) -> QuantizationConfig:
        """See :func:`qplug_rocm.config.parse`."""
        return parse(source)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The tensors of the table above that this scheme has."""
        part, act = _part(quant.scheme), quant.scheme.act
        name = _Names(quant)
        packed = part.dtype == "fp4_e2m1"
        codes = "U8" if packed else "I8" if part.dtype == "int8" else "F8_E4M3"
        stored = [StoredTensor("weight", ("N", "K/2" if packed else "K"), (codes,))]
        axes, alt = _axes(part)
        dtypes = {"e8m0": ("U8", "F8_E8M0"), "e4m3": ("F8_E4M3",), "float": FLOATS}[part.scale_dtype]
        stored.append(StoredTensor(name("weight_scale"), axes, dtypes, alt=alt))
        if part.dtype == "int8":
            stored.append(StoredTensor(name("weight_zero_point"), axes, ("I8",), alt=alt, optional=True))
        if part.scale_dtype == "e4m3":
            stored.append(StoredTensor(name("weight_scale_2"), (), FLOATS, alt=SCALAR))
        if act is not None and act.dynamic == "local":
            stored.append(StoredTensor(name("input_scale_2"), (), FLOATS, alt=SCALAR))
        elif act is not None and act.dynamic is False:
            stored.append(StoredTensor(name("input_scale"), (), FLOATS, alt=SCALAR))
            if act.dtype == "int8":
                stored.append(StoredTensor(name("input_zero_point"), (), ("I8",), alt=SCALAR, optional=act.symmetric))
        return tuple(stored)

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """Codes ``[N, K]``; scales in a grid ``[N/bn, K/bk]`` (``[1, 1]`` by tensor) as stored.

        :raises DecodeError: for NaN scales, zero points in a symmetric layer, and an activation scale that is not positive.
        """
        part, act = _part(quant.scheme), quant.scheme.act
        name = _Names(quant)
        scales = tensors[name("weight_scale")]
        if part.scale_dtype == "e8m0":
            scales = scales.view(torch.uint8)
        if part.block[1] == 0:
            scales = scales.reshape(n if part.block[0] else 1, 1)
        _check_scales(scales)
        _check_symmetric(tensors.get(name("weight_zero_point")), "weight")
        act_scale = tensors.get(name("input_scale_2" if act is not None and act.dynamic == "local" else "input_scale"))
        act_zero = tensors.get(name("input_zero_point"))
        if act is not None and act.symmetric:
            _check_symmetric(act_zero, "input")
            act_zero = None
        if act_scale is not None and not 0 < float(act_scale) < float("inf"):
            raise DecodeError(
                f"input_scale is {float(act_scale)}; a positive finite number was needed, so calibrate the checkpoint again"
            )
        outer = tensors.get(name("weight_scale_2")) if part.scale_dtype == "e4m3" else None
        stored = tensors["weight"]
        return QuantWeight(
            quant.scheme,
            unpack(stored.contiguous(), 4) if part.dtype == "fp4_e2m1" else stored,
            scales,
            part.block,
            global_scale=None if outer is None else outer.float().reshape(()),
            codebook=codebook_of(part.dtype),
            act_scale=None if act_scale is None else act_scale.float().reshape(()),
            act_zero=None if act_zero is None else act_zero.to(torch.int16).reshape(()),
        )

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`. The zero points of symmetric layers, which Quark writes as zeros, are left out.

        :raises CannotEncode: for numbers that Quark has no tensor for, or FP4 with an odd K.
        """
        weight = _storable(weight)
        part = _part(quant.scheme)
        if weight.scheme != quant.scheme or weight.block != part.block or layout_of(part) != quant.layout:
            raise CannotEncode(
                f"a weight of scheme {weight.scheme} was given; the layer is to be stored as {quant.layout} {quant.scheme}"
            )
        packed = part.dtype == "fp4_e2m1"
        if packed and weight.k % 2:
            raise CannotEncode(
                f"a weight with {weight.k} columns was given; {quant.layout} stores two in a byte, so leave the layer at 16 bit"
            )
        name = _Names(quant)
        shape = {"tensor": (), "channel": (weight.n,)}.get(part.granularity, tuple(weight.scales.shape))
        tensors = {
            "weight": pack(weight.codes, 4, torch.uint8) if packed else weight.codes.contiguous(),
            name("weight_scale"): weight.scales.reshape(shape).contiguous(),
        }
        local = weight.scheme.act is not None and weight.scheme.act.dynamic == "local"
        for value, stored in (
            (weight.global_scale, "weight_scale_2"),
            (weight.act_scale, "input_scale_2" if local else "input_scale"),
        ):
            if value is not None:
                tensors[name(stored)] = _scalar(value, stored)
        if weight.act_zero is not None:
            zero = int(weight.act_zero)
            if not -128 <= zero <= 127:
                raise CannotEncode(f"an activation zero point of {zero} was given; Quark stores int8, so calibrate again")
            tensors[name("input_zero_point")] = weight.act_zero.reshape(()).to(torch.int8)
        return tensors

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """The layout of the weight's number type."""
        weight = _storable(weight)
        scheme = replace(weight.scheme, kv=None)
        return LayerQuant(scheme, layout_of(_part(scheme)))

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """See :func:`qplug_rocm.config.write`."""
        return write(layers)

    def kv_tensors(self, attention: str) -> Mapping[str, str | tuple[str, ...]]:
        """Outputs of the key and value projections, as Quark names them; ``k_scale`` where the export merged them."""
        return {
            f"{p}_scale": (
                f"{attention}.{p}_proj.output_scale",
                f"{attention}.{p}_proj.output_quantizer.scale",
                f"{attention}.{p}_scale",
            )
            for p in ("k", "v", "q")
        }


def _part(scheme: QuantScheme) -> TensorQuant:
    part = scheme.weight
    assert part is not None, "a layer that stays 16 bit has no Quark tensors"
    return part


class _Names:
    """Stored names of one layer's tensors by their usual names."""

    def __init__(self, quant: LayerQuant) -> None:
        table = TWO_LEVEL if quant.layout == "quark_nvfp4" else NAMES
        self._table = table if quant.opt("names") == "internal" else {}

    def __call__(self, name: str) -> str:
        return self._table.get(name, name)


def _axes(part: TensorQuant) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    match part.granularity:
        case "tensor":
            return (), (("1",), ("1", "1"))
        case "channel":
            return ("N",), (("N", "1"),)
        case "group":
            return ("N", f"ceil(K/{part.block[1]})"), ()
    rows, columns = part.block
    return (f"ceil(N/{rows})", f"ceil(K/{columns})"), ()


def _scalar(value: Tensor, what: str) -> Tensor:
    if value.numel() != 1:
        raise CannotEncode(
            f"a {what} {list(value.shape)} was given; one number for the tensor is stored, so store the parts one by one"
        )
    return value.float().reshape(())


def _check_scales(scales: Tensor) -> None:
    bad = scales == 255 if scales.dtype == torch.uint8 else scales.float().isnan()
    if bool(bad.any()):
        raise DecodeError(
            f"{int(bad.sum())} of {bad.numel()} scales of the weight are NaN; fetch the file again, or quantize the layer again"
        )


def _check_symmetric(zeros: Tensor | None, what: str) -> None:
    if zeros is not None and bool((zeros != 0).any()):
        raise DecodeError(
            f"{what}_zero_point has values from {int(zeros.min())} to {int(zeros.max())} where the config says symmetric; correct symmetric in it"
        )


def _storable(weight: QuantWeight | OpaqueWeight) -> QuantWeight:
    """``weight``, where its scheme and its fields are those that Quark has specs and tensors for."""
    if isinstance(weight, OpaqueWeight) or weight.experts is not None:
        what = "an opaque encoding" if isinstance(weight, OpaqueWeight) else "a stack of experts"
        raise CannotEncode(
            f"{what} was given; Quark stores one matrix for each module, so choose another format or store it part by part"
        )
    scheme = weight.scheme
    extra = weight.tensors().keys() - OWN
    if extra or weight.global_div or weight.act_div:
        what = ", ".join(sorted(extra)) or "a global scale that divides"
        raise CannotEncode(f"a weight with {what} was given; Quark has no tensor for it, so choose another format")
    reason = "scales, groups or activations of this kind have no Quark spec"
    if scheme.weight is not None and not scheme.act_order and not scheme.sparsity:
        try:
            specs = layer_config(scheme)
            if (weight_quant(specs["weight"], "weight"), input_quant(specs["input_tensors"], "input_tensors")) == (
                scheme.weight,
                scheme.act,
            ):
                return weight
        except (ConfigError, StopIteration) as error:
            reason = str(error) or reason
    raise CannotEncode(f"scheme {scheme} was given; {reason}, so choose another format")
