from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qplug_core.device import Device
from qplug_core.kernel import Problem, problem_of
from qplug_core.kernels.cpu_w8a8 import CpuInt8, int8_product, int8_quantize, w8a8
from qplug_core.reference.activation import quantize_activation
from qplug_core.scheme import QuantScheme, TensorQuant
from qplug_core.testing.weights import random_weight

TOKENS = (0, 1, 2, 3, 4, 5, 8, 9, 33, 130)
SHAPES = ((1, 16), (7, 48), (17, 100), (96, 257), (130, 63))
SCHEMES = (
    "W8A8",
    "W8A8_a:rule=127",
    "W8A8_a:rule=127.5",
    "W8A8_a:asym",
    "W8A8_static",
    "W8A8_a:tensor.static.asym",
    "W8A8_tensor",
)


class Int8(CpuInt8):
    name = "test.cpu_w8a8"


KERNEL = Int8()


def scheme(text: str) -> QuantScheme:
    return QuantScheme.parse(text)


def act_of(text: str) -> TensorQuant:
    act = scheme(text).act
    assert act is not None
    return act


def rel(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("text", SCHEMES)
def test_codes_and_scales_are_those_of_the_float32_definition(text: str, m: int, dtype: torch.dtype) -> None:
    act, tolerance = act_of(text), scheme(text).tolerance
    for k in (16, 63, 257):
        x = (torch.randn(m, k, generator=torch.Generator().manual_seed(k)) * 3).to(dtype)
        x[m // 2 :][:1] = 0
        scale = None if act.dynamic else torch.tensor([0.02])
        zero = None if act.dynamic or act.symmetric else torch.tensor([-7], dtype=torch.int32)
        codes, scales, zeros = int8_quantize(x, scale, zero, act.symmetric, act.rule == "127.5")
        if m == 0:
            assert codes.shape == (0, k)
            continue
        exact = quantize_activation(x.float(), act, scale, zero)
        steps = (codes.int() - exact.codes.int()).abs()
        assert steps.max() <= tolerance.code_step
        assert (steps > 0).double().mean() <= tolerance.code_share
        assert torch.allclose(scales, exact.scales.flatten().expand(m), rtol=tolerance.act_scale, atol=0)
        if exact.zeros is not None:
            assert torch.equal(zeros, exact.zeros.flatten().int().expand(m))


def test_the_two_divisors_are_two_functions() -> None:
    x = torch.randn(8, 256)
    narrow, wide = int8_quantize(x, None, None, True, False), int8_quantize(x, None, None, True, True)
    assert torch.allclose(narrow[1] / wide[1], torch.tensor(127.5 / 127))
    assert (narrow[0] != wide[0]).double().mean() > 0.05
    assert narrow[0].min() >= -127
    assert int8_quantize(-x.abs(), None, None, True, True)[0].min() == -128


def test_halves_round_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.0]])
    assert int8_quantize(x, None, None, True, False)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, 3]]


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("m", TOKENS)
def test_product_on_given_codes(m: int, shape: tuple[int, int], zero_points: bool) -> None:
    n, k = shape
    generator = torch.Generator().manual_seed(m)
    weight = random_weight(scheme("W8A8"), n, k, generator)
    t = KERNEL.pack(weight).tensors
    q = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
    scales = torch.rand(m, generator=generator) + 0.1
    zeros = torch.randint(-128, 128, (m,), generator=generator, dtype=torch.int32) if zero_points else None
    values = (q.double() - (zeros.double()[:, None] if zeros is not None else 0)) * scales.double()[:, None]
    bias = torch.randn(n, generator=generator)
    exact = values @ weight.dequantize().double().T + bias.double()
    tolerance = weight.scheme.tolerance
    for dtype, bound in (
        (torch.float32, tolerance.product),
        (torch.bfloat16, tolerance.product_16bit),
        (torch.float16, tolerance.product_16bit),
    ):
        y = int8_product(q, scales, zeros, t["codes"], t["scales"], t["sums"], bias, n, dtype)
        assert y.dtype == dtype
        assert rel(y, exact) <= bound


@pytest.mark.parametrize("m", [1, 2, 4, 7])
def test_sums_of_extreme_codes_are_exact(m: int) -> None:
    k = 65536
    weight = random_weight(scheme("W8A8"), 17, k)
    weight = replace(weight, codes=torch.full((17, k), -128, dtype=torch.int8), scales=torch.ones(17, 1))
    t = KERNEL.pack(weight).tensors
    q = torch.full((m, k), 127, dtype=torch.int8)
    y = int8_product(
        q,
        torch.ones(m),
        torch.full((m,), -128, dtype=torch.int32),
        t["codes"],
        t["scales"],
        t["sums"],
        None,
        17,
        torch.float32,
    )
    assert torch.equal(y, torch.full((m, 17), -255.0 * 128 * k))


@pytest.mark.parametrize("text", SCHEMES)
def test_apply_is_both_halves(text: str) -> None:
    parsed = scheme(text)
    weight = random_weight(parsed, 40, 100, torch.Generator().manual_seed(1))
    assert KERNEL.supports(problem_of(weight, "linear", "bfloat16"), Device.cpu()) == []
    packed = KERNEL.pack(weight)
    t, act = packed.tensors, act_of(text)
    x, bias = torch.randn(2, 3, 100).bfloat16(), torch.randn(40)
    codes, scales, zeros = int8_quantize(x, t.get("act_scale"), t.get("act_zero"), act.symmetric, act.rule == "127.5")
    given = None if act.symmetric else zeros
    halves = int8_product(codes, scales, given, t["codes"], t["scales"], t["sums"], bias, 40, torch.bfloat16)
    assert torch.equal(KERNEL.apply(x, packed, bias), halves.view(2, 3, 40))


