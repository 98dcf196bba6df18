"""Round to nearest by the rules of the producers of FP4 and microscaled files: the same weight gives other scales and codes.

MX, for blocks of 32 with extreme value a, leading power p = floor(log2 a), emax 2 (e2m1) or 8 (e4m3):

============ ======================================= ==================== ==========================================
quantizer    exponent                                FP4 ties             same as
============ ======================================= ==================== ==========================================
mx_floor     p - emax                                to even              OCP MX 1.0, 6.3; gpt-oss
mx_ct        floor(log2(a + 2**p / 4)) - emax        to even              compressed-tensors
mx_even      floor(log2(a + 2**p * step)) - emax     to even              Quark; step 1/4 for FP4, 1/16 for FP8
mx_modelopt  ceil(log2(a / largest))                 towards zero         ModelOpt (``rtn`` of core: the same, ties to even)
============ ======================================= ==================== ==========================================

NVFP4: ModelOpt stores the multiplier amax / 2688 and the block scale e4m3(a / (6 * multiplier)), 1 where a block is zero;
compressed-tensors stores the divisor 2688 / amax and the block scale e4m3(divisor * a / 6), 0.125 where that is zero.
Values beyond the largest code saturate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qplug_core.errors import SchemeError
from qplug_core.quantizer import Quantizer, codebook_of
from qplug_core.scheme import NUMBER_TYPES, QuantScheme, TensorQuant
from qplug_core.weight import QuantWeight

BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Middles between the magnitudes of e2m1, by the code below them."""
EMAX = {"fp4_e2m1": 2, "fp8_e4m3": 8}
RANGE = 448.0 * 6.0
"""Largest block scale times largest code: 2688."""


class _Blocks(Quantizer):
    """Blocks of columns, quantized in float32."""

    scale_dtype: str
    unit_input = False

    def quantize(self, weight: Tensor, scheme: QuantScheme, stats: Mapping[str, Tensor] | None = None) -> QuantWeight:
        """``weight [N, K]`` by this rule; ``stats`` is not looked at.

        :raises SchemeError: for another scheme than the rule is for, and for weights that are not finite.
        """
        part = scheme.weight
        if part is None or part.scale_dtype != self.scale_dtype or part.block[0] != 1 or not part.block[1]:
            raise SchemeError(
                f"scheme {scheme} was asked for; this rule makes groups with {self.scale_dtype} scales, so choose another"
            )
        if (
            scheme.act is not None
            and scheme.act.dynamic is not True
            and not (self.unit_input and scheme.act.dynamic == "local")
        ):
            raise SchemeError(
                f"scheme {scheme} has stored activation scales, which need calibration; choose a dynamic scheme"
            )
        if not bool(torch.isfinite(weight).all()):
            raise SchemeError("the weight has NaN or infinite values, which no code holds; repair the checkpoint")
        n, k = weight.shape
        group = part.block[1]
        blocks = torch.nn.functional.pad(weight.float(), (0, -k % group)).view(n, -1, group)
        return self._quantize(blocks, scheme, part, k)

    def _quantize(self, blocks: Tensor, scheme: QuantScheme, part: TensorQuant, k: int) -> QuantWeight:
        raise NotImplementedError

    def _codes(self, blocks: Tensor, factors: Tensor, part: TensorQuant, k: int, ties_down: bool = False) -> Tensor:
        """Codes ``[N, K]`` of blocks ``[N, G, g]`` divided by ``factors [N, G]``."""
        scaled = (blocks / factors.masked_fill(factors == 0, 1.0)[:, :, None]).flatten(1)[:, :k]
        if part.dtype == "fp4_e2m1":
            return e2m1(scaled, ties_down)
        largest = NUMBER_TYPES[part.dtype].largest
        return scaled.clamp(-largest, largest).to(torch.float8_e4m3fn)


class _Exponents(_Blocks):
    """MX: one power of two for each block."""

    scale_dtype = "e8m0"
    ties_down = False

    def _quantize(self, blocks: Tensor, scheme: QuantScheme, part: TensorQuant, k: int) -> QuantWeight:
        amax = blocks.abs().amax(2)
        exponent = self._exponent(amax.masked_fill(amax == 0, 1.0), part.dtype).clamp(-127, 127)
        exponent = exponent.masked_fill(amax == 0, -127)
        factors = torch.ldexp(torch.ones_like(amax), exponent)
        codes = self._codes(blocks, factors, part, k, self.ties_down)
        return QuantWeight(scheme, codes, (exponent + 127).to(torch.uint8), part.block, codebook=codebook_of(part.dtype))

    def _exponent(self, amax: Tensor, dtype: str) -> Tensor:
        """int32 exponents of positive ``amax``."""
        raise NotImplementedError


