"""The reference kernel: dequantize, then multiply. It takes every scheme, on every device, for every dtype."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..device import Device
from ..kernel import Kernel, PackedWeight, Problem
from ..support import Refusal
from ..weight import ROW_CHUNK, OpaqueWeight, QuantWeight
from .activation import quantize_activation


class ReferenceLinear(Kernel):
    """Linear layers, lm_head and single experts.

    In float32 everything is exact but the summation. In 16 bit it is the arithmetic of the producers: the
    weight rounded once, activations quantized in their own dtype, and ``torch.nn.functional.linear``.
    """

    name = "core.reference_linear"

    def supports(self, problem: Problem, device: Device) -> list[Refusal]:
        """Nothing is refused: this is the floor under every other kernel."""
        return []

    def pack(self, weight: QuantWeight | OpaqueWeight, out: PackedWeight | None = None) -> PackedWeight:
        """The weight itself: codes stay one byte each."""
        tensors = weight.tensors() if isinstance(weight, QuantWeight) else dict(weight.stored)
        packed = PackedWeight(self.name, weight.n, weight.k, tensors, {"weight": weight})
        if out is None:
            return packed
        # The hub's fields are views of the packed tensors, so they must look at the storage that stays.
        refilled = out.refill(packed)
        refilled.meta = {"weight": _with_tensors(weight, refilled.tensors)}
        return refilled

    def apply(self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """``x [*, K]`` to ``[*, N]``."""
        weight: QuantWeight | OpaqueWeight = packed.meta["weight"]
        flat = x.reshape(-1, x.shape[-1])
        if weight.act_shift is not None:
            flat = flat - weight.act_shift.to(flat.dtype)
        if weight.pre_scale is not None:
            flat = flat * weight.pre_scale.to(flat.dtype)
        act = weight.scheme.act
        if act is not None:
            flat = quantize_dequantize(flat, weight)
        y = _product(flat, weight, bias)
        return y.view(*x.shape[:-1], weight.n)


def quantize_dequantize(x: Tensor, weight: QuantWeight | OpaqueWeight) -> Tensor:
    """x ``[M, K]`` through the activation quantization of ``weight.scheme`` and back, in x's dtype."""
    act = weight.scheme.act
    assert act is not None
    # LLM.int8: an outlier is no part of its token's scale, and its column is not quantized (arXiv:2208.07339, section 3.2).
    outliers = x.abs() >= act.outlier if act.outlier else None
    inner = x if outliers is None else x.masked_fill(outliers, 0)
    quantized = quantize_activation(inner, act, weight.act_scale, weight.act_zero, weight.act_div)
    # A NaN has no integer code. It must come out as NaN, not as the code that stands for it.
    values = torch.where(x.isnan(), x, quantized.dequantize(x.dtype))
    return values if outliers is None else torch.where(outliers.any(0), x, values)


def _product(x: Tensor, weight: QuantWeight | OpaqueWeight, bias: Tensor | None) -> Tensor:
    """The bias is added before the one rounding to 16 bit, as every producer's forward does."""
    bias = None if bias is None else bias.to(x.dtype)
    if isinstance(weight, OpaqueWeight) or weight.n <= ROW_CHUNK:
        return torch.nn.functional.linear(x, weight.dequantize(x.dtype), bias)
    pieces = []
    for start in range(0, weight.n, ROW_CHUNK):
        stop = min(start + ROW_CHUNK, weight.n)
        rows = weight.narrow(n=(start, stop)).dequantize(x.dtype)
        pieces.append(torch.nn.functional.linear(x, rows, None if bias is None else bias[start:stop]))
    return torch.cat(pieces, dim=-1)


def _with_tensors(weight: QuantWeight | OpaqueWeight, tensors: dict[str, Tensor]) -> QuantWeight | OpaqueWeight:
    return replace(weight, stored=tensors) if isinstance(weight, OpaqueWeight) else weight.with_tensors(tensors)


class ReferenceExperts(ReferenceLinear):
    """One projection of one expert; routing and the sum over experts are the engine's."""

    name = "core.reference_experts"
