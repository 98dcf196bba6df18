"""INT8 and INT4 as Paddle makes them at load: codes from the exact scale, whatever the stored one is rounded to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qplug_core.errors import SchemeError
from qplug_core.quantizer import CHUNK, Quantizer
from qplug_core.scheme import QuantScheme
from qplug_core.weight import QuantWeight


class PaddleRound(Quantizer):
    """``scale = amax / 127`` (INT4: / 7) in the dtype of the weight, ``code = round(w / amax * 127)``, ties away from zero.

    All in float32 and in this order; codes are within [-127, 127] ([-7, 7]). A row of zeros has scale 0 and the highest code.
    """

    def quantize(self, weight: Tensor, scheme: QuantScheme, stats: Mapping[str, Tensor] | None = None) -> QuantWeight:
        """``weight [N, K]`` as int8 codes and scales ``[N, 1]``; ``stats`` is not looked at.

        :raises SchemeError: for anything but symmetric weight-only int8 and int4 by channel, and for weights that are not finite.
        """
        part = scheme.weight
        if part is None or (part.granularity, part.symmetric) != ("channel", True) or scheme != QuantScheme(part):
            raise SchemeError(
                f"scheme {scheme} was asked for; this rule makes W8A16 and W4A16_channel, symmetric, so choose another algorithm"
            )
        if part.dtype not in ("int8", "int4"):
            raise SchemeError(f"scheme {scheme} was asked for; this rule makes int8 and int4, so choose another algorithm")
        if not bool(torch.isfinite(weight).all()):
            raise SchemeError(
                f"the weight has NaN or infinite values, which {part.dtype} cannot hold; repair the checkpoint"
            )
        top = float(2 ** (part.bits - 1) - 1)
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        amax = weight.abs().amax(dim=1, keepdim=True).float()
        step = max(1, CHUNK // max(weight.shape[1], 1))
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            # 0 / 0 is NaN, which the minimum of C's fminf turns into the other operand.
            scaled = (weight[rows].float() / amax[rows] * top).nan_to_num(nan=top).clamp(-top, top)
            whole = scaled.trunc()
            # Adding a half would round 0.49999997 up: the sum has no bit for it.
            codes[rows] = (whole + torch.sign(scaled) * ((scaled - whole).abs() >= 0.5)).to(torch.int8)
        return QuantWeight(scheme, codes, (amax / top).to(weight.dtype), part.block)
