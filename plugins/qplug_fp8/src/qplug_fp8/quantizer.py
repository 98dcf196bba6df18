"""FP8 e4m3 by the scale rules of serving engines. Core's round to nearest divides by amax / 448; these give other bits.

======================= ========================================= ===================== ======================================
quantizer               scale                                     codes                 same as
======================= ========================================= ===================== ======================================
:class:`Reciprocal`     1 / (448 / amax)                          w * (448 / amax)      transformers, FastDeploy (block)
:class:`DeepGemm`       amax / 448, amax at least 1e-4            w * (448 / amax)      DeepGEMM, vLLM, RTP-LLM (block)
:class:`UE8M0`          2**ceil(log2(amax / 448)), amax >= 1e-4   w / scale             DeepGEMM, TensorRT-LLM on Blackwell
:class:`Floored`        amax / 448, at least 1 / (448 * 512) by   w / scale             RTP-LLM
                        tensor; amax at least 1e-4 by channel
======================= ========================================= ===================== ======================================
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from qplug_core.errors import SchemeError
from qplug_core.quantizer import Quantizer
from qplug_core.scheme import QuantScheme, TensorQuant
from qplug_core.weight import QuantWeight

LARGEST = 448.0


class _FP8Rule(Quantizer):
    """e4m3 codes from the extreme value of each block."""

    granularities: ClassVar[tuple[str, ...]] = ("block", "group")
    scale_dtype: ClassVar[str] = "float"

    def quantize(self, weight: Tensor, scheme: QuantScheme, stats: Mapping[str, Tensor] | None = None) -> QuantWeight:
        """``weight [N, K]`` as e4m3 codes with float32 scales (E8M0 bytes where the scheme says so); ``stats`` is not looked at.

        :raises SchemeError: for a scheme that this rule does not make, and for weights that are not finite.
        """
        part = scheme.weight
        if (
            part is None
            or part.dtype != "fp8_e4m3"
            or part.granularity not in self.granularities
            or part.scale_dtype != self.scale_dtype
        ):
            raise SchemeError(
                f"scheme {scheme} was asked for; this rule makes e4m3 by {' or '.join(self.granularities)} with {self.scale_dtype} "
                "scales, so choose another algorithm"
            )
        if scheme.act is not None and not scheme.act.dynamic:
            raise SchemeError(
                f"scheme {scheme} has static activation scales, which need calibration; choose a dynamic scheme"
            )
        if not bool(torch.isfinite(weight).all()):
            raise SchemeError("the weight has NaN or infinite values, which FP8 cannot hold; repair the checkpoint")
        n, k = weight.shape
        bn, bk = part.block[0] or n, part.block[1] or k
        rows, columns = -(-n // bn), -(-k // bk)
        # Zeros at the ragged ends change no extreme value.
        padded = torch.nn.functional.pad(weight.float(), (0, columns * bk - k, 0, rows * bn - n)).view(rows, bn, columns, bk)
        scaled, scales = self._scaled(padded, padded.abs().amax((1, 3), keepdim=True), part)
        codes = scaled.clamp(-LARGEST, LARGEST).reshape(rows * bn, columns * bk)[:n, :k]
        return QuantWeight(scheme, codes.to(torch.float8_e4m3fn), scales.reshape(rows, columns), part.block)

    @abstractmethod
    def _scaled(self, blocks: Tensor, amax: Tensor, part: TensorQuant) -> tuple[Tensor, Tensor]:
        """Blocks ``[rows, bn, columns, bk]`` in units of their scales, and the scales to store, from ``amax [rows, 1, columns, 1]``."""


class Reciprocal(_FP8Rule):
    """transformers and FastDeploy: the factor is rounded, then inverted. A block of zeros has scale 1."""

    def _scaled(self, blocks: Tensor, amax: Tensor, part: TensorQuant) -> tuple[Tensor, Tensor]:
        factor = (LARGEST / amax).masked_fill(amax == 0, 1.0)
        return blocks * factor, 1.0 / factor


class DeepGemm(_FP8Rule):
    """DeepGEMM's ``per_block_cast_to_fp8``."""

    def _scaled(self, blocks: Tensor, amax: Tensor, part: TensorQuant) -> tuple[Tensor, Tensor]:
        amax = amax.clamp(min=1e-4)
        return blocks * (LARGEST / amax), amax / LARGEST


class UE8M0(_FP8Rule):
    """Powers of two that are large enough for amax: dividing by them is exact."""

    scale_dtype = "e8m0"

    def _scaled(self, blocks: Tensor, amax: Tensor, part: TensorQuant) -> tuple[Tensor, Tensor]:
        mantissa, exponent = torch.frexp(amax.clamp(min=1e-4) / LARGEST)
        # frexp is exact where log2 is not: a power of two has mantissa 0.5 and is its own ceiling.
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)
        return torch.ldexp(blocks, -exponent), (exponent + 127).to(torch.uint8)


class Floored(_FP8Rule):
    """RTP-LLM by tensor and by channel."""

    granularities = ("tensor", "channel")

    def _scaled(self, blocks: Tensor, amax: Tensor, part: TensorQuant) -> tuple[Tensor, Tensor]:
        by_tensor = part.granularity == "tensor"
        scales = (amax / LARGEST).clamp(min=1.0 / (LARGEST * 512.0)) if by_tensor else amax.clamp(min=1e-4) / LARGEST
        return blocks / scales, scales
