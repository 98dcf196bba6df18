from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qplug_core.device import Device
from qplug_core.kernel import problem_of
from qplug_core.kernels import triton_mixed
from qplug_core.kernels.triton_mixed import TritonMixed
from qplug_core.scheme import QuantScheme
from qplug_core.testing.interpreter import need_interpreter
from qplug_core.testing.weights import random_weight
from qplug_core.weight import QuantWeight

sys.path.insert(0, str(Path(__file__).parent))
from definition import distance, exact

need_interpreter()

INT8 = (
    "W4A8_g128", "W4A8_g32_asym", "W4A8_channel_asym", "W4A8_channel_static", "W4A8_g128_a:tensor", "W4A8_g128_a:rule=127.5", "W4A8_g25",
    "W4A8_g32_asym_actorder", "W2A8_g64_asym", "W8A8_g128", "W8A8_g32_asym", "W8A8_channel_asym",
)  # fmt: skip
FP8 = (
    "W4Afp8_g128", "W4Afp8_g32_asym", "W4Afp8_channel", "W4Afp8_channel_asym", "W4Afp8_g128_static", "W4Afp8_g64_a:tensor",
    "W4Afp8_g16", "Wmxfp4Afp8", "Wnvfp4Afp8_g32", "W2Afp8_g128",
)  # fmt: skip


class Int8(TritonMixed):
    name = "test.triton_w4a8"
    numbers = ("int2", "int4", "int8")
    act = "int8"


class Fp8(TritonMixed):
    name = "test.triton_w4afp8"
    numbers = ("int2", "int4", "fp4_e2m1")
    act = "fp8_e4m3"


class Fnuz(Fp8):
    fnuz = True


def make(text: str, n: int, k: int, zeros: tuple[int, int] | None = None) -> QuantWeight:
    return random_weight(
        QuantScheme.parse(text), n, k, torch.Generator().manual_seed(n + k), scale_dtype=torch.float16, zeros=zeros
    )


@pytest.mark.parametrize(
    ("kernel", "text"), [(Int8(), t) for t in INT8] + [(Fp8(), t) for t in FP8] + [(Fnuz(), t) for t in (*FP8[:2], FP8[7])]
)
def test_product_of_ragged_shapes(kernel: TritonMixed, text: str) -> None:
    for i, (n, k) in enumerate(((60, 16), (33, 100), (70, 257))):
        weight, dtype = make(text, n, k), (torch.bfloat16, torch.float16)[i % 2]
        x = torch.randn((2, 5, 18)[i], k, generator=torch.Generator().manual_seed(i)).to(dtype)
        bias = torch.linspace(-1, 1, n).to(dtype) if i else None
        y = kernel.apply(x, kernel.pack(weight), bias)
        expected = exact(x, weight) + (0 if bias is None else bias.double())
        assert y.dtype == dtype
        assert distance(y, expected) < (2.5e-3 if dtype == torch.bfloat16 else 5e-4)


@pytest.mark.parametrize("kernel", [Int8(), Fp8(), Fnuz()])
@pytest.mark.parametrize(("zeros", "kind"), [((0, 15), "int"), ((-100, 900), "real")])
def test_zero_points_of_any_value(kernel: TritonMixed, zeros: tuple[int, int], kind: str) -> None:
    weight = make("W4A8_g32_asym" if kernel.act == "int8" else "W4Afp8_g32_asym", 20, 192, zeros)
    packed = kernel.pack(weight)
    assert packed.meta["kind"] == kind
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(0)).half()
    assert distance(kernel.apply(x, packed), exact(x, weight)) < 5e-4


def test_integer_products_on_given_codes_are_exact() -> None:
    weight = make("W4A8_channel_asym", 24, 320)
    weight = replace(weight, scales=torch.ones_like(weight.scales), act_scale=None)
    x = torch.randint(-127, 128, (5, 320), generator=torch.Generator().manual_seed(3))
    x[:, 0] = 127  # So that the scale is 1 and codes are the values.
    y = Int8().apply(x.half(), Int8().pack(weight)).double()
    assert torch.equal(y.half(), (x.double() @ weight.dequantize().double().t()).half())


def test_split_k_gives_what_one_program_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel, text in ((Int8(), "W4A8_g128_asym"), (Fp8(), "W4Afp8_channel")):
        weight = make(text, 40, 1100)
        x = torch.randn(3, 1100, generator=torch.Generator().manual_seed(1)).half()
        results = []
        for splits in (1, 3):
            monkeypatch.setattr(triton_mixed, "splits_of", lambda *_, s=splits: s)
            results.append(kernel.apply(x, kernel.pack(weight), torch.ones(40)))
        assert distance(results[1], results[0].double()) < 2e-4


def test_nan_and_inf_make_their_tokens_so_and_no_other() -> None:
    for kernel, text in ((Int8(), "W4A8_g32"), (Fp8(), "W4Afp8_g32")):
        x = torch.ones(3, 64, dtype=torch.bfloat16)
        x[1, 7], x[2, 3] = float("nan"), float("inf")
        y = kernel.apply(x, kernel.pack(make(text, 20, 64)))
        assert y[1].isnan().all()
        assert not y[2].isfinite().any()
        assert y[0].isfinite().all()


def test_no_tokens_and_leading_axes_and_strides() -> None:
    packed = Int8().pack(make("W4A8_g32", 48, 96))
    assert Int8().apply(torch.empty(0, 96, dtype=torch.bfloat16), packed).shape == (0, 48)
    x = torch.randn(2, 3, 192, dtype=torch.bfloat16)[..., ::2]
    assert torch.equal(Int8().apply(x, packed).view(6, 48), Int8().apply(x.reshape(6, 96), packed))


def test_pre_scale_meets_x_before_it_is_quantized() -> None:
    weight = replace(make("W4Afp8_g32_actorder", 33, 96), pre_scale=torch.linspace(0.5, 2, 96))
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(4)).half()
    assert weight.pre_scale is not None
    expected = exact(x * weight.pre_scale.half(), replace(weight, pre_scale=None))
    assert distance(Fp8().apply(x, Fp8().pack(weight)), expected) < 1e-3


@pytest.mark.parametrize(
    ("kernel", "text", "device", "code"),
    [
        (Int8(), "W4A8_g128", "sm_80", ""),
        (Fp8(), "W4Afp8_g128", "sm_89", ""),
        (Fp8(), "W4Afp8_g128", "gfx942", ""),
        (Fp8(), "W4Afp8_g128", "sm_80", "device"),
        (Fp8(), "W4A8_g128", "sm_90", "scheme"),
        (Int8(), "W4A8_g128_a:asym", "sm_90", "zeros"),
        (Int8(), "W4A8_g128_a:g128", "sm_90", "group"),
        (Fp8(), "Wfp8Afp8", "sm_90", "scheme"),
    ],
)
def test_refusals(kernel: TritonMixed, text: str, device: str, code: str) -> None:
    problem = problem_of(make(text, 64, 256), "linear", "bfloat16")
    assert {r.code for r in kernel.supports(problem, Device.from_name(device))} == ({code} if code else set())
