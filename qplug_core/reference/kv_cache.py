"""The reference quantization of a KV cache: what is stored for each token, and what attention reads back."""

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
class CacheCoder:
    """Keys or values of one attention layer, from 16 bit to bytes and back.

    kv
        The scheme. Static: one stored scale for all, for each head, or for each channel of each head. Dynamic: scales are
        computed for each token and head, or for groups of the head, and stored beside the codes. ``"local"``: both.
    scale
        Float ``[]``, ``[H]`` or ``[H, D]``; None where nothing is stored.
    zero
        Zero point of a static asymmetric scheme, shaped like ``scale``.

    Static schemes compute in the dtype of the model, which is what their producers do; dynamic ones in float32. Scales
    are amax / largest for fp8 and fp4, amax / (2**(b-1) - 1) for symmetric integers and (max - min) / (2**b - 1) with zero points.
    """

    kv: TensorQuant
    scale: Tensor | None = None
    zero: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kv.rule not in ("", "amax"):
            raise SchemeError(
                f"a KV cache by the rule {self.kv.rule!r} was asked for; amax (stored magnitudes) or none is known"
            )
        if not self.kv.dynamic and self.scale is None:
            raise SchemeError(
                "a KV cache with static scales was asked for without any; the checkpoint must hold k_scale and v_scale"
            )
        if not self.kv.dynamic and not self.kv.symmetric and self.zero is None:
            raise SchemeError("a KV cache with stored zero points was asked for without any; the checkpoint must hold them")

    def width(self, depth: int) -> int:
        """Bytes of one token of one head of ``depth`` channels."""
        codes = -(-depth * self.kv.bits // 8)
        return codes + (self._groups(depth) * self._group_bytes() if self.kv.dynamic else 0)

    def encode(self, x: Tensor) -> Tensor:
        """``x [B, H, T, D]`` as bytes uint8 ``[B, H, T, width(D)]``: codes, then scales, then zero points."""
        if not self.kv.dynamic:
            return self._pack(self._quantize(x, *self._stored(x.dtype, x.device, x.shape[-1])))
        scales, zeros = self._computed(x.float())
        depth = x.shape[-1]
        codes = self._quantize(x.float(), self._spread(self._factor(scales), depth), self._spread(zeros, depth))
        parts = [self._pack(codes), scales.contiguous().view(torch.uint8)]
        if zeros is not None:
            parts.append(zeros.to(torch.uint8))
        return torch.cat(parts, dim=-1)

    def decode(self, data: Tensor, depth: int, dtype: torch.dtype) -> Tensor:
        """Bytes ``[B, H, T, width(depth)]`` as ``[B, H, T, depth]`` in ``dtype``."""
        count = -(-depth * self.kv.bits // 8)
        codes = self._unpack(data[..., :count], depth)
        if not self.kv.dynamic:
            scale, zero = self._stored(dtype, data.device, depth)
            values = codes.to(dtype)
            return ((values if zero is None else values - zero) * scale).to(dtype)
        groups = self._groups(depth)
        end = count + groups * (1 if self.kv.scale_dtype == "e4m3" else 4)
        kind = torch.float8_e4m3fn if self.kv.scale_dtype == "e4m3" else torch.float32
        scales = self._spread(self._factor(data[..., count:end].contiguous().view(kind)), depth)
        values = codes.float()
        if not self.kv.symmetric:
            zeros = self._spread(data[..., end:].float(), depth)
            assert zeros is not None
            values = values - zeros
        assert scales is not None
        return (values * scales).to(dtype)

    def _groups(self, depth: int) -> int:
        return -(-depth // self.kv.block[1]) if self.kv.block[1] else 1

    def _group_bytes(self) -> int:
        return (1 if self.kv.scale_dtype == "e4m3" else 4) + (0 if self.kv.symmetric else 1)

    def _stored(self, dtype: torch.dtype, device: torch.device, depth: int) -> tuple[Tensor, Tensor | None]:
        def shaped(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            value = value.to(device, dtype)
            if value.numel() == 1:
                return value.reshape(())
            # Heads, or channels of heads: [H] and [H, D] stand before and beside the token axis.
            return value.reshape(value.numel() // depth if self.kv.block[1] == 1 else value.shape[0], 1, -1)

        scale = shaped(self.scale)
        assert scale is not None
        if self.kv.rule == "amax":
            scale = scale / NUMBER_TYPES[self.kv.dtype].largest
        return scale, shaped(self.zero)

    def _factor(self, scales: Tensor) -> Tensor:
        """Computed scales as float32, times the stored one of a two-level scheme."""
        outer = 1.0 if self.scale is None else self.scale.float().to(scales.device).reshape(())
        return scales.float() * outer

    def _computed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales ``[B, H, T, G]`` float32 or e4m3, and zero points or None."""
        depth = x.shape[-1]
        width = self.kv.block[1] or depth
        blocks = torch.nn.functional.pad(x, (0, -depth % width)).view(*x.shape[:-1], -1, width)
        if not self.kv.symmetric:
            top, bottom = blocks.amax(-1).clamp(min=0), blocks.amin(-1).clamp(max=0)
            scales = (top - bottom) / (2**self.kv.bits - 1)
            return scales, torch.round(-bottom / scales.masked_fill(scales == 0, 1.0))
        scales = blocks.abs().amax(-1) / NUMBER_TYPES[self.kv.dtype].largest
        if self.kv.scale_dtype == "e4m3":
            outer = 1.0 if self.scale is None else self.scale.float().to(x.device).reshape(())
            return (scales / outer).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn), None
        return scales, None

    def _spread(self, grid: Tensor | None, depth: int) -> Tensor | None:
        width = self.kv.block[1]
        if grid is None or not width:
            return grid
        return grid.repeat_interleave(width, dim=-1)[..., :depth]

    def _quantize(self, x: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
        """Codes: int8, uint8 with zero points, 8-bit floats, or codebook indices uint8."""
        assert scale is not None
        scaled = x / scale.masked_fill(scale == 0, 1.0)
        codebook = codebook_of(self.kv.dtype)
        if codebook is not None:
            return _nearest(scaled.float(), codebook.to(x.device))
        if not self.kv.dtype.startswith("int"):
            largest = NUMBER_TYPES[self.kv.dtype].largest
            return scaled.clamp(-largest, largest).to(_float_dtype(self.kv.dtype))
        if zero is not None:
            return torch.round(scaled + zero).clamp(0, 2**self.kv.bits - 1).to(torch.uint8)
        top = 2 ** (self.kv.bits - 1)
        return torch.round(scaled).clamp(1 - top if self.kv.dynamic else -top, top - 1).to(torch.int8)

    def _pack(self, codes: Tensor) -> Tensor:
        if self.kv.bits == 8:
            return codes.view(torch.uint8)
        nibbles = codes.view(torch.uint8) & 15
        nibbles = torch.nn.functional.pad(nibbles, (0, nibbles.shape[-1] % 2))
        return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)

    def _unpack(self, data: Tensor, depth: int) -> Tensor:
        """Codes as numbers: integers, 8-bit floats, or float32 values of a codebook."""
        codebook = codebook_of(self.kv.dtype)
        if self.kv.bits == 4:
            codes = torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)[..., :depth]
            if codebook is not None:
                return codebook.to(data.device)[codes.long()]
            return codes if not self.kv.symmetric else (codes ^ 8).to(torch.int8) - 8
        if self.kv.dtype.startswith("int"):
            return data if not self.kv.symmetric else data.contiguous().view(torch.int8)
        return data.contiguous().view(_float_dtype(self.kv.dtype))


def _float_dtype(name: str) -> torch.dtype:
    return torch.float8_e4m3fn if name == "fp8_e4m3" else torch.float8_e5m2


class ReferenceKVCache:
    """The kernel that every KV-cache scheme has: :class:`CacheCoder` in torch."""

    name = "core.reference_kv_cache"

    def supports(self, problem: Problem, device: Device) -> list[Refusal]:
        """Refuses scale dtypes that no cache has."""
        kv = problem.scheme.kv
        if kv is not None and kv.scale_dtype == "e8m0":
            return [Refusal("scheme", "a KV cache with E8M0 scales", "float or e4m3 scales", "use Cfp8, C8, C4 or Cnvfp4")]
        return []

    def coder(self, kv: TensorQuant, scale: Tensor | None = None, zero: Tensor | None = None) -> CacheCoder:
        """The coder of one attention layer's keys or values."""
        return CacheCoder(kv, scale, zero)
