"""Weights with a shift in units of the weight, as GGUF blocks with a minimum have them, and zero points taken off codes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qplug_core.device import Device
from qplug_core.kernel import problem_of
from qplug_core.kernels.cpu_emulated import CpuEmulated
from qplug_core.kernels.cpu_weight_only import TYPES, CpuWeightOnly
from qplug_core.reference.activation import quantize_activation
from qplug_core.scheme import QuantScheme
from qplug_core.testing.weights import random_weight
from qplug_core.weight import QuantWeight


class Shifted(CpuWeightOnly):
    name = "test.cpu_shift"
    numbers = tuple(TYPES)


class Emulated(CpuEmulated):
    name = "test.cpu_shift.emulated"
    numbers = tuple(TYPES)


KERNEL = Shifted()


def plain(text: str, n: int, k: int) -> QuantWeight:
    return random_weight(QuantScheme.parse(text), n, k, torch.Generator().manual_seed(3))


def shifted(text: str, n: int, k: int, keep_zeros: bool = False) -> QuantWeight:
    """Unsigned codes less a shift, and a block whose scale is 0, whose weights are all the shift."""
    weight = plain(text, n, k)
    shift = torch.rand(weight.scales.shape, generator=torch.Generator().manual_seed(4)) * weight.scales.float() * 9
    scales = weight.scales.clone()
    scales[-1, 0] = 0
    return replace(weight, scales=scales, zeros=weight.zeros if keep_zeros else None, shift=shift)


def rel(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def check(weight: QuantWeight) -> None:
    packed, values, tolerance = KERNEL.pack(weight), weight.dequantize().double(), weight.scheme.tolerance
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert KERNEL.supports(problem_of(weight, "linear", str(dtype).split(".")[1]), Device.cpu()) == []
        bound = tolerance.product if dtype == torch.float32 else tolerance.product_16bit
        for m in (1, 2, 3, 8, 9, 17, 70):
            x = torch.randn(m, weight.k, generator=torch.Generator().manual_seed(m)).to(dtype)
            assert rel(KERNEL.apply(x, packed), x.double() @ values.T) <= bound, (m, dtype)


@pytest.mark.parametrize("shape", [(7, 64), (70, 320), (130, 992)])
@pytest.mark.parametrize(
    "text", ["W2A16_g16_asym", "W3A16_g64_asym", "W4A16_g32_asym", "W4A16_g128_asym", "W5A16_g32_asym", "W8A16_g64_asym", "W4A16_g32_asym_actorder"]
)  # fmt: skip
def test_products_of_shifted_weights(text: str, shape: tuple[int, int], instruction_set: str) -> None:
    check(shifted(text, *shape))


def test_signed_codes_zero_points_and_a_global_scale_beside_a_shift(instruction_set: str) -> None:
    check(shifted("W4A16_g32", 40, 192))
    check(shifted("W4A16_g32_asym", 40, 192, keep_zeros=True))
    check(replace(shifted("W4A16_g32_asym", 40, 192), global_scale=torch.tensor(3.0), global_div=True))


@pytest.mark.parametrize("m", [3, 20])
@pytest.mark.parametrize("text", ["W4A8_g128_asym", "W4A8_g32_asym_a:g32", "W4A8_g128_asym_a:g32"])
def test_a_shift_and_zero_points_beside_scales_of_activations(text: str, m: int, instruction_set: str) -> None:
    kernel = Emulated()
    for weight in (plain(text, 70, 256), shifted(text, 70, 256)):
        act = weight.scheme.act
        assert act is not None
        x = torch.randn(m, 256, generator=torch.Generator().manual_seed(m))
        given = quantize_activation(x, act, None, None, False).dequantize(torch.float32).double()
        assert rel(kernel.apply(x, kernel.pack(weight)), given @ weight.dequantize().double().T) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [3, 20])
def test_nan_and_infinity_stay_in_their_token(value: float, m: int, instruction_set: str) -> None:
    weight = shifted("W4A16_g32_asym", 40, 192)
    x = torch.randn(m, 192).bfloat16()
    x[1, 5] = value
    y = KERNEL.apply(x, KERNEL.pack(weight))
    assert not y[1, weight.dequantize()[:, 5] != 0].isfinite().any()
    assert y[[i for i in range(m) if i != 1]].isfinite().all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_code_less_every_zero_point(bits: int, instruction_set: str) -> None:
    """The unit matrix as x shows the weights: 17 zero points of 4-bit codes, with many tokens."""
    top = 2**bits
    weight = plain(f"W{bits}A16_g64_asym", top + 1, 64)
    codes = (torch.arange(64) % top).to(torch.uint8).repeat(top + 1, 1)
    points = torch.arange(top + 1, dtype=torch.int16).view(-1, 1)
    for zeros in (points, points.float() + 0.25, -points):
        given = replace(weight, codes=codes, zeros=zeros, scales=torch.ones_like(weight.scales))
        y = KERNEL.apply(torch.eye(64).bfloat16(), KERNEL.pack(given))
        assert torch.equal(y, given.dequantize().T.bfloat16())


def test_activations_that_are_all_positive_lose_no_precision(instruction_set: str) -> None:
    weight = plain("W4A16_g128_asym", 33, 4096)
    for m in (1, 8, 20):
        x = (torch.randn(m, 4096) + 50).bfloat16()
        assert rel(KERNEL.apply(x, KERNEL.pack(weight)), x.double() @ weight.dequantize().double().T) < 4e-3


def test_floats_with_a_shift_are_refused() -> None:
    weight = replace(plain("WNF4A16_g64", 16, 64), shift=torch.ones(16, 1))
    assert [r.code for r in KERNEL.supports(problem_of(weight, "linear", "bfloat16"), Device.cpu())] == ["zeros"]
