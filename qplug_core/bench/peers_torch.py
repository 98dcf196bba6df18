"""What torch itself brings: int4 and int8 packs, ``_int_mm`` and ``_scaled_mm``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import Device
from ..scheme import QuantScheme
from ..weight import QuantWeight
from .contender import Call, Contender, copies
from .peer import BF16, Peer, half, integers, unsigned, zeros

ALL = ("cpu", "nvidia", "amd")


def to_bf16(x: Tensor) -> Tensor:
    """x as these kernels take it."""
    return x.to(BF16)


class Int4Pack(Peer):
    """``aten::_weight_int4pack_mm_for_cpu``: bf16 x; codes of 4 bits, and bf16 pairs of scale and offset for each group."""

    name = "torch int4pack"

    def takes(self, scheme: QuantScheme, n: int, k: int) -> bool:
        """Groups of 32 to 256, rows in sixteens."""
        group = integers(scheme, 4)
        return group in (32, 64, 128, 256) and k % group == 0 and n % 16 == 0

    def contender(self, weight: QuantWeight, beyond: int, device: Device) -> Contender:
        """See :class:`Peer`."""
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned(weight).int(), 1)
        both, group = offsets(weight), weight.block[1]

        def make(index: int) -> Call:
            own, pairs = packed.clone(), both.clone()
            return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, own, group, pairs)

        nbytes = packed.nbytes + both.nbytes
        return Contender(self.name, "peer", copies(beyond, nbytes, make), nbytes, to_bf16)


class TinyGemm(Peer):
    """``aten::_weight_int4pack_mm`` (tinygemm): as :class:`Int4Pack`, on NVIDIA GPUs since sm_80 and on CDNA."""

    name = "torch tinygemm"
    vendors = ("nvidia", "amd")

    def takes(self, scheme: QuantScheme, n: int, k: int) -> bool:
        """Groups of 32 to 256, whole tiles."""
        group = integers(scheme, 4)
        return group in (32, 64, 128, 256) and k % max(group, 128) == 0 and n % 8 == 0

    def contender(self, weight: QuantWeight, beyond: int, device: Device) -> Contender:
        """See :class:`Peer`."""
        codes = unsigned(weight)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
        both, group = offsets(weight), weight.block[1]

        def make(index: int) -> Call:
            own, pairs = packed.clone(), both.clone()
            return lambda x: torch.ops.aten._weight_int4pack_mm(x, own, group, pairs)

        nbytes = packed.nbytes + both.nbytes
        return Contender(self.name, "peer", copies(beyond, nbytes, make), nbytes, to_bf16)


def offsets(weight: QuantWeight) -> Tensor:
    """``[K/g, N, 2]`` bf16: scale, and ``(8 - zero) * scale``, which is added to ``(code - 8) * scale``."""
    scales = weight.scale_values()
    return torch.stack([scales, (half(weight) - zeros(weight)) * scales], dim=-1).transpose(0, 1).contiguous().to(BF16)


class Int8Pack(Peer):
    """``aten::_weight_int8pack_mm``: bf16 x, int8 codes, a bf16 scale for each row."""

    name = "torch int8pack"
    vendors = ALL

    def takes(self, scheme: QuantScheme, n: int, k: int) -> bool:
        """Symmetric, a scale for each row."""
        return integers(scheme, 8, symmetric_only=True) == 0

    def contender(self, weight: QuantWeight, beyond: int, device: Device) -> Contender:
        """See :class:`Peer`."""
        scales = weight.scale_values().flatten().to(BF16)

        def make(index: int) -> Call:
            own = weight.codes.clone()
            return lambda x: torch._weight_int8pack_mm(x, own, scales)

        nbytes = weight.codes.nbytes + scales.nbytes
        return Contender(self.name, "peer", copies(beyond, nbytes, make), nbytes, to_bf16)


class IntMM(Peer):
    """``torch._int_mm`` between a dynamic quantization of each token and a product with both scales, in torch operations."""

    name = "torch._int_mm"
    vendors = ALL

    def takes(self, scheme: QuantScheme, n: int, k: int) -> bool:
        """See :func:`dynamic_w8a8`."""
        return dynamic_w8a8(scheme)

    def contender(self, weight: QuantWeight, beyond: int, device: Device) -> Contender:
        """See :class:`Peer`."""
        scales = weight.scale_values().flatten()
        # cuBLASLt asks for 17 rows and more.
        least = 1 if device.vendor == "cpu" else 17

        def make(index: int) -> Call:
            own = weight.codes.clone().t()

            def call(x: Tensor) -> Tensor:
                factors = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-10) / 127
                codes = torch.round(x / factors).to(torch.int8)
                padded = codes if len(codes) >= least else torch.nn.functional.pad(codes, (0, 0, 0, least - len(codes)))
                return (torch._int_mm(padded, own)[: len(codes)] * factors * scales).to(x.dtype)

            return call

        nbytes = weight.codes.nbytes + scales.nbytes
        return Contender(
            self.name, "peer", copies(beyond, nbytes, make), nbytes, to_bf16, note="with torch's own operations around it"
        )


def dynamic_w8a8(scheme: QuantScheme) -> bool:
    """True for W8A8 that is symmetric, dynamic per token, with a weight scale for each row."""
    part, act = scheme.weight, scheme.act
    if part is None or act is None or scheme.sparsity:
        return False
    weights = part.dtype == "int8" and part.symmetric and part.block == (1, 0)
    tokens = act.dtype == "int8" and act.symmetric and act.block == (1, 0) and act.dynamic is True and not act.outlier
    return weights and tokens


class ScaledMM(Peer):
    """``torch._scaled_mm``, e4m3 by e4m3 with scales of rows or of tensors, after a dynamic quantization in torch operations."""

    name = "torch._scaled_mm"
    vendors = ALL

    def takes(self, scheme: QuantScheme, n: int, k: int) -> bool:
        """FP8 by FP8, dynamic, both by row or both by tensor."""
        part, act = scheme.weight, scheme.act
        if part is None or act is None or part.dtype != "fp8_e4m3" or act.dtype != "fp8_e4m3" or scheme.sparsity:
            return False
        blocks = (part.block, act.block) in (((1, 0), (1, 0)), ((0, 0), (0, 0)))
        return act.dynamic is True and not act.rule and blocks and n % 16 == k % 16 == 0

    def contender(self, weight: QuantWeight, beyond: int, device: Device) -> Contender:
        """See :class:`Peer`."""
        by_row = weight.block == (1, 0)
        scales = weight.scale_values().reshape(1, -1) if by_row else weight.scale_values().reshape(())
        largest = torch.finfo(torch.float8_e4m3fn).max

        def make(index: int) -> Call:
            own = weight.codes.clone().t()

            def call(x: Tensor) -> Tensor:
                amax = x.abs().amax(-1, keepdim=True) if by_row else x.abs().amax()
                factors = amax.float().clamp(min=1e-10) / largest
                codes = (x / factors).clamp(-largest, largest).to(torch.float8_e4m3fn)
                y: Tensor = torch._scaled_mm(codes, own, factors, scales, out_dtype=BF16)
                return y

            return call

        nbytes = weight.codes.nbytes + scales.nbytes
        return Contender(
            self.name, "peer", copies(beyond, nbytes, make), nbytes, to_bf16, note="with torch's own operations around it"
        )


PEERS: tuple[Peer, ...] = (Int4Pack(), TinyGemm(), Int8Pack(), IntMM(), ScaledMM())
