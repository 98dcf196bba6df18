"""Products whose sizes cross every boundary of the C loops: few tokens, chunks of columns, blocks of tokens, odd counts of tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qplug_core.kernels.cpu_w8a8 import CpuInt8, int8_product
from qplug_core.kernels.cpu_weight_only import CpuWeightOnly
from qplug_core.scheme import QuantScheme
from qplug_core.testing.weights import random_weight


class Int8(CpuInt8):
    name = "test.cpu_blocks.int8"


class WeightOnly(CpuWeightOnly):
    name = "test.cpu_blocks.weight_only"
    bits = (4, 8)
    numbers = ("fp8_e4m3",)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("n", [16, 70, 113])
@pytest.mark.parametrize("m", [5, 8, 11, 16, 17, 64, 530])
def test_int8_products_are_exact_across_chunks_and_blocks(m: int, n: int, zero_points: bool, instruction_set: str) -> None:
    k = 1107
    generator = torch.Generator().manual_seed(m)
    weight = random_weight(QuantScheme.parse("W8A8"), n, k, generator)
    weight = replace(weight, scales=torch.ones_like(weight.scales))
    t = Int8().pack(weight).tensors
    q = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
    zeros = torch.randint(-128, 128, (m,), generator=generator, dtype=torch.int32) if zero_points else None
    y = int8_product(q, torch.ones(m), zeros, t["codes"], t["scales"], t["sums"], None, n, torch.float32)
    exact = (q.double() - (0 if zeros is None else zeros.double()[:, None])) @ weight.codes.double().T
    assert torch.equal(y.double(), exact.float().double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("text", ["W4A16_g128", "W4A16_g128_asym", "W4A16_g32", "W8A16", "Wfp8A16"])
@pytest.mark.parametrize("m", [16, 17, 193, 517, 1040])
def test_weight_only_products_across_chunks_and_blocks(m: int, text: str, dtype: torch.dtype, instruction_set: str) -> None:
    weight = random_weight(QuantScheme.parse(text), 200, 704, torch.Generator().manual_seed(m))
    x = torch.randn(m, 704, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = WeightOnly().apply(x, WeightOnly().pack(weight)).double()
    exact = x.double() @ weight.dequantize().double().T
    tolerance = weight.scheme.tolerance
    by_token = (y - exact).norm(dim=1) / exact.norm(dim=1)
    assert by_token.max() <= (tolerance.product if dtype == torch.float32 else tolerance.product_16bit)
