from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qplug_core.decl import KernelDecl
from qplug_core.device import Device
from qplug_core.errors import SchemeError
from qplug_core.kernel import Kernel, Problem, problem_of
from qplug_core.kernels import triton_weight_only
from qplug_core.kernels.triton_pack import columns_of, pack_codes
from qplug_core.kernels.triton_weight_only import TritonWeightOnly, pack
from qplug_core.scheme import QuantScheme
from qplug_core.testing.base import KernelCase
from qplug_core.testing.interpreter import need_interpreter
from qplug_core.testing.kernels import KernelConformance
from qplug_core.testing.weights import random_weight
from qplug_core.weight import QuantWeight

need_interpreter()

NUMBERS = ("int2", "int3", "int4", "int8", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "nf4", "fp4_bnb", "iq4nl")
SHAPES = ((1, 16), (7, 48), (33, 100), (130, 257), (96, 320))
SCHEMES = (
    "W4A16_g128", "W4A16_g128_asym", "W4A16_g64_asym", "W4A16_g32", "W4A16_channel_asym", "W4A16_g32_actorder", "W4A16_g25_asym",
    "W8A16", "W8A16_tensor", "W8A16_g32_asym", "W8A16_g128_asym_actorder", "W2A16_g64_asym", "W2A16_g16", "W2A16_channel",
    "W3A16_g128", "W3A16_g32_asym_actorder", "W3A16_channel_asym", "W3A16_g48",
    "Wfp8A16", "Wfp8A16_tensor", "Wfp8A16_b128x128", "Wfp8A16_b64x32", "Wfp8e5m2A16", "Wmxfp8A16",
    "Wnvfp4A16", "Wmxfp4A16", "WNF4A16", "Wfp4bnbA16", "Wiq4nlA16",
)  # fmt: skip


class WeightOnly(TritonWeightOnly):
    name = "test.triton_weight_only"
    numbers = NUMBERS


KERNEL = WeightOnly()


def make(text: str, n: int, k: int, scale_dtype: torch.dtype = torch.float16) -> QuantWeight:
    return random_weight(QuantScheme.parse(text), n, k, torch.Generator().manual_seed(n * k), scale_dtype=scale_dtype)


