"""The AWQ checkpoint format, as AutoAWQ, GPTQModel and llm-awq write it: stored tensors, decode, encode.

Of one layer ``[N, K]`` with ``b`` bits and groups of ``g`` columns (G of them), by layout:

============== ==================== ======= ====================================================================
awq_gemm       b = 4 or 8; N a multiple of 8
qweight        [K, N*b/32]          int32   codes, packed along N, eight in the order 0, 2, 4, 6, 1, 3, 5, 7
qzeros         [G, N*b/32]          int32   zero points, packed likewise
scales         [G, N]               float
awq_gemv       b = 4; K a multiple of 8
qweight        [N, K/8]             int32   codes, packed along K in their order
qzeros         [N, P]               int32   zero points, packed along the groups in their order
scales         [N, 8*P]             float   P = ceil(G/8), rounded up to 2 for g = 64 and 4 for g = 32; or [N, G]
awq_gemv_fast  b = 4; N a multiple of 4, K of 64
qweight        [N/4, K]             int16   codes of four rows, interleaved
qzeros         [8*P, N]             float   -(scale * zero point); llm-awq calls it ``scaled_zeros``
scales         [8*P, N]             float
awq_marlin     b = 4, symmetric; K a multiple of 16, N of 64
qweight        [K/16, 2*N]          int32   codes + 8, permuted for tensor cores
scales         [G, N]               float   permuted likewise
all
input_scale    [] or [1]            float32 static activation scale, where the scheme has one
pre_quant_scale [K]                 float   multiplies x; option ``pre_quant_scale``
============== ==================== ======= ====================================================================

``w[n, k] = scales[g(k), n] * (q[n, k] - z[g(k), n])``: the zero point is stored as it is (GPTQ's first version stores it minus
one). Symmetric layers have ``2**(b-1)`` everywhere.
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
from qplug_core.scheme import TensorQuant
from qplug_core.weight import OpaqueWeight, QuantWeight

from .config import parse
from .layouts import LAYOUTS, Grid, part_of
from .write import write

if TYPE_CHECKING:
    from qplug_core.source import Source


class AWQFormat(CheckpointFormat):
    """The layouts above. Options: ``pre_quant_scale`` (default False), ``zeros`` (name of that tensor in awq_gemv_fast)."""

    name = "awq"

    def parse(self, source: Source) -> QuantizationConfig:
        """See :func:`qplug_awq.config.parse`."""
        return parse(source)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The tensors of the table above that this layout and scheme have."""
        stored = list(LAYOUTS[quant.layout].tensors(quant))
        act = quant.scheme.act
        if act is not None and not act.dynamic:
            stored.append(StoredTensor("input_scale", (), ("F32",), alt=(("1",),)))
        if quant.opt("pre_quant_scale", False):
            # Layers behind a norm have it folded into that norm.
            stored.append(StoredTensor("pre_quant_scale", ("K",), FLOATS, optional=True))
        return tuple(stored)

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """Codes ``[N, K]``: int8 where the scheme is symmetric, else uint8 with int16 zeros ``[N, G]``.

        :raises DecodeError: where a symmetric layer has other zero points, scaled zeros are no multiples of their scales, or an
            activation scale is not a positive number.
        """
        part = part_of(quant)
        grid = LAYOUTS[quant.layout].decode(tensors, quant, n, k)
        codes, zeros = grid.codes, grid.zeros
        if part.symmetric:
            middle = 2 ** (part.bits - 1)
            if zeros is not None:
                _check_symmetric(zeros, middle)
            # In uint8 this wraps round, which is the two's complement that is wanted.
            codes, zeros = codes.sub_(middle).view(torch.int8), None
        act_scale = tensors.get("input_scale")
        if act_scale is not None and not 0 < float(act_scale) < float("inf"):
            raise DecodeError(
                f"input_scale is {float(act_scale)}; a positive finite number was needed, so calibrate the checkpoint again"
            )
        return QuantWeight(
            quant.scheme,
            codes,
            grid.scales,
            part.block,
            zeros=None if zeros is None else zeros.to(torch.int16),
            pre_scale=tensors.get("pre_quant_scale"),
            act_scale=None if act_scale is None else act_scale.reshape(()),
        )

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`.

        :raises CannotEncode: for numbers that are not ``(q - z) * scale`` with integers of the layout's range, or a shape
            that the layout cannot pack.
        """
        weight = _affine(weight)
        part = part_of(quant)
        if weight.scheme != quant.scheme or weight.block != part.block:
            raise CannotEncode(f"a weight of scheme {weight.scheme} was given; the layer is to be stored as {quant.scheme}")
        if weight.pre_scale is not None and not quant.opt("pre_quant_scale", False):
            raise CannotEncode("a weight with pre_scale was given; store it with the option pre_quant_scale")
        middle = 2 ** (part.bits - 1)
        codes = weight.codes.view(torch.uint8).add(middle) if part.symmetric else weight.codes
        zeros = (
            torch.full(weight.scales.shape, middle, dtype=torch.uint8) if part.symmetric else _storable_zeros(weight, part)
        )
        tensors = LAYOUTS[quant.layout].encode(Grid(codes, weight.scales, zeros), quant)
        if weight.act_scale is not None:
            tensors["input_scale"] = weight.act_scale.reshape(())
        if weight.pre_scale is not None:
            tensors["pre_quant_scale"] = weight.pre_scale.contiguous()
        return tensors

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """``awq_gemm``, which every reader knows; the other layouts are written on request.

        :raises CannotEncode: where AWQ has no tensors for it.
        """
        weight = _affine(weight)
        part = weight.scheme.weight
        assert part is not None
        if not part.symmetric:
            _storable_zeros(weight, part)
        opts = () if weight.pre_scale is None else (("pre_quant_scale", True),)
        return LayerQuant(weight.scheme, "awq_gemm", opts)

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """See :func:`qplug_awq.write.write`."""
        return write(layers)

    def kv_tensors(self, attention: str) -> Mapping[str, str | tuple[str, ...]]:
        """``k_scale`` and ``v_scale`` beside the projections, or in them as TensorRT-LLM's tools have it."""
        return {
            f"{letter}_scale": (f"{attention}.{letter}_scale", f"{attention}.{letter}_proj.{letter}_scale")
            for letter in "kv"
        }


def _check_symmetric(zeros: Tensor, middle: int) -> None:
    if bool((zeros == middle).all()):
        return
    if bool((zeros == middle - 1).all()):
        raise DecodeError(
            f"every stored zero point of a symmetric layer is {middle - 1}, where AWQ has {middle}; GPTQ stores them minus one, "
            "so set quant_method to 'gptq' if the file is GPTQ's, or zero_point to true if it is not"
        )
    raise DecodeError(
        f"stored zero points from {int(zeros.min())} to {int(zeros.max())} were found in a layer that the config calls "
        f"symmetric, which has {middle} everywhere; set zero_point to true in the quantization config"
    )


def _affine(weight: QuantWeight | OpaqueWeight) -> QuantWeight:
    """``weight``, where its scheme and its fields are those that AWQ has tensors for."""
    scheme = weight.scheme
    part, act = scheme.weight, scheme.act
    remedy = "so choose another format"
    if isinstance(weight, OpaqueWeight) or weight.experts is not None:
        what = "an opaque encoding" if isinstance(weight, OpaqueWeight) else "a stack of experts"
        raise CannotEncode(f"{what} was given; awq stores one integer matrix for each module, {remedy}")
    if part is None or part.dtype not in ("int4", "int8") or scheme.act_order or scheme.sparsity:
        raise CannotEncode(f"scheme {scheme} was given; awq stores W4A16, W8A16, W4A8 and W4Afp8, {remedy}")
    if act is not None and (part.bits != 4 or act.dtype not in ("int8", "fp8_e4m3") or not act.symmetric or act.rule):
        raise CannotEncode(f"scheme {scheme} was given; awq stores W4A8 and W4Afp8 by token or static, {remedy}")
    if act is not None and (act.block, act.dynamic) not in (((1, 0), True), ((0, 0), False)):
        raise CannotEncode(f"scheme {scheme} was given; awq stores activations by token, or one static scale, {remedy}")
    if part.block[0] != 1 or part.scale_dtype != "float":
        raise CannotEncode(f"scales by {part.granularity} were given; awq stores one for each row and group, {remedy}")
    extra = weight.tensors().keys() - {"codes", "scales", "zeros", "pre_scale", "act_scale"}
    if extra or weight.act_div:
        what = ", ".join(sorted(extra)) or "an activation divisor"
        raise CannotEncode(f"a weight with {what} was given; awq has no tensor for it, {remedy}")
    return weight


def _storable_zeros(weight: QuantWeight, part: TensorQuant) -> Tensor:
    zeros, top = weight.zeros, 2**part.bits - 1
    if zeros is None or zeros.is_floating_point():
        raise CannotEncode("float zero points were given; awq stores integers, so choose another format")
    low, high = (int(zeros.min()), int(zeros.max())) if zeros.numel() else (0, 0)
    if low < 0 or high > top:
        raise CannotEncode(
            f"zero points from {low} to {high} were given; awq holds 0 to {top}, so choose gptq, whose first version holds "
            f"{top + 1}"
        )
    return zeros.to(torch.uint8)
