"""Triton kernels of other libraries: GemLite and Conch."""

from __future__ import annotations

import importlib

import torch

from ..device import Device
from ..scheme import QuantScheme
from ..weight import QuantWeight
from .contender import Call, Contender, copies
from .peer import BF16, Peer, half, integers, unsigned, zeros
from .peers_torch import to_bf16


class GemLite(Peer):
    """``GemLiteLinear``: bf16 x; weights of 4 or 8 bits, ``(code - zero) * scale``."""

    name = "GemLite"
    install = "pip install gemlite"
    modules = ("gemlite",)
    vendors = ("nvidia", "amd")

    def takes(self, scheme: QuantScheme, n: int, k: int) -> bool:
        """Groups that divide K, shapes in multiples of 32."""
        groups = [integers(scheme, bits) for bits in (4, 8)]
        return any(g is not None and k % (g or k) == 0 for g in groups) and n % 32 == k % 32 == 0

    def contender(self, weight: QuantWeight, beyond: int, device: Device) -> Contender:
        """See :class:`Peer`."""
        gemlite = importlib.import_module("gemlite")
        assert weight.scheme.weight is not None
        bits, group = weight.scheme.weight.bits, weight.block[1] or weight.k

        def linear() -> Call:
            layer = gemlite.GemLiteLinear(bits, group, weight.k, weight.n, gemlite.DType.BF16, gemlite.DType.BF16)
            points = half(weight) if weight.zeros is None else zeros(weight).to(BF16)
            layer.pack(unsigned(weight), weight.scale_values().to(BF16), points, None)
            return lambda x: layer(x)

        nbytes = weight.n * weight.k * bits // 8 + 2 * weight.scales.numel() * (1 if weight.zeros is None else 2)
        return Contender(self.name, "peer", copies(beyond, nbytes, lambda index: linear()), nbytes, to_bf16)


class Conch(Peer):
    """``conch.ops.quantization.gemm.mixed_precision_gemm``: bf16 x; symmetric weights packed along K in int32."""

    name = "Conch"
    install = "pip install conch-triton-kernels"
    modules = ("conch",)
    vendors = ("nvidia", "amd")

    def takes(self, scheme: QuantScheme, n: int, k: int) -> bool:
        """4 or 8 bits, symmetric, in groups."""
        groups = [integers(scheme, bits, symmetric_only=True) for bits in (4, 8)]
        return any(g and k % g == 0 for g in groups) and n % 32 == k % 32 == 0

    def contender(self, weight: QuantWeight, beyond: int, device: Device) -> Contender:
        """See :class:`Peer`."""
        gemm = importlib.import_module("conch.ops.quantization.gemm").mixed_precision_gemm
        assert weight.scheme.weight is not None
        bits, group = weight.scheme.weight.bits, weight.block[1]
        codes = unsigned(weight).t().int()
        count = 32 // bits
        packed = torch.zeros(weight.k // count, weight.n, dtype=torch.int32, device=codes.device)
        for i in range(count):
            packed |= codes[i::count] << (bits * i)
        scales, bias = weight.scale_values().t().contiguous().to(BF16), half(weight)

        def make(index: int) -> Call:
            own = packed.clone()
            return lambda x: gemm(x, own, scales, None, bits, bias, group)

        nbytes = packed.nbytes + scales.nbytes
        return Contender(self.name, "peer", copies(beyond, nbytes, make), nbytes, to_bf16)


PEERS: tuple[Peer, ...] = (GemLite(), Conch())
