"""Quantizer: an algorithm that makes a QuantWeight from a 16-bit weight. Round to nearest is core's; others are plugins'."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import SchemeError
from .scheme import NUMBER_TYPES, QuantScheme, TensorQuant
from .weight import E2M1, QuantWeight, concat

if TYPE_CHECKING:
    from collections.abc import Mapping

CHUNK = 2**20
"""Elements that are quantized at once: float32 copies of more would cost more memory than the layer itself."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, arXiv:2305.14314, appendix E)."""

FP4_BNB = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
"""Magnitudes of bitsandbytes' 4-bit float by the three low bits of a code; bit 3 is the sign."""

IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Values of llama.cpp's non-linear 4-bit codes (``kvalues`` of the gguf package)."""


def codebook_of(dtype: str) -> Tensor | None:
    """float32 values by code of a number type that has a codebook, else None."""
    if dtype == "fp4_e2m1":
        return torch.tensor(E2M1)
    if dtype == "nf4":
        return torch.tensor(NF4)
    if dtype == "iq4nl":
        return torch.tensor(IQ4_NL, dtype=torch.float32)
    if dtype == "fp4_bnb":
        return torch.tensor([*FP4_BNB, *(-v for v in FP4_BNB)])
    return None


class Quantizer(ABC):
    """One algorithm. ``quantize`` is pure: the same weight and statistics give the same bits."""

    @abstractmethod
    def quantize(self, weight: Tensor, scheme: QuantScheme, stats: Mapping[str, Tensor] | None = None) -> QuantWeight:
        """The weight ``[N, K]`` (any float dtype) in ``scheme``.

        ``stats``: what calibration gathered for this layer (``hessian [K, K]``, ``act_amax [K]``); None for algorithms
        that look at the weight alone.

        :raises SchemeError: for a scheme that this algorithm does not make.
        """


@dataclass(frozen=True)
class RoundToNearest(Quantizer):
    """Nearest code under a scale from the extreme values of each block; no calibration.

    Symmetric integers: scale = amax / ((2**b - 1) / 2), codes in [-2**(b-1), 2**(b-1) - 1] (the rule of GPTQ and
    compressed-tensors). Asymmetric: the range always includes 0, scale = (max - min) / (2**b - 1), zero =
    round(-min / scale). Floats: scale = amax / largest. NVFP4: global scale amax / (6 * 448), block scales rounded to e4m3.
    MX: the exponent of amax, rounded up where amax would not fit. Ties go to even codes. Scales are rounded to ``scale_dtype`` before they
    are used.
    """

    scale_dtype: torch.dtype = torch.float32

    def quantize(self, weight: Tensor, scheme: QuantScheme, stats: Mapping[str, Tensor] | None = None) -> QuantWeight:
        """See :class:`Quantizer`; ``stats`` is not looked at."""
        part = scheme.weight
        if part is None:
            raise SchemeError(f"scheme {scheme} leaves weights at 16 bit; there is nothing to quantize")
        if part.dtype in ("ccq2", "fp16") or scheme.act_order or scheme.sparsity:
            raise SchemeError(f"round to nearest does not make {scheme}; choose an algorithm of a plugin")
        if scheme.act is not None and scheme.act.dynamic is not True:
            raise SchemeError(
                f"{scheme} has stored activation scales, which need calibration; use a dynamic scheme, or calibrate"
            )
        if not bool(torch.isfinite(weight.sum(dtype=torch.float32))) and not bool(torch.isfinite(weight).all()):
            raise SchemeError("the weight has NaN or infinite values, which no scheme can hold; repair the checkpoint")
        bn = part.block[0]
        if bn == 0 or part.scale_dtype == "e4m3" or weight.numel() <= CHUNK:
            return self._quantize(weight, scheme, part)
        # Scales do not look beyond their rows, so pieces give the same bits and need little memory.
        step = -(-CHUNK // weight.shape[1] // bn) * bn
        return concat([self._quantize(weight[i : i + step], scheme, part) for i in range(0, weight.shape[0], step)])

    def _quantize(self, weight: Tensor, scheme: QuantScheme, part: TensorQuant) -> QuantWeight:
        n, k = weight.shape
        bn, bk = part.block
        blocks, restore = _blocked(weight.float(), bn or n, bk or k)
        if NUMBER_TYPES[part.dtype].kind == "int":
            return self._integers(blocks, restore, scheme, part)
        return self._floats(blocks, restore, scheme, part)

    def _integers(self, blocks: Tensor, restore: _Restore, scheme: QuantScheme, part: TensorQuant) -> QuantWeight:
        levels = 2**part.bits - 1
        low = 2 ** (part.bits - 1)
        if part.symmetric:
            scales = self._round(blocks.abs().amax((1, 3)) / (levels / 2))
            codes = torch.round(blocks / _safe(scales)[:, None, :, None]).clamp(-low, low - 1)
            return QuantWeight(scheme, restore(codes).to(torch.int8), scales, part.block)
        top = blocks.amax((1, 3)).clamp(min=0)
        bottom = blocks.amin((1, 3)).clamp(max=0)
        scales = self._round((top - bottom) / levels)
        zeros = torch.round(-bottom / _safe(scales)).clamp(0, levels)
        codes = torch.round(blocks / _safe(scales)[:, None, :, None] + zeros[:, None, :, None]).clamp(0, levels)
        return QuantWeight(scheme, restore(codes).to(torch.uint8), scales, part.block, zeros=zeros.to(torch.int16))

    def _floats(self, blocks: Tensor, restore: _Restore, scheme: QuantScheme, part: TensorQuant) -> QuantWeight:
        largest = NUMBER_TYPES[part.dtype].largest
        amax = blocks.abs().amax((1, 3))
        global_scale = None
        if part.scale_dtype == "e8m0":
            exponents = torch.ceil(torch.log2(_safe(amax) / largest)).clamp(-127, 127)
            exponents = exponents.masked_fill(amax == 0, -127)
            scales = (exponents + 127).to(torch.uint8)
            factors = torch.ldexp(torch.ones_like(exponents), exponents.int())
        elif part.scale_dtype == "e4m3":
            global_scale = _safe(amax.amax() / (largest * 448.0))
            scales = (amax / (largest * global_scale)).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn)
            factors = scales.float() * global_scale
        else:
            scales = self._round(amax / largest)
            factors = scales.float()
        scaled = blocks / _safe(factors)[:, None, :, None]
        codebook = codebook_of(part.dtype)
        if codebook is not None:
            codes = restore(_nearest(scaled, codebook))
        else:
            dtype = torch.float8_e4m3fn if part.dtype == "fp8_e4m3" else torch.float8_e5m2
            codes = restore(scaled.clamp(-largest, largest)).to(dtype)
        return QuantWeight(scheme, codes, scales, part.block, global_scale=global_scale, codebook=codebook)

    def _round(self, scales: Tensor) -> Tensor:
        """Scales as they will be stored. One that underflows to 0 becomes the smallest that does not."""
        rounded = scales.to(self.scale_dtype)
        tiny = torch.finfo(self.scale_dtype).tiny
        return torch.where((scales > 0) & (rounded == 0), torch.full_like(rounded, tiny), rounded)