def test_pre_scale_comes_before_quantization() -> None:
    weight = random_weight(scheme("W8A8"), 24, 64, torch.Generator().manual_seed(2))
    factors = torch.rand(64) + 0.5
    x = torch.randn(5, 64)
    plain = KERNEL.apply(x * factors, KERNEL.pack(weight))
    assert torch.equal(KERNEL.apply(x, KERNEL.pack(replace(weight, pre_scale=factors))), plain)


def test_strided_x() -> None:
    packed = KERNEL.pack(random_weight(scheme("W8A8"), 24, 64, torch.Generator().manual_seed(3)))
    x = torch.randn(5, 128)[:, ::2]
    assert torch.equal(KERNEL.apply(x, packed), KERNEL.apply(x.contiguous(), packed))
    assert KERNEL.apply(torch.randn(64), packed).shape == (24,)


@pytest.mark.parametrize("text", SCHEMES)
def test_zero_tokens_give_zero(text: str) -> None:
    packed = KERNEL.pack(random_weight(scheme(text), 24, 64, torch.Generator().manual_seed(4)))
    assert torch.equal(KERNEL.apply(torch.zeros(3, 64), packed), torch.zeros(3, 24))


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("m", [3, 20])
def test_nan_and_infinity_stay_in_their_token(m: int, text: str) -> None:
    packed = KERNEL.pack(random_weight(scheme(text), 24, 64, torch.Generator().manual_seed(5)))
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(m, 64)
        x[1, 63] = value
        y = KERNEL.apply(x, packed)
        # A static scale clips what is infinite to the last code; NaN has no code in either.
        if value != value or act_of(text).dynamic:
            assert not y[1].isfinite().any()
        assert y[[i for i in range(m) if i != 1]].isfinite().all()


def test_pack_again_keeps_addresses_and_takes_the_new_values() -> None:
    first, second = (
        random_weight(scheme("W8A8_a:tensor.static.asym"), 24, 64, torch.Generator().manual_seed(seed)) for seed in (6, 7)
    )
    packed = KERNEL.pack(first)
    addresses = {name: t.data_ptr() for name, t in packed.tensors.items()}
    assert KERNEL.pack(second, out=packed) is packed
    assert {name: t.data_ptr() for name, t in packed.tensors.items()} == addresses
    x = torch.randn(3, 64)
    assert torch.equal(KERNEL.apply(x, packed), KERNEL.apply(x, KERNEL.pack(second)))


def test_packed_weight_shares_no_storage_with_the_hub() -> None:
    # Shapes that need no padding are those that could come through as views.
    weight = random_weight(scheme("W8A8_static"), 16, 64, torch.Generator().manual_seed(8))
    hub = {t.untyped_storage().data_ptr() for t in weight.tensors().values()}
    assert not hub & {t.untyped_storage().data_ptr() for t in KERNEL.pack(weight).tensors.values()}


def test_operations_are_well_formed_and_compile() -> None:
    packed = KERNEL.pack(random_weight(scheme("W8A8_a:asym"), 24, 64, torch.Generator().manual_seed(9)))
    t, x, bias = packed.tensors, torch.randn(2, 3, 64), torch.randn(24)
    torch.library.opcheck(w8a8, (x, t["codes"], t["scales"], t["sums"], None, None, bias, 24, False, False))
    torch.library.opcheck(int8_quantize, (x, None, None, False, False))
    codes, scales, zeros = int8_quantize(x, None, None, False, False)
    torch.library.opcheck(int8_product, (codes, scales, zeros, t["codes"], t["scales"], t["sums"], bias, 24, torch.float32))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor) -> Tensor:
        return KERNEL.apply(x, packed, bias) * 2

    assert torch.equal(run(x), KERNEL.apply(x, packed, bias) * 2)


@pytest.mark.parametrize(
    ("problem", "codes"),
    [
        (Problem("embedding", scheme("W8A8"), 8, 32), ["op"]),
        (Problem("linear", scheme("W4A8_g32"), 8, 32), ["scheme"]),
        (Problem("linear", scheme("W8A16"), 8, 32), ["scheme"]),
        (Problem("linear", scheme("W8A8_g16_asym"), 8, 32), ["group", "zeros"]),
        (Problem("linear", scheme("W8A8_a:g16"), 8, 32), ["scheme"]),
        (Problem("linear", scheme("W8A8_a:outlier=6"), 8, 32), ["scheme"]),
        (Problem("linear", scheme("W8A8_a:rule=floor"), 8, 32), ["rule"]),
        (Problem("linear", scheme("W8A8"), 8, 65537), ["shape"]),
        (Problem("linear", scheme("W8A8"), 8, 32, dtype="float64", shift=True), ["zeros", "dtype"]),
        (Problem("lm_head", scheme("W8A8_static"), 7, 31, pre_scale=True, act_shift=True), []),
    ],
)
def test_supports_tells_every_refusal(problem: Problem, codes: list[str]) -> None:
    assert [r.code for r in KERNEL.supports(problem, Device.cpu())] == codes


def test_supports_needs_a_cpu_with_avx2() -> None:
    problem = Problem("linear", scheme("W8A8"), 8, 32)
    assert KERNEL.supports(problem, Device.from_name("avx512_vnni")) == []
    assert [r.code for r in KERNEL.supports(problem, Device.from_name("sm_90"))] == ["device"]