def distance(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def check(weight: QuantWeight, m: int, dtype: torch.dtype, bias: bool = True, kernel: Kernel = KERNEL) -> None:
    """apply of random x against float64 on the definition: what is lost is the rounding of the result."""
    x = torch.randn(m, weight.k, generator=torch.Generator().manual_seed(m)).to(dtype)
    b = torch.linspace(-1, 1, weight.n).to(dtype) if bias else None
    y = kernel.apply(x, kernel.pack(weight), b)
    assert y.shape == (m, weight.n)
    assert y.dtype == dtype
    expected = x.double() @ weight.dequantize().double().t()
    expected = expected if b is None else expected + b.double()
    # Half a step of the result is 2**-9 and 2**-12 of it; rounding of many values is 0.6 of that on average.
    assert distance(y, expected) < (2.5e-3 if dtype == torch.bfloat16 else 5e-4)


@pytest.mark.parametrize("text", SCHEMES)
def test_product_of_ragged_shapes(text: str) -> None:
    for i, (n, k) in enumerate(SHAPES):
        dtype = torch.bfloat16 if i % 2 else torch.float16
        check(make(text, n, k), (1, 5, 18)[i % 3], dtype, bias=i % 2 == 0)


@pytest.mark.parametrize(
    "text", ["W4A16_g32_asym_actorder", "W3A16_g128", "W2A16_channel_asym", "Wfp8A16_b128x128", "Wnvfp4A16", "WNF4A16"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_tokens_take_a_written_out_weight_some_rows_at_a_time(
    text: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_weight_only, "SCRATCH", 2 * 257 * 64)
    weight = make(text, 130, 257)
    x = torch.randn(150, 257, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = KERNEL.apply(x, KERNEL.pack(weight))
    expected = x.double() @ weight.dequantize().double().t()
    assert distance(y, expected) < (4e-3 if dtype == torch.bfloat16 else 5e-4)


def test_split_k_gives_what_one_program_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make("W4A16_g128_asym", 40, 1100)
    x = torch.randn(3, 1100, dtype=torch.float16, generator=torch.Generator().manual_seed(1))
    packed = KERNEL.pack(weight)
    split = KERNEL.apply(x, packed)
    monkeypatch.setattr(triton_weight_only, "splits_of", lambda *_: 1)
    whole = KERNEL.apply(x, packed)
    assert distance(split, whole.double()) < 2e-4
    monkeypatch.setattr(triton_weight_only, "splits_of", lambda *_: 3)
    assert distance(KERNEL.apply(x, packed), whole.double()) < 2e-4


def test_no_tokens_and_leading_axes_and_strides() -> None:
    weight = make("W4A16_g32", 48, 96)
    packed = KERNEL.pack(weight)
    assert KERNEL.apply(torch.empty(0, 96, dtype=torch.bfloat16), packed).shape == (0, 48)
    x = torch.randn(2, 3, 192, dtype=torch.bfloat16)[..., ::2]
    assert torch.equal(KERNEL.apply(x, packed).view(6, 48), KERNEL.apply(x.reshape(6, 96).contiguous(), packed))
    rows = torch.randn(4, 200, dtype=torch.bfloat16)
    assert torch.equal(KERNEL.apply(rows[:, :96], packed), KERNEL.apply(rows[:, :96].contiguous(), packed))


@pytest.mark.parametrize("zeros", [(-3, 16), (-300, 900)])
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_of_any_value(bits: int, zeros: tuple[int, int]) -> None:
    scheme = QuantScheme.parse(f"W{bits}A16_g32_asym")
    weight = random_weight(scheme, 40, 96, torch.Generator().manual_seed(3), scale_dtype=torch.float16, zeros=zeros)
    check(weight, 4, torch.float16)


def test_zero_points_that_are_no_integers() -> None:
    weight = make("W4A16_g64_asym", 40, 128)
    weight = replace(weight, zeros=torch.full(weight.scales.shape, 7.3, dtype=torch.float16))
    check(weight, 4, torch.float16)


def test_groups_of_unequal_length_as_a_cut_through_act_order_leaves_them() -> None:
    whole = make("W4A16_g64_asym_actorder", 48, 512)
    cut = whole.narrow(k=(100, 300))
    assert cut.group_index is not None
    assert cut.group_index.bincount().unique().numel() > 1
    check(cut, 5, torch.float16)


def test_nan_codes_of_fp8_make_the_rows_nan_that_hold_them() -> None:
    weight = make("Wfp8A16", 20, 64)
    weight.codes.view(torch.uint8)[3, 5] = 0x7F
    y = KERNEL.apply(torch.ones(2, 64, dtype=torch.bfloat16), KERNEL.pack(weight))
    assert y[:, 3].isnan().all()
    assert not y[:, :3].isnan().any()
    assert not y[:, 4:].isnan().any()


def test_global_scales_that_divide() -> None:
    weight = make("Wnvfp4A16", 33, 96)
    check(replace(weight, global_scale=torch.tensor(27.0), global_div=True), 3, torch.bfloat16)


def test_every_byte_of_fp8_is_decoded_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for text, dtype in (("Wfp8A16", torch.float8_e4m3fn), ("Wfp8e5m2A16", torch.float8_e5m2)):
        values = codes.view(dtype).float()
        weight = make(text, 256, 16)
        held = torch.where(values.isfinite(), codes, 0)
        weight = replace(weight, codes=held.view(dtype)[:, None].repeat(1, 16).contiguous(), scales=torch.ones(256, 1))
        x = torch.zeros(1, 16, dtype=torch.float16)
        x[0, 3] = 1.0
        assert torch.equal(KERNEL.apply(x, KERNEL.pack(weight))[0].float(), held.view(dtype).float())


def test_codes_take_their_true_width() -> None:
    for bits in (2, 3, 4, 8):
        weight = make(f"W{bits}A16_g128", 64, 512)
        packed, order = pack_codes(weight.codes.view(torch.uint8), bits, columns_of(weight, bits))
        assert packed.nbytes == 64 * 512 * bits // 8
        assert order is None


@pytest.mark.parametrize("m", [2, 129])
def test_pre_scale_and_act_shift(m: int) -> None:
    weight = replace(make("W4A16_g32", 40, 96), pre_scale=torch.linspace(0.5, 2, 96), act_shift=torch.linspace(-1, 1, 96))
    x = torch.randn(m, 96, generator=torch.Generator().manual_seed(5)).half()
    y = KERNEL.apply(x, KERNEL.pack(weight))
    assert weight.act_shift is not None
    assert weight.pre_scale is not None
    expected = ((x - weight.act_shift.half()) * weight.pre_scale.half()).double() @ weight.dequantize().double().t()
    assert distance(y, expected) < 5e-4


def test_refusals() -> None:
    problem = problem_of(make("W4A16_g128", 64, 256), "linear", "bfloat16")
    gpu = Device.from_name("sm_80")
    assert KERNEL.supports(problem, gpu) == []
    assert KERNEL.supports(problem, Device.from_name("gfx942")) == []
    changed = {"op": "embedding", "dtype": "float32", "shift": True, "encoding": "x"}
    for name, value in changed.items():
        codes = [r.code for r in KERNEL.supports(replace(problem, **{name: value}), gpu)]
        assert codes == [{"op": "op", "dtype": "dtype", "shift": "zeros", "encoding": "scheme"}[name]]
    assert [r.code for r in KERNEL.supports(problem, Device.from_name("sm_75"))] == ["device"]
    quantized = Problem("linear", QuantScheme.parse("Wfp8Afp8"), 64, 256)
    assert [r.code for r in KERNEL.supports(quantized, gpu)] == ["scheme"]
    dropping = WeightOnly()
    dropping.drops_act = True
    assert dropping.supports(quantized, gpu) == []
    with pytest.raises(SchemeError):
        QuantScheme.parse("Wint9A16")


def test_conformance_of_storage_and_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    decl = KernelDecl(
        "test.triton_weight_only", impl=f"{__name__}:WeightOnly", ops=("linear",), schemes=("*",), devices=("sm_80+",),
        dtypes=("bfloat16", "float16"),
    )  # fmt: skip
    case = KernelCase(decl, QuantScheme.parse("W4A16_g128_asym"), Device.from_name("sm_90"), False)
    monkeypatch.setattr("qplug_core.testing.kernels.load", lambda impl: KERNEL)
    conformance = KernelConformance()
    conformance.test_pack_into_existing_storage(case)
    conformance.test_custom_op(case)
    conformance.test_unusual_weights_are_refused_or_right(case)
    conformance.test_refusals_say_why(case)


def test_a_packed_weight_shares_no_storage_with_its_source() -> None:
    weight = make("W8A16", 64, 128)
    pointers = {t.data_ptr() for t in weight.tensors().values()}
    assert not pointers & {t.data_ptr() for t in pack(weight, "x").tensors.values()}
