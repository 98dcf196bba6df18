"""The reference quantization of a KV cache: what is stored, and what attention reads back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..device import Device
from ..errors import SchemeError
from ..kernel import Problem
from ..quantizer import _nearest, codebook_of
from ..scheme import NUMBER_TYPES, TensorQuant
from ..support import Refusal


@dataclass
class QuantCache:
    """Keys or values ``[B, H, T, D]`` as stored.

    codes
        ``[B, H, T, D]`` int8 or float8, or ``[B, H, T, D/2]`` uint8 where a code has 4 bits (low nibble first).
    scales
        float32 ``[]``, ``[H, 1, 1]`` or ``[B, H, T, G]``, G groups of one head.
    """

    codes: Tensor
    scales: Tensor
    kv: TensorQuant
    depth: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """``[B, H, T, D]``, computed in float32 and rounded to ``dtype``."""
        codes = self.codes
        if self.kv.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)[..., : self.depth]
        codebook = codebook_of(self.kv.dtype)
        if codebook is not None:
            values = codebook.to(codes.device)[codes.long()]
        elif self.kv.bits == 4:
            values = codes.float() - 8
        else:
            values = codes.float()
        return (values * _spread(self.scales, self.kv, self.depth)).to(dtype)


class ReferenceKVCache:
    """Quantizes and reads back a KV cache of any scheme with symmetric codes.

    fp8: scale = amax / largest, integers: scale = amax / (2**(b-1) - 1); dynamic scales are computed for each token
    and head (and group of the head), stored ones are given.
    """

    name = "core.reference_kv_cache"

    def supports(self, problem: Problem, device: Device) -> list[Refusal]:
        """Refuses zero points, which no engine stores for its cache."""
        kv = problem.scheme.kv
        if kv is not None and not kv.symmetric:
            return [Refusal("zeros", "a KV cache with zero points", "symmetric codes", "use C8, C4 or Cfp8")]
        return []

    def quantize(self, x: Tensor, kv: TensorQuant, scale: Tensor | None = None) -> QuantCache:
        """``x [B, H, T, D]`` as stored; ``scale`` is the stored float32 scale, ``[]`` or one for each head ``[H]``.

        :raises SchemeError: for a static scheme without its scale.
        """
        depth = x.shape[-1]
        largest = NUMBER_TYPES[kv.dtype].largest
        values = x.float()
        if kv.dynamic:
            width = kv.block[1] or depth
            padded = torch.nn.functional.pad(values, (0, -depth % width))
            scales = padded.view(*x.shape[:-1], -1, width).abs().amax(-1) / largest
            if kv.scale_dtype == "e4m3":
                scales = scales.clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).float()
        elif scale is None:
            raise SchemeError(
                "a KV cache with static scales was asked for without any; the checkpoint must hold k_scale and v_scale"
            )
        else:
            scales = scale.float().reshape(-1, 1, 1) if scale.numel() > 1 else scale.float().reshape(())
        scaled = values / _spread(scales.masked_fill(scales == 0, 1.0), kv, depth)
        codebook = codebook_of(kv.dtype)
        if codebook is not None:
            codes = _nearest(scaled, codebook.to(x.device))
        elif kv.dtype.startswith("int"):
            codes = torch.round(scaled).clamp(-largest, largest).to(torch.int8)
        else:
            codes = scaled.clamp(-largest, largest).to(torch.float8_e4m3fn if kv.dtype == "fp8_e4m3" else torch.float8_e5m2)
        if kv.bits == 4:
            plain = codes if codebook is not None else (codes + 8).to(torch.uint8)
            plain = torch.nn.functional.pad(plain, (0, depth % 2))
            codes = plain[..., 0::2] | (plain[..., 1::2] << 4)
        return QuantCache(codes, scales, kv, depth)


def _spread(scales: Tensor, kv: TensorQuant, depth: int) -> Tensor:
    if scales.ndim < 4:
        return scales
    width = kv.block[1]
    return scales.repeat_interleave(width, dim=-1)[..., :depth] if width else scales
