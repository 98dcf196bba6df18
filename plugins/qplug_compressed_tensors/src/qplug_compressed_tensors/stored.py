"""Tensors that all layouts share: scales and zero points of weights, and of static activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qplug_core.axes import FLOATS, StoredTensor
from qplug_core.config import LayerQuant
from qplug_core.errors import CannotEncode, DecodeError
from qplug_core.scheme import TensorQuant
from qplug_core.weight import QuantWeight

SCALAR: tuple[tuple[str, ...], ...] = ((), ("1", "1"))
SCALE_DTYPES = {"float": FLOATS, "e4m3": ("F8_E4M3",), "e8m0": ("U8", "F8_E8M0")}


def weight_part(quant: LayerQuant) -> TensorQuant:
    """How the weights of a quantized layer are quantized."""
    part = quant.scheme.weight
    assert part is not None, "a layer that stays 16 bit has no compressed tensors"
    return part


def scale_tensors(quant: LayerQuant) -> list[StoredTensor]:
    """``weight_scale``, ``weight_global_scale`` and ``weight_g_idx``.

    With act order scales are a look-up table, and are read whole.
    """
    part = weight_part(quant)
    axes, alt, whole = scale_axes(quant)
    stored = [StoredTensor("weight_scale", axes, SCALE_DTYPES[part.scale_dtype], whole=whole, alt=alt)]
    if part.scale_dtype == "e4m3":
        stored.append(StoredTensor("weight_global_scale", ("1",), ("F32",), alt=SCALAR))
    if quant.scheme.act_order:
        stored.append(StoredTensor("weight_g_idx", ("K",), ("I32",)))
    return stored


def scale_axes(quant: LayerQuant) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Axes of a tensor with one value for each scale, other shapes it is seen with, and axes that it is never cut along."""
    part = weight_part(quant)
    rows, columns = part.block
    match part.granularity:
        case "tensor":
            return ("1",), SCALAR, ()
        case "channel":
            return ("N", "1"), (("N",),), ()
        case "group":
            return ("N", f"ceil(K/{columns})"), (), ("K",) if quant.scheme.act_order else ()
    return (f"ceil(N/{rows})", f"ceil(K/{columns})"), (), ()


def plain_zeros(quant: LayerQuant) -> StoredTensor | None:
    """``weight_zero_point``, one signed byte for each scale.

    Old files hold it for symmetric weights too, where it is 0 everywhere.
    """
    part = weight_part(quant)
    if not part.dtype.startswith("int"):
        return None
    axes, alt, whole = scale_axes(quant)
    return StoredTensor("weight_zero_point", axes, ("I8",), optional=part.symmetric, whole=whole, alt=alt)


def act_tensors(quant: LayerQuant) -> list[StoredTensor]:
    """``input_scale`` and ``input_zero_point`` of static activations, ``input_global_scale`` of two-level ones."""
    act = quant.scheme.act
    if act is None or act.dynamic is True:
        return []
    if act.dynamic == "local":
        return [StoredTensor("input_global_scale", ("1",), ("F32",), alt=SCALAR)]
    stored = [StoredTensor("input_scale", ("1",), FLOATS, alt=SCALAR)]
    if act.dtype.startswith("int"):
        stored.append(StoredTensor("input_zero_point", ("1",), ("I8",), optional=act.symmetric, alt=SCALAR))
    return stored


def decode_scales(tensors: Mapping[str, Tensor], part: TensorQuant, n: int) -> dict[str, Any]:
    """The hub's ``scales`` ``[N/bn, K/bk]`` and ``global_scale`` ``[]``, which divides.

    :raises DecodeError: for a global scale that is not a positive number.
    """
    scales = tensors["weight_scale"]
    rows = {0: 1, 1: n}.get(part.block[0], scales.shape[0])
    fields: dict[str, Any] = {"scales": scales.reshape(rows, -1)}
    if "weight_global_scale" in tensors:
        fields |= {"global_scale": _positive(tensors, "weight_global_scale"), "global_div": True}
    return fields