@dataclass(frozen=True)
class _Restore:
    """Turns blocks ``[rows, bn, columns, bk]`` back into a matrix ``[N, K]`` without the padding."""

    n: int
    k: int

    def __call__(self, blocks: Tensor) -> Tensor:
        rows, bn, columns, bk = blocks.shape
        return blocks.reshape(rows * bn, columns * bk)[: self.n, : self.k].contiguous()


def _blocked(values: Tensor, bn: int, bk: int) -> tuple[Tensor, _Restore]:
    """A matrix as ``[ceil(N/bn), bn, ceil(K/bk), bk]``, ragged ends padded with zeros, which change no extreme value."""
    n, k = values.shape
    rows, columns = -(-n // bn), -(-k // bk)
    padded = torch.nn.functional.pad(values, (0, columns * bk - k, 0, rows * bn - n))
    return padded.view(rows, bn, columns, bk), _Restore(n, k)


def _safe(scales: Tensor) -> Tensor:
    """Scales to divide by: a block of zeros has scale 0, and any divisor gives code 0."""
    scales = scales.float()
    return scales.masked_fill(scales == 0, 1.0)


def _nearest(values: Tensor, codebook: Tensor) -> Tensor:
    """Codes uint8 of the nearest codebook values; a tie takes the even code of the sorted magnitudes."""
    values = values.contiguous()
    order = torch.argsort(codebook, stable=True)
    ordered = codebook[order]
    middles = (ordered[1:] + ordered[:-1]) / 2
    upper = torch.bucketize(values, middles, right=True)
    lower = torch.bucketize(values, middles, right=False)
    tied = upper != lower
    even = torch.where(order[lower] % 2 == 0, lower, upper)
    chosen = order[torch.where(tied, even, lower)]
    if codebook.numel() == len(E2M1) and float(codebook[1]) == 0.5:
        # -0.0 and 0.0 sort as equals: the sign of the value decides between codes 0 and 8.
        zero = (chosen == 0) | (chosen == 8)
        chosen = torch.where(zero, torch.where(values < 0, 8, 0), chosen)
    return chosen.to(torch.uint8)


def online_scheme(scheme: QuantScheme, k: int) -> QuantScheme:
    """``scheme`` for a layer of ``k`` columns: a group larger than the layer is the whole row."""
    part = scheme.weight
    if part is None or part.block[0] != 1 or part.block[1] <= k:
        return scheme
    return replace(scheme, weight=replace(part, block=(1, 0)))
