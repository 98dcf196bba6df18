"""Quantization of activations, by the book. Kernels are held against this in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..quantizer import _nearest, codebook_of
from ..scheme import NUMBER_TYPES, TensorQuant
from ..weight import decode_scales


@dataclass
class QuantActivation:
    """Codes of activations ``x [M, K]``.

    codes
        ``[M, K]``: int8, float8, or uint8 indices of ``codebook``.
    scales
        ``[M, ceil(K/bk)]`` for token and group, ``[1, 1]`` for tensor; in the dtype of the arithmetic, E8M0 as bytes.
    zeros
        Like scales, or None.
    """

    codes: Tensor
    scales: Tensor
    act: TensorQuant
    zeros: Tensor | None = None
    factor: Tensor | None = None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """``[M, K]``: computed and rounded in ``dtype``."""
        codebook = codebook_of(self.act.dtype)
        values = self.codes.to(dtype) if codebook is None else codebook.to(self.codes.device, dtype)[self.codes.long()]
        k = self.codes.shape[1]
        if self.zeros is not None:
            values = values - _columns(self.zeros, self.act, k).to(dtype)
        if self.factor is not None:
            # Two-level scales are float32, and so is a product with them, also where x is not.
            return (values.float() * _columns(self.factor, self.act, k)).to(dtype)
        factor = decode_scales(self.scales, self.act.scale_dtype)
        return values * _columns(factor, self.act, k).to(dtype)


def quantize_activation(
    x: Tensor,
    act: TensorQuant,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    divide: bool = False,
) -> QuantActivation:
    """Quantize ``x [M, K]`` as ``act`` says, in the arithmetic of x's dtype (float32 is the exact one).

    ``scale``: the stored scale of a static or two-level scheme, a divisor if ``divide``. ``zero``: its zero point.
    Integers, symmetric: scale = amax / 127 (``rule="127.5"``: amax / 127.5), codes round to even and clamp to
    [-127, 127] ([-128, 127]). Asymmetric: the range includes 0, scale = (max - min) / 255, zero = round(-128 - min / scale). Floats: amax / largest
    (``rule="ub1200"``: amax is taken as at most 1200, and what lies above saturates).
    """
    blocks = _blocks(x, act)
    if act.dtype.startswith("int"):
        return _integers(x, blocks, act, scale, zero)
    return _floats(x, blocks, act, scale, divide)


def _integers(x: Tensor, blocks: Tensor, act: TensorQuant, scale: Tensor | None, zero: Tensor | None) -> QuantActivation:
    top = 2 ** (act.bits - 1)
    low = -top if act.rule.endswith(".5") or not act.dynamic or not act.symmetric else 1 - top
    zeros = None
    if not act.dynamic:
        assert scale is not None, "a static scheme without its stored scale reached a kernel"
        scales = scale.reshape(1, 1).to(x.dtype)
        zeros = None if zero is None else zero.reshape(1, 1).to(x.dtype)
    elif act.symmetric:
        divisor = top - 0.5 if act.rule.endswith(".5") else top - 1
        scales = blocks.abs().amax(-1) / divisor
    else:
        high, bottom = blocks.amax(-1).clamp(min=0), blocks.amin(-1).clamp(max=0)
        scales = (high - bottom) / (2 * top - 1)
        zeros = torch.round(-top - bottom / _nonzero(scales)).clamp(-top, top - 1)
    scaled = x / _columns(_nonzero(scales), act, x.shape[1])
    if zeros is not None:
        scaled = scaled + _columns(zeros, act, x.shape[1])
    codes = torch.round(scaled).clamp(low, top - 1).nan_to_num(0.0)
    return QuantActivation(codes.to(torch.int8), scales, act, zeros)


def _floats(x: Tensor, blocks: Tensor, act: TensorQuant, scale: Tensor | None, divide: bool) -> QuantActivation:
    largest = NUMBER_TYPES[act.dtype].largest
    factor = None
    if act.scale_dtype == "e8m0":
        scales = _exponents(blocks.abs().amax(-1), act)
        divisor = decode_scales(scales, "e8m0").to(x.dtype)
    elif act.scale_dtype == "e4m3":
        assert scale is not None, "a two-level scheme without its stored global scale reached a kernel"
        outer = scale.float().reshape(1, 1)
        inner = (blocks.abs().amax(-1) / largest).float()
        inner = inner * outer if divide else inner / outer
        scales = inner.clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn)
        factor = scales.float() / outer if divide else scales.float() * outer
        divisor = factor
    elif act.dynamic:
        amax = blocks.abs().amax(-1)
        if act.rule.startswith("ub"):
            amax = amax.clamp(max=float(act.rule[2:]))
        scales = amax / largest
        divisor = _nonzero(scales)
    else:
        assert scale is not None, "a static scheme without its stored scale reached a kernel"
        scales = scale.reshape(1, 1).to(x.dtype)
        scales = scales.reciprocal() if divide else scales
        divisor = scales
    scaled = x / _columns(divisor, act, x.shape[1])
    codebook = codebook_of(act.dtype)
    if codebook is not None:
        codes = _nearest(scaled.float(), codebook.to(x.device))
    else:
        dtype = torch.float8_e4m3fn if act.dtype == "fp8_e4m3" else torch.float8_e5m2
        codes = scaled.clamp(-largest, largest).to(dtype)
    return QuantActivation(codes, scales, act, factor=factor)


def _exponents(amax: Tensor, act: TensorQuant) -> Tensor:
    """E8M0 bytes uint8 of block extremes, by the rule of the producer.

    ``ceil``: the smallest power of two under which amax fits. ``floor`` (OCP MX 1.0, 6.3): floor(log2 amax) - emax.
    ``ct``, and the common rule: as floor, after a quarter of the leading power is added (a mantissa of 1.75 and more rounds up).
    Quark: ``even`` adds half a step of the code (a quarter for FP4, a sixteenth for FP8); ``up`` is ceil(log2 amax) - emax.
    """
    largest = NUMBER_TYPES[act.dtype].largest
    emax = 2 if act.dtype == "fp4_e2m1" else 8
    safe = amax.float().masked_fill(amax == 0, 1.0)
    if act.rule == "ceil":
        exponent = torch.ceil(torch.log2(safe / largest))
    elif act.rule == "up":
        exponent = torch.ceil(torch.log2(safe)) - emax
    else:
        leading = torch.floor(torch.log2(safe))
        if act.rule != "floor":
            share = 0.0625 if act.rule == "even" and emax == 8 else 0.25
            leading = torch.floor(torch.log2(safe + share * torch.exp2(leading)))
        exponent = leading - emax
    exponent = exponent.masked_fill(amax == 0, -127.0).clamp(-127, 127)
    return (exponent + 127).to(torch.uint8)


def _blocks(x: Tensor, act: TensorQuant) -> Tensor:
    """x ``[M, K]`` as ``[M or 1, blocks, width]``, a ragged end repeated so that it changes no extreme value."""
    rows, columns = act.block
    m, k = x.shape
    if rows == 0:
        return x.reshape(1, 1, -1) if x.numel() else x.new_zeros(1, 1, 1)
    width = columns or k
    short = -k % width
    padded = torch.nn.functional.pad(x, (0, short)) if short else x
    return padded.view(m, padded.shape[1] // width, width)


def _columns(grid: Tensor, act: TensorQuant, k: int) -> Tensor:
    """Scales ``[M or 1, blocks]`` for every column, ``[M or 1, K or 1]``."""
    width = act.block[1]
    return grid.repeat_interleave(width, dim=1)[:, :k] if width and grid.shape[1] > 1 else grid


def _nonzero(scales: Tensor) -> Tensor:
    return scales.masked_fill(scales == 0, 1.0)
