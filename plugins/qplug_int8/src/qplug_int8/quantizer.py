"""INT8 by rules that differ from core's (scale amax / 127.5): the same weight gives other codes and other scales."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from qplug_core.errors import SchemeError
from qplug_core.quantizer import Quantizer
from qplug_core.scheme import QuantScheme
from qplug_core.weight import QuantWeight


class _ChannelInt8(Quantizer):
    """Symmetric INT8 with one scale for each row, in the dtype of the weight."""

    divisor: float

    def quantize(self, weight: Tensor, scheme: QuantScheme, stats: Mapping[str, Tensor] | None = None) -> QuantWeight:
        """``weight [N, K]`` as int8 codes and scales ``[N, 1]``; ``stats`` is not looked at.

        :raises SchemeError: for anything but symmetric int8 by channel, and for weights that are not finite.
        """
        part = scheme.weight
        if part is None or (part.dtype, part.granularity, part.symmetric) != ("int8", "channel", True):
            raise SchemeError(
                f"scheme {scheme} was asked for; this rule makes symmetric W8 by channel, so choose another algorithm"
            )
        if scheme.act is not None and not scheme.act.dynamic:
            raise SchemeError(
                f"scheme {scheme} has static activation scales, which need calibration; choose a dynamic scheme"
            )
        if not bool(torch.isfinite(weight).all()):
            raise SchemeError("the weight has NaN or infinite values, which int8 cannot hold; repair the checkpoint")
        amax = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-8)
        scales = (amax / self.divisor).to(weight.dtype)
        # A row that underflows in 16 bit would be divided by zero.
        scales = torch.where(scales == 0, torch.finfo(weight.dtype).tiny, scales)
        return QuantWeight(scheme, self._codes(weight, amax, scales).to(torch.int8), scales, part.block)

    @abstractmethod
    def _codes(self, weight: Tensor, amax: Tensor, scales: Tensor) -> Tensor:
        """Integers in the range of the rule. ``amax [N, 1]`` float32, ``scales [N, 1]`` as they are stored."""


class Amax128(_ChannelInt8):
    """RTP-LLM: scale amax / 128, ties to even, codes [-128, 127]. The positive extreme loses 1/128, the negative is exact."""

    divisor = 128.0

    def _codes(self, weight: Tensor, amax: Tensor, scales: Tensor) -> Tensor:
        return torch.round(weight.float() / scales.float()).clamp(-128, 127)


class ExpertsInt8(_ChannelInt8):
    """vLLM's ``experts_int8``: scale amax / 127, ties to even, codes [-127, 127], all in the dtype of the weight.

    A 16-bit quotient has few bits behind the point (bfloat16: one, from 64 on), so most codes are rounded twice.
    """

    divisor = 127.0

    def _codes(self, weight: Tensor, amax: Tensor, scales: Tensor) -> Tensor:
        return torch.round(weight / scales).clamp(-127, 127)
