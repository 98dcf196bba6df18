"""Quantized activations that are multiplied wider: codes against the float32 definition, then products on given codes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qplug_core.device import Device
from qplug_core.kernel import Problem, problem_of
from qplug_core.kernels.cpu_emulated import CpuEmulated, quantize, quantize_codes
from qplug_core.kernels.cpu_weight_only import TYPES
from qplug_core.reference.activation import quantize_activation
from qplug_core.reference.linear import ReferenceLinear
from qplug_core.scheme import QuantScheme
from qplug_core.testing.weights import random_weight
from qplug_core.weight import QuantWeight

SCHEMES = (
    "W4A8_g128", "W4A8_g32_asym_a:asym", "W4A8_g128_a:tensor", "W4A8_static", "W4A8_a:tensor.static.asym", "W4A8_channel_a:rule=127.5",
    "W8A8_g64", "W8A8_b128x128", "W8A8_g128_a:g32", "W4A4_g128", "W4Afp8_g128", "W4Afp8_g32_static", "Wfp8Afp8", "Wfp8Afp8_static",
    "Wfp8Afp8_a:tensor", "Wfp8Afp8_b128x128", "Wfp8Afp8_b64x32", "Wfp8e5m2Afp8", "Wfp8Afp8_a:rule=ub1200", "Wfp8Afp8e5m2",
    "Wnvfp4Anvfp4", "Wnvfp4Afp8", "Wmxfp4Amxfp4", "Wmxfp4Amxfp4_a:rule=ct", "Wmxfp4Amxfp4_a:rule=floor", "Wmxfp4Amxfp4_a:rule=ceil",
    "Wmxfp4Amxfp4_a:rule=even", "Wmxfp4Amxfp4_a:rule=up", "Wmxfp4Amxfp8", "Wmxfp8Amxfp8_a:rule=even", "Wmxfp8Afp8_b128x128",
    "W3A8_g32_a:g16", "WNF4A8", "W4A8_g32_actorder_a:g64",
)  # fmt: skip


class Emulated(CpuEmulated):
    name = "test.cpu_emulated"
    numbers = tuple(TYPES)


KERNEL = Emulated()


def weight_of(text: str, n: int, k: int) -> QuantWeight:
    return random_weight(QuantScheme.parse(text), n, k, torch.Generator().manual_seed(1))


def dequantized(x: Tensor, weight: QuantWeight) -> Tensor:
    act = weight.scheme.act
    assert act is not None
    return quantize_activation(x.float(), act, weight.act_scale, weight.act_zero, weight.act_div).dequantize(torch.float32)


def rel(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("text", SCHEMES)
def test_codes_are_those_of_the_float32_definition(text: str, divide: bool, instruction_set: str) -> None:
    weight = weight_of(text, 16, 320)
    act = weight.scheme.act
    if divide and (weight.act_scale is None or act.dtype.startswith("int")):
        return
    weight = replace(weight, act_div=divide, act_scale=1 / weight.act_scale) if divide else weight
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = (torch.randn(9, 320, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
        x[4] = 0
        x[5, :32] *= 100
        scale, zero = (None if v is None else v.float().reshape(1) for v in (weight.act_scale, weight.act_zero))
        codes, scales = quantize(x, act, scale, zero, divide)
        spread = scales if scales.shape[1] == 1 else scales.repeat_interleave(act.block[1], 1)[:, :320]
        assert torch.allclose(
            codes.float() * spread, dequantized(x, weight), rtol=weight.scheme.tolerance.act_scale, atol=1e-12
        )


@pytest.mark.parametrize("text", SCHEMES)
def test_products_of_given_codes(text: str, instruction_set: str) -> None:
    for n, k in ((7, 48), (70, 320), (66, 1000)):
        weight = weight_of(text, n, k)
        assert KERNEL.supports(problem_of(weight, "linear", "float32"), Device.cpu()) == []
        packed, values, tolerance = KERNEL.pack(weight), weight.dequantize().double(), weight.scheme.tolerance
        for dtype, bound in ((torch.float32, tolerance.product), (torch.bfloat16, tolerance.product_16bit)):
            for m in (1, 3, 18):
                x = (torch.randn(m, k, generator=torch.Generator().manual_seed(m)) * 2).to(dtype)
                y = KERNEL.apply(x, packed)
                assert y.dtype == dtype
                assert rel(y, dequantized(x, weight).double() @ values.T) <= bound, (n, k, m, dtype)


@pytest.mark.parametrize("text", ["W4A8_g128", "Wfp8Afp8_b128x128", "Wnvfp4Anvfp4", "Wmxfp4Amxfp4"])
@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_token(value: float, m: int, text: str) -> None:
    weight = weight_of(text, 48, 256)
    if weight.act_scale is not None and value == value:
        return  # A stored outer scale bounds the block scale, and clips what is infinite, as in the reference.
    x = torch.randn(m, 256)
    x[0, 5] = value
    y = KERNEL.apply(x, KERNEL.pack(weight))
    assert not y[0, weight.dequantize()[:, 5] != 0].isfinite().any()
    assert y[1:].isfinite().all()


def test_pre_scale_and_shift_come_before_quantization() -> None:
    weight = replace(weight_of("W4A8_g32", 24, 64), pre_scale=torch.rand(64) + 0.5, act_shift=torch.randn(64))
    x, reference = torch.randn(5, 64), ReferenceLinear()
    assert rel(KERNEL.apply(x, KERNEL.pack(weight)), reference.apply(x, reference.pack(weight)).double()) < 1e-5


def test_operation_is_well_formed_and_compiles() -> None:
    weight = weight_of("Wfp8Afp8_b128x128", 24, 256)
    packed, x, bias = KERNEL.pack(weight), torch.randn(2, 3, 256), torch.randn(24)
    torch.library.opcheck(
        quantize_codes, (x, None, None, 128, [1, 3, -6], [-448.0, 448.0, 448.0, float("inf")], 1, 0, True, False, False)
    )

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor) -> Tensor:
        return KERNEL.apply(x, packed, bias) * 2

    assert torch.equal(run(x), KERNEL.apply(x, packed, bias) * 2)


def test_export_keeps_the_operations() -> None:
    packed = KERNEL.pack(weight_of("W4A8_g32", 24, 64))

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return KERNEL.apply(x, packed)

    x = torch.randn(3, 64)
    program = torch.export.export(Layer(), (x,))
    assert {"qplug::quantize_codes", "qplug::weight_only"} <= {
        n.target.name().partition(".")[0] for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)
    }
    assert torch.equal(program.module()(x), KERNEL.apply(x, packed))


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("W4A16_g32", ["scheme"]),
        ("W8A8_a:outlier=6", ["scheme"]),
        ("W4A8_a:rule=floor", ["rule"]),
        ("Wfp8Afp8_a:rule=ceil", ["rule"]),
        ("Wmxfp4Amxfp4_a:rule=nearest", ["rule"]),
        ("W4A8_g32_2:4", ["scheme"]),
        ("W4A8_g32_asym", []),
    ],
)
def test_supports_tells_every_refusal(text: str, codes: list[str]) -> None:
    assert [r.code for r in KERNEL.supports(Problem("linear", QuantScheme.parse(text), 8, 64), Device.cpu())] == codes