def decode_act(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The hub's ``act_scale`` ``[]``, ``act_div`` and ``act_zero`` ``[]``.

    :raises DecodeError: for a scale that is not a positive number, or a zero point of symmetric activations.
    """
    if "input_global_scale" in tensors:
        return {"act_scale": _positive(tensors, "input_global_scale"), "act_div": True}
    if "input_scale" not in tensors:
        return {}
    return {"act_scale": _positive(tensors, "input_scale")}


def decode_act_zero(tensors: Mapping[str, Tensor], act: TensorQuant | None) -> Tensor | None:
    """The hub's ``act_zero`` int16 ``[]``.

    :raises DecodeError: where symmetric activations have one that is not 0.
    """
    zero = tensors.get("input_zero_point")
    if zero is None or act is None:
        return None
    if act.symmetric:
        check_no_zeros(zero, "input_zero_point")
        return None
    return zero.to(torch.int16).reshape(())


def check_no_zeros(zeros: Tensor, name: str) -> None:
    """Refuse a zero point that is not 0 where the config says symmetric.

    :raises DecodeError: with the range that was found.
    """
    if bool(zeros.any()):
        raise DecodeError(
            f"{name} from {int(zeros.min())} to {int(zeros.max())} was found where the config says symmetric, which has 0 "
            "everywhere; set symmetric to false in the quantization config"
        )


def encode_scales(weight: QuantWeight) -> dict[str, Tensor]:
    """The inverse of :func:`decode_scales`; scales by tensor as ``[1]``, by channel as ``[N, 1]``.

    :raises CannotEncode: where the global scale multiplies.
    """
    part = weight.scheme.weight
    assert part is not None
    scales = weight.scales.reshape(1) if part.block == (0, 0) else weight.scales
    tensors = {"weight_scale": scales.contiguous()}
    if weight.global_scale is not None:
        if not weight.global_div or weight.global_scale.numel() != 1:
            found = "one for each row" if weight.global_scale.numel() != 1 else "one that multiplies"
            raise CannotEncode(
                f"{found} was given as global scale; compressed-tensors stores one divisor, and a reciprocal would be rounded, so "
                "store the weight in the modelopt format, or quantize the 16-bit model again"
            )
        tensors["weight_global_scale"] = weight.global_scale.reshape(1).clone()
    return tensors


def encode_act(weight: QuantWeight) -> dict[str, Tensor]:
    """The inverse of :func:`decode_act`.

    A scale goes back into the dtype of the weight's scales where it came from there, as producers have it.

    :raises CannotEncode: where the scale multiplies and the layout has a divisor, or the other way round.
    """
    act, scale = weight.scheme.act, weight.act_scale
    if act is None or act.dynamic is True:
        return {}
    if scale is None:
        raise CannotEncode("static activations without their scale were given; calibrate the model first")
    if weight.act_div != (act.dynamic == "local"):
        raise CannotEncode(
            f"an activation scale that {'divides' if weight.act_div else 'multiplies'} was given; compressed-tensors stores the "
            "other, and a reciprocal would be rounded, so store the weight in the modelopt format, or calibrate again"
        )
    if act.dynamic == "local":
        return {"input_global_scale": scale.reshape(1).clone()}
    dtype = weight.scales.dtype
    narrow = dtype.is_floating_point and dtype.itemsize > 1 and bool(scale.to(dtype).float() == scale)
    tensors = {"input_scale": scale.reshape(1).to(dtype if narrow else torch.float32)}
    if weight.act_zero is not None:
        tensors["input_zero_point"] = weight.act_zero.reshape(1).to(torch.int8)
    return tensors


def _positive(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    value = tensors[name].reshape(()).float()
    if not 0 < float(value) < float("inf"):
        raise DecodeError(
            f"{name} is {float(value)}; a positive finite number was needed, so calibrate the checkpoint again"
        )
    return value
