"""Products whose sizes cross every boundary of the C loops: few tokens, chunks of columns, blocks of tokens, odd counts of tiles."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
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


@pytest.mark.parametrize("text", ["W4A16_g128_asym", "W8A8"])
def test_calls_at_the_same_time_share_no_scratch(text: str) -> None:
    """Arrays beyond 1 MB are kept from one call to the next, which may have begun before it."""
    kernel = Int8() if text == "W8A8" else WeightOnly()
    weight = random_weight(QuantScheme.parse(text), 48, 8192, torch.Generator().manual_seed(1))
    packed = kernel.pack(weight)
    tokens = [torch.randn(m, 8192, generator=torch.Generator().manual_seed(m)).bfloat16() for m in (140, 150, 160, 170)]
    alone = [kernel.apply(x, packed) for x in tokens]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            together = list(pool.map(lambda x: kernel.apply(x, packed), tokens * 2))
            assert all(torch.equal(y, alone[i % 4]) for i, y in enumerate(together))


@pytest.mark.parametrize("text", ["W4A16_g128", "W4A16_g128_asym", "Wfp8A16", "W8A8"])
@pytest.mark.parametrize("m", [0, 1, 2, 3, 5, 9, 16])
@pytest.mark.parametrize("n", [16, 48, 1000])
def test_every_tile_is_walked_once_with_any_number_of_threads(n: int, m: int, text: str) -> None:
    kernel = Int8() if text == "W8A8" else WeightOnly()
    weight = random_weight(QuantScheme.parse(text), n, 1024, torch.Generator().manual_seed(1))
    packed, x = kernel.pack(weight), torch.randn(m, 1024, generator=torch.Generator().manual_seed(m)).bfloat16()
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(kernel.apply(x, packed))
    finally:
        torch.set_num_threads(before)
    assert found[0].shape == (m, n)
    assert all(torch.equal(y, found[0]) for y in found)
