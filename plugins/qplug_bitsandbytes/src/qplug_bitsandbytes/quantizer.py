"""LLM.int8: the rule by which bitsandbytes makes INT8 weights (arXiv:2208.07339)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qplug_core.errors import SchemeError
from qplug_core.quantizer import Quantizer
from qplug_core.scheme import QuantScheme
from qplug_core.weight import QuantWeight


class LLMInt8(Quantizer):
    """Symmetric, one scale for each row: amax / 127, codes of w * (127 / amax), ties to even, in [-127, 127].

    bitsandbytes rounds weights to float16 first, so a bfloat16 weight below 6e-5 may have another code there.
    """

    def quantize(self, weight: Tensor, scheme: QuantScheme, stats: Mapping[str, Tensor] | None = None) -> QuantWeight:
        """``weight [N, K]`` as int8 codes and float32 scales ``[N, 1]``; ``stats`` is not looked at.

        :raises SchemeError: for anything but symmetric int8 by channel, and for weights that are not finite.
        """
        part = scheme.weight
        if part is None or (part.dtype, part.granularity, part.symmetric) != ("int8", "channel", True):
            raise SchemeError(
                f"scheme {scheme} was asked for; LLM.int8 makes symmetric W8 by channel, so choose another algorithm"
            )
        if scheme.act is not None and not scheme.act.dynamic:
            raise SchemeError(
                f"scheme {scheme} has static activation scales, which need calibration; choose a dynamic scheme"
            )
        if not bool(torch.isfinite(weight).all()):
            raise SchemeError("the weight has NaN or infinite values, which int8 cannot hold; repair the checkpoint")
        amax = weight.abs().amax(dim=1, keepdim=True).float()
        # A row whose factor overflows (127 / amax) has no code but 0 in float32.
        factors = (127.0 / amax).nan_to_num(posinf=0.0)
        codes = torch.round(weight * factors).clamp(-127, 127)
        return QuantWeight(scheme, codes.to(torch.int8), amax / 127.0, part.block)