class MXFloor(_Exponents):
    """OCP Microscaling Formats 1.0, 6.3: the largest power of two in the block, over the largest of the code."""

    def _exponent(self, amax: Tensor, dtype: str) -> Tensor:
        return _leading(amax) - EMAX[dtype]


class MXQuarter(_Exponents):
    """compressed-tensors: mantissas of 1.75 and more count as the next power."""

    def _exponent(self, amax: Tensor, dtype: str) -> Tensor:
        return _leading(_rounded_up(amax, 0.25)) - EMAX[dtype]


class MXEven(_Exponents):
    """Quark, ``scale_calculation_mode`` even: the mantissa is rounded to that of the code before its power is taken."""

    def _exponent(self, amax: Tensor, dtype: str) -> Tensor:
        return _leading(_rounded_up(amax, 0.25 if dtype == "fp4_e2m1" else 0.0625)) - EMAX[dtype]


class MXModelOpt(_Exponents):
    """ModelOpt: the smallest power under which nothing saturates; FP4 ties go towards zero."""

    ties_down = True

    def _exponent(self, amax: Tensor, dtype: str) -> Tensor:
        # amax <= largest * 2**e without a logarithm, which would round amax = largest * 2**e either way.
        quotient = amax / NUMBER_TYPES[dtype].largest
        mantissa, exponent = torch.frexp(quotient)
        return exponent - (mantissa == 0.5).int()


class NVFP4ModelOpt(_Blocks):
    """ModelOpt and RTP-LLM: a stored multiplier."""

    scale_dtype = "e4m3"

    def _quantize(self, blocks: Tensor, scheme: QuantScheme, part: TensorQuant, k: int) -> QuantWeight:
        amax = blocks.abs().amax(2)
        outer = (amax.amax() / RANGE).clamp(min=torch.finfo(torch.float32).tiny)
        inner = (amax / (6.0 * outer)).clamp(2.0**-9, 448.0).masked_fill(amax == 0, 1.0).to(torch.float8_e4m3fn)
        codes = self._codes(blocks, inner.float() * outer, part, k)
        return QuantWeight(scheme, codes, inner, part.block, global_scale=outer, codebook=codebook_of(part.dtype))


class NVFP4UnitInput(NVFP4ModelOpt):
    """RTP-LLM at load: nobody saw activations yet, so their stored scale is 1 and block scales alone fit them.

    Blocks of activations up to 2688 are held; a block below 2**-9 * 6 keeps the smallest scale.
    """

    unit_input = True

    def _quantize(self, blocks: Tensor, scheme: QuantScheme, part: TensorQuant, k: int) -> QuantWeight:
        weight = super()._quantize(blocks, scheme, part, k)
        return replace(weight, act_scale=torch.ones((), device=blocks.device))


class NVFP4Divisor(_Blocks):
    """compressed-tensors: a stored divisor."""

    scale_dtype = "e4m3"

    def _quantize(self, blocks: Tensor, scheme: QuantScheme, part: TensorQuant, k: int) -> QuantWeight:
        amax = blocks.abs().amax(2)
        outer = RANGE / amax.amax()
        outer = torch.where(torch.isfinite(outer), outer, 1.0)
        inner = (outer * amax / 6.0).clamp(max=448.0).to(torch.float8_e4m3fn)
        inner = torch.where(inner.float() == 0, 0.125, inner.float()).to(torch.float8_e4m3fn)
        codes = self._codes(blocks, inner.float() / outer, part, k)
        return QuantWeight(
            scheme, codes, inner, part.block, global_scale=outer, global_div=True, codebook=codebook_of(part.dtype)
        )


def e2m1(values: Tensor, ties_down: bool = False) -> Tensor:
    """uint8 codes of float32 ``values``, nearest; ties to the even code, or towards zero. The sign of a value is kept, of a zero not."""
    bounds = torch.tensor(BOUNDS, device=values.device)
    magnitude = values.abs()
    codes = torch.bucketize(magnitude, bounds, right=False)
    if not ties_down:
        # The codes below 0.75, 1.75 and 3.5 are odd: those ties go up.
        upper = torch.bucketize(magnitude, bounds, right=True)
        codes = torch.where((upper != codes) & (codes % 2 == 1), upper, codes)
    return (codes + 8 * (values < 0)).to(torch.uint8)


def _leading(values: Tensor) -> Tensor:
    """int32 floor(log2 value), exactly."""
    return torch.frexp(values).exponent - 1


def _rounded_up(amax: Tensor, share: float) -> Tensor:
    return amax + torch.ldexp(torch.full_like(amax, share), _leading(amax))
