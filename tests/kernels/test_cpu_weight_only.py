from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qplug_core.device import Device
from qplug_core.kernel import Problem, problem_of
from qplug_core.kernels.cpu_weight_only import CpuWeightOnly, weight_only
from qplug_core.reference.linear import ReferenceLinear
from qplug_core.scheme import QuantScheme
from qplug_core.testing.weights import random_weight
from qplug_core.weight import QuantWeight, concat

TOKENS = (0, 1, 2, 3, 8, 9, 16, 17, 33, 130)
SHAPES = ((1, 16), (7, 48), (17, 100), (96, 257))


class WeightOnly(CpuWeightOnly):
    name = "test.cpu_weight_only"
    bits = (2, 3, 4, 8)


KERNEL = WeightOnly()


def scheme(text: str) -> QuantScheme:
    return QuantScheme.parse(text)


def rel(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def check(weight: QuantWeight, m: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> None:
    """apply of random x against float64 on the definition, within the scheme's tolerance."""
    x = (torch.randn(m, weight.k, generator=torch.Generator().manual_seed(m)) + mean).to(dtype)
    y = KERNEL.apply(x, KERNEL.pack(weight))
    assert y.dtype == dtype
    assert y.shape == (m, weight.n)
    tolerance = weight.scheme.tolerance
    assert rel(y, x.double() @ weight.dequantize().double().T) <= (
        tolerance.product if dtype == torch.float32 else tolerance.product_16bit
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zeros", ["", "_asym"])
@pytest.mark.parametrize("group", ["g16", "g32", "g48", "g128", "channel"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_product_of_every_width_group_and_shape(bits: int, group: str, zeros: str, shape: tuple[int, int]) -> None:
    weight = random_weight(scheme(f"W{bits}A16_{group}{zeros}"), *shape, torch.Generator().manual_seed(bits))
    for m in (1, 3, 8, 33):
        check(weight, m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("text", ["W2A16_g64", "W3A16_g32_asym", "W4A16_g128_asym", "W8A16"])
def test_product_of_every_count_of_tokens_and_dtype(text: str, m: int, dtype: torch.dtype) -> None:
    check(random_weight(scheme(text), 70, 320, torch.Generator().manual_seed(1)), m, dtype)


@pytest.mark.parametrize("text", ["W4A16_channel", "W4A16_g128_asym", "W8A16", "W8A16_channel_asym"])
def test_activations_that_are_all_positive_lose_no_precision_to_the_zero_point(text: str) -> None:
    weight = random_weight(scheme(text), 33, 4096, torch.Generator().manual_seed(2))
    for m in (1, 4, 20):
        check(weight, m, mean=50.0)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "top"), [(2, 4), (3, 8), (4, 16), (8, 256)])
def test_zero_points_reach_two_to_the_bits(bits: int, top: int, scale_dtype: torch.dtype) -> None:
    weight = random_weight(
        scheme(f"W{bits}A16_g32_asym"), 40, 96, torch.Generator().manual_seed(3), scale_dtype=scale_dtype, zeros=(top, top)
    )
    packed = KERNEL.pack(weight)
    assert packed.tensors["scales"].dtype == scale_dtype
    for m in (1, 20):
        check(weight, m)


def test_float_zero_points() -> None:
    weight = random_weight(scheme("W4A16_g32_asym"), 40, 96, torch.Generator().manual_seed(4), scale_dtype=torch.float16)
    weight = replace(weight, zeros=weight.zeros.float() + 0.3)
    assert KERNEL.supports(problem_of(weight, "linear", "float32"), Device.cpu()) == []
    for m in (1, 20):
        check(weight, m)


@pytest.mark.parametrize("zeros", ["", "_asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_act_order(bits: int, zeros: str) -> None:
    weight = random_weight(scheme(f"W{bits}A16_g32{zeros}_actorder"), 33, 160, torch.Generator().manual_seed(5))
    assert KERNEL.supports(problem_of(weight, "linear", "float32"), Device.cpu()) == []
    for m in (1, 5, 20):
        check(weight, m)


def test_act_order_with_groups_of_unequal_length_after_a_cut() -> None:
    weight = random_weight(scheme("W4A16_g32_asym_actorder"), 33, 256, torch.Generator().manual_seed(6))
    part = weight.narrow(k=(50, 141))
    counts = torch.bincount(part.group_index.long(), minlength=8)
    assert len(set(counts.tolist())) > 1
    for m in (1, 5, 20):
        check(part, m)


def test_act_order_with_an_empty_group() -> None:
    weight = random_weight(scheme("W3A16_g16_actorder"), 20, 64, torch.Generator().manual_seed(7))
    weight = replace(weight, group_index=weight.group_index.masked_fill(weight.group_index == 1, 3))
    for m in (1, 20):
        check(weight, m)


def test_tensor_scales_and_fused_parts() -> None:
    one = random_weight(scheme("W8A16_tensor"), 20, 64, torch.Generator().manual_seed(8))
    check(one, 3)
    check(concat([one, random_weight(scheme("W8A16_tensor"), 12, 64, torch.Generator().manual_seed(9))]), 3)


def test_pre_scale_and_act_shift_are_applied_as_the_reference_does() -> None:
    weight = random_weight(scheme("W4A16_g32"), 24, 64, torch.Generator().manual_seed(10))
    weight = replace(weight, pre_scale=torch.rand(64) + 0.5, act_shift=torch.randn(64))
    x = torch.randn(5, 64)
    reference = ReferenceLinear()
    exact = reference.apply(x, reference.pack(weight)).double()
    assert rel(KERNEL.apply(x, KERNEL.pack(weight)), exact) < 1e-5


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 5, 20])
def test_bias(m: int, bias_dtype: torch.dtype) -> None:
    weight = random_weight(scheme("W4A16_g32"), 37, 64, torch.Generator().manual_seed(11))
    x, bias = torch.randn(m, 64), torch.randn(37).to(bias_dtype)
    exact = x.double() @ weight.dequantize().double().T + bias.double()
    assert rel(KERNEL.apply(x, KERNEL.pack(weight), bias), exact) < 1e-5


def test_shapes_and_strides_of_x() -> None:
    weight = random_weight(scheme("W4A16_g32"), 24, 64, torch.Generator().manual_seed(12))
    packed = KERNEL.pack(weight)
    dense = torch.randn(2, 3, 64)
    expected = KERNEL.apply(dense, packed)
    assert expected.shape == (2, 3, 24)
    strided = dense.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert torch.equal(KERNEL.apply(strided, packed), expected)
    columns = torch.randn(5, 128)[:, ::2]
    assert torch.equal(KERNEL.apply(columns, packed), KERNEL.apply(columns.contiguous(), packed))
    assert KERNEL.apply(torch.randn(64), packed).shape == (24,)
    assert KERNEL.apply(torch.randn(2, 0, 64), packed).shape == (2, 0, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [3, 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_token(value: float, m: int, dtype: torch.dtype) -> None:
    weight = random_weight(scheme("W4A16_g32_actorder"), 37, 96, torch.Generator().manual_seed(13))
    x = torch.randn(m, 96).to(dtype)
    x[1, 5] = value
    y = KERNEL.apply(x, KERNEL.pack(weight))
    hit = weight.dequantize()[:, 5] != 0
    assert not y[1, hit].isfinite().any()
    others = [i for i in range(m) if i != 1]
    assert y[others].isfinite().all()


def test_packed_bytes_are_the_true_width() -> None:
    for bits in (2, 3, 4, 8):
        weight = random_weight(scheme(f"W{bits}A16_g128"), 64, 1024, scale_dtype=torch.float16)
        codes = KERNEL.pack(weight).tensors["codes"]
        assert codes.nbytes == 64 * 1024 * bits // 8


def test_pack_again_keeps_addresses_and_takes_the_new_values() -> None:
    first = random_weight(scheme("W4A16_g32_asym_actorder"), 24, 64, torch.Generator().manual_seed(14))
    second = random_weight(scheme("W4A16_g32_asym_actorder"), 24, 64, torch.Generator().manual_seed(15))
    packed = KERNEL.pack(first)
    addresses = {name: t.data_ptr() for name, t in packed.tensors.items()}
    x = torch.randn(3, 64)
    assert KERNEL.pack(second, out=packed) is packed
    assert {name: t.data_ptr() for name, t in packed.tensors.items()} == addresses
    assert torch.equal(KERNEL.apply(x, packed), KERNEL.apply(x, KERNEL.pack(second)))


def test_packed_weight_shares_no_storage_with_the_hub() -> None:
    weight = replace(random_weight(scheme("W8A16_g32"), 16, 64, torch.Generator().manual_seed(16)), pre_scale=torch.ones(64))
    hub = {t.untyped_storage().data_ptr() for t in weight.tensors().values()}
    assert not hub & {t.untyped_storage().data_ptr() for t in KERNEL.pack(weight).tensors.values()}


@pytest.mark.parametrize("text", ["W4A16_g32_asym_actorder", "W8A16"])
def test_operation_is_well_formed_and_compiles(text: str) -> None:
    weight = random_weight(scheme(text), 24, 64, torch.Generator().manual_seed(17))
    packed = KERNEL.pack(weight)
    t = packed.tensors
    x, bias = torch.randn(3, 64), torch.randn(24)
    arguments = (
        x, t["codes"], None, t["scales"], t.get("zeros"), None, None, t["segments"], t.get("order"), None, bias, 24, packed.meta["type"], 0,
        None,
    )  # fmt: skip
    torch.library.opcheck(weight_only, arguments)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor) -> Tensor:
        return KERNEL.apply(x, packed, bias) * 2

    assert torch.equal(run(x), KERNEL.apply(x, packed, bias) * 2)


@pytest.mark.parametrize(
    ("problem", "codes"),
    [
        (Problem("embedding", scheme("W4A16_g32"), 8, 32), ["op"]),
        (Problem("linear", scheme("Wfp8A16"), 8, 32), ["scheme"]),
        (Problem("linear", scheme("W4A8_g32"), 8, 32), ["scheme"]),
        (Problem("linear", scheme("W4A16_g32_2:4"), 8, 32), ["scheme"]),
        (Problem("linear", scheme("W4A16_g32"), 8, 32, dtype="float64"), ["dtype"]),
        (
            Problem("kv_cache", scheme("W6A8_g32"), 8, 32, dtype="float64", shift=True),
            ["op", "scheme", "dtype", "scheme"],
        ),
        (Problem("lm_head", scheme("W3A16_g48_asym"), 7, 50, float_zeros=True, pre_scale=True, act_shift=True), []),
    ],
)
def test_supports_tells_every_refusal(problem: Problem, codes: list[str]) -> None:
    assert [r.code for r in KERNEL.supports(problem, Device.cpu())] == codes


def test_supports_needs_a_cpu_with_avx2() -> None:
    problem = Problem("linear", scheme("W4A16_g32"), 8, 32)
    assert KERNEL.supports(problem, Device.from_name("avx512_vnni")) == []
    assert [r.code for r in KERNEL.supports(problem, Device.from_name("neon"))] == ["device"]
    assert [r.code for r in KERNEL.supports(problem, Device.from_name("sm_90"))] == ["device"]
