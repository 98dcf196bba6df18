"""Every type of code and scale of the weight-only kernels, with every instruction set of this machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qplug_core.device import Device
from qplug_core.kernel import problem_of
from qplug_core.kernels.cpu_weight_only import TYPES, CpuWeightOnly
from qplug_core.scheme import QuantScheme
from qplug_core.testing.weights import random_weight
from qplug_core.weight import QuantWeight

SCHEMES = (
    "W2A16_g64", "W3A16_g32_asym", "W4A16_g128", "W4A16_g16_asym", "W4A16_g32_asym_actorder", "W5A16_g32", "W6A16_channel_asym",
    "W7A16_g64_asym", "W8A16", "W8A16_channel_asym", "WNF4A16", "Wfp4A16", "Wfp4bnbA16", "Wnvfp4A16", "Wmxfp4A16", "Wmxfp8A16", "Wfp8A16",
    "Wfp8A16_b128x128", "Wfp8A16_tensor", "Wfp8e5m2A16",
)  # fmt: skip


class Every(CpuWeightOnly):
    name = "test.cpu_weight_only"
    numbers = tuple(TYPES)


KERNEL = Every()


def weight_of(text: str, n: int, k: int, seed: int = 0) -> QuantWeight:
    return random_weight(QuantScheme.parse(text), n, k, torch.Generator().manual_seed(seed))


def rel(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.mark.parametrize("text", SCHEMES)
def test_products(text: str, instruction_set: str) -> None:
    for n, k in ((7, 48), (70, 320), (130, 1000)):
        weight = weight_of(text, n, k)
        assert KERNEL.supports(problem_of(weight, "linear", "bfloat16"), Device.cpu()) == []
        packed, values, tolerance = KERNEL.pack(weight), weight.dequantize().double(), weight.scheme.tolerance
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for m in (1, 2, 3, 8, 9, 17, 70):
                x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
                bound = tolerance.product if dtype == torch.float32 else tolerance.product_16bit
                assert rel(KERNEL.apply(x, packed), x.double() @ values.T) <= bound, (n, k, m, dtype)


@pytest.mark.parametrize("tokens", [1, 8, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", ["Wfp8A16", "Wfp8e5m2A16", "W8A16", "W4A16_g32", "W3A16_g32", "W2A16_g32", "Wfp4A16"])
def test_every_code_has_its_value(text: str, dtype: torch.dtype, tokens: int, instruction_set: str) -> None:
    """The unit matrix as x shows the weights: exact where the dtype holds them."""
    weight = weight_of(text, 32, 256)
    bits = weight.scheme.weight.bits
    every = torch.arange(256).repeat(32, 1) % 2**bits
    if weight.codes.dtype == torch.int8:
        every = every - 2 ** (bits - 1)
        codes = every.to(torch.int8)
    elif weight.codes.dtype == torch.uint8:
        codes = every.to(torch.uint8)
    else:
        codes = every.to(torch.uint8).view(weight.codes.dtype)
        codes = torch.where(codes.float().isfinite(), codes.float(), torch.zeros(())).to(weight.codes.dtype)
        if dtype == torch.float16:
            codes = codes.float().clamp(-1024, 1024).to(weight.codes.dtype)
    weight = replace(weight, codes=codes, scales=torch.ones_like(weight.scales))
    packed, values = KERNEL.pack(weight), weight.dequantize()
    unit = torch.eye(256).to(dtype)
    for start in range(0, 256, tokens):
        y = KERNEL.apply(unit[start : start + tokens], packed)
        assert torch.equal(y, values[:, start : start + tokens].T.to(dtype))


@pytest.mark.parametrize("m", [1, 20])
def test_e8m0_scales_reach_both_ends(m: int, instruction_set: str) -> None:
    weight = weight_of("Wmxfp4A16", 16, 64)
    scales = weight.scales.clone()
    scales[0], scales[1], scales[2] = 0, 1, 250
    weight = replace(weight, scales=scales)
    x = torch.ones(m, 64) * 2.0**-20
    x[:, 32:] = 0
    y = KERNEL.apply(x, KERNEL.pack(weight))
    exact = (x.double() @ weight.dequantize().double().T).float()
    assert torch.allclose(y, exact, rtol=1e-6, atol=2.0**-140)


@pytest.mark.parametrize("divide", [False, True])
def test_global_scale_of_each_row(divide: bool, instruction_set: str) -> None:
    weight = weight_of("Wnvfp4A16", 40, 96)
    weight = replace(weight, global_scale=torch.rand(40, 1) + 0.5, global_div=divide)
    for m in (1, 20):
        x = torch.randn(m, 96)
        assert rel(KERNEL.apply(x, KERNEL.pack(weight)), x.double() @ weight.dequantize().double().T) < 1e-5


@pytest.mark.parametrize("m", [1, 8, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["code", "e4m3", "e8m0", "scale"])
def test_nan_in_a_weight_is_nan_in_its_row_alone(where: str, dtype: torch.dtype, m: int, instruction_set: str) -> None:
    weight = weight_of({"code": "Wfp8A16", "e4m3": "Wnvfp4A16", "e8m0": "Wmxfp4A16", "scale": "W4A16_g32"}[where], 24, 64)
    if where == "code":
        values = weight.codes.float()
        values[5, 7] = float("nan")
        weight = replace(weight, codes=values.to(torch.float8_e4m3fn))
    else:
        scales = weight.scales.clone()
        scales.view(torch.uint8)[5, -1] = 0
        scales = scales.float() if where == "scale" else scales
        if where == "scale":
            scales[5, 1] = float("nan")
        else:
            scales.view(torch.uint8)[5, 1] = 127 if where == "e4m3" else 255
        weight = replace(weight, scales=scales)
    y = KERNEL.apply(torch.randn(m, 64).to(dtype), KERNEL.pack(weight))
    assert y[:, 5].isnan().all()
    assert y[:, [n for n in range(24) if n != 5]].isfinite().all()


@pytest.mark.parametrize("text", ["W4A16_g128", "W8A16", "WNF4A16", "Wfp8A16"])
@pytest.mark.parametrize("m", [1, 8, 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_token(value: float, m: int, text: str, instruction_set: str) -> None:
    weight = weight_of(text, 80, 1024)
    x = torch.randn(m, 1024).bfloat16()
    x[0, 5] = value
    y = KERNEL.apply(x, KERNEL.pack(weight))
    assert not y[0, weight.dequantize()[:, 5] != 0].isfinite().any()
    assert y[1:].isfinite().all()


@pytest.mark.parametrize("text", ["W4A16_g128_asym", "W8A16_channel_asym"])
def test_positive_activations_lose_no_precision_to_the_zero_point(text: str, instruction_set: str) -> None:
    weight = weight_of(text, 33, 4096)
    values = weight.dequantize().double()
    for m in (1, 8, 20):
        x = (torch.randn(m, 4096) + 50).bfloat16()
        assert rel(KERNEL.apply(x, KERNEL.pack(weight)), x.double() @ values.T) < 4e-3


def test_bytes_of_two_level_and_mx_weights_are_those_of_the_format() -> None:
    for text, bits in (("Wnvfp4A16", 4.5), ("Wmxfp4A16", 4.25), ("Wmxfp8A16", 8.25)):
        tensors = KERNEL.pack(weight_of(text, 64, 1024)).tensors
        assert tensors["codes"].nbytes + tensors["scales"].nbytes == 64 * 1024 * bits / 8


def test_reload_takes_a_nan_that_was_not_there(instruction_set: str) -> None:
    first, second = weight_of("Wfp8A16", 24, 64), weight_of("Wfp8A16", 24, 64, seed=1)
    second.codes.view(torch.uint8)[3, 3] = 0x7F
    packed = KERNEL.pack(first)
    KERNEL.pack(second, out=packed)
    assert KERNEL.apply(torch.randn(2, 64), packed)[:, 3].isnan().all()
