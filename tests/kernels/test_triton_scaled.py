from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qplug_core.device import Device
from qplug_core.kernel import problem_of
from qplug_core.kernels import triton_scaled
from qplug_core.kernels.triton_activations import quantize
from qplug_core.kernels.triton_scaled import TritonScaled
from qplug_core.reference.activation import quantize_activation
from qplug_core.scheme import QuantScheme
from qplug_core.testing.interpreter import need_interpreter
from qplug_core.testing.weights import random_weight
from qplug_core.weight import QuantWeight

sys.path.insert(0, str(Path(__file__).parent))
from definition import distance, exact

need_interpreter()

SHAPES = ((1, 16), (33, 100), (130, 257))
INT8 = (
    "W8A8", "W8A8_a:asym", "W8A8_tensor_a:rule=127.5", "W8A8_a:rule=127", "W8A8_static", "W8A8_a:tensor.static.asym", "W8A8_a:tensor",
    "W8A8_a:asym.rule=127.5",
)  # fmt: skip
FP8 = (
    "Wfp8Afp8", "Wfp8Afp8_tensor", "Wfp8Afp8_tensor_static", "Wfp8Afp8_a:tensor", "Wfp8Afp8_a:rule=ub1200", "Wfp8Afp8_b128x128",
    "Wfp8Afp8_b64x32",
)  # fmt: skip


class Int8(TritonScaled):
    name = "test.triton_w8a8"
    number = "int8"


class Fp8(TritonScaled):
    name = "test.triton_wfp8afp8"
    number = "fp8_e4m3"


class Fnuz(Fp8):
    fnuz = True


def make(text: str, n: int, k: int) -> QuantWeight:
    return random_weight(QuantScheme.parse(text), n, k, torch.Generator().manual_seed(n + k))


@pytest.mark.parametrize(
    ("kernel", "text"), [(Int8(), t) for t in INT8] + [(Fp8(), t) for t in FP8] + [(Fnuz(), t) for t in FP8[:3] + FP8[5:6]]
)
def test_product_of_ragged_shapes(kernel: TritonScaled, text: str) -> None:
    # Narrow groups are many steps, and a step of the interpreter takes long.
    for i, (n, k) in enumerate(SHAPES[: 2 if "64x32" in text else None]):
        weight, dtype = make(text, n, k), (torch.bfloat16, torch.float16)[i % 2]
        x = torch.randn((1, 5, 18)[i], k, generator=torch.Generator().manual_seed(i)).to(dtype)
        bias = torch.linspace(-1, 1, n).to(dtype) if i else None
        y = kernel.apply(x, kernel.pack(weight), bias)
        expected = exact(x, weight) + (0 if bias is None else bias.double())
        assert y.dtype == dtype
        assert distance(y, expected) < (2.5e-3 if dtype == torch.bfloat16 else 5e-4)


@pytest.mark.parametrize(
    "text",
    ["W8A8", "W8A8_a:asym", "W8A8_a:asym.rule=127.5", "W8A8_a:rule=127.5", "W8A8_static", "W8A8_a:tensor.static.asym"],
)
def test_integer_codes_are_those_of_the_float32_quantizer(text: str) -> None:
    weight = make(text, 16, 300)
    packed = Int8().pack(weight)
    meta, act = packed.meta, weight.scheme.act
    assert act is not None
    x = torch.randn(9, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[0], x[1, :4] = 0.0, 40.0
    codes, scales, zeros = quantize(
        x, packed.tensors.get("act_scale"), packed.tensors.get("act_zero"), 384, 0, "int8", act.symmetric, meta["divisor"],
        meta["lowest"], 0.0,
    )  # fmt: skip
    expected = quantize_activation(x.float(), act, weight.act_scale, weight.act_zero)
    assert torch.equal(codes[:, :300], expected.codes)
    assert torch.equal(scales[0], expected.scales.float().reshape(-1).expand(9))
    if expected.zeros is not None:
        assert torch.equal(zeros, expected.zeros.float().reshape(-1).expand(9))


@pytest.mark.parametrize("group", [0, 128])
def test_fp8_codes_are_those_of_the_float32_quantizer(group: int) -> None:
    act = QuantScheme.parse("Wfp8Afp8_b128x128" if group else "Wfp8Afp8").act
    assert act is not None
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(2)).half()
    codes, scales, _ = quantize(x, None, None, 384, group, "fp8", True, 448.0, -128.0, 0.0)
    expected = quantize_activation(x.float(), act)
    assert torch.equal(codes[:, :300].view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(scales.t(), expected.scales)
    assert not codes[:, 300:].view(torch.uint8).any()


def test_fnuz_codes_are_the_same_numbers() -> None:
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(3)).half()
    plain, scales, _ = quantize(x, None, None, 256, 0, "fp8", True, 448.0, -128.0, 0.0)
    fnuz, twice, _ = quantize(x, None, None, 256, 0, "fnuz", True, 448.0, -128.0, 0.0)
    assert fnuz.dtype == torch.float8_e4m3fnuz
    assert torch.equal(fnuz.float() * twice[0][:, None], plain.float() * scales[0][:, None])


def test_fnuz_weights_are_the_same_numbers_for_every_byte() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    held = torch.where(values.float().isfinite(), values.view(torch.uint8), 0)
    weight = replace(make("Wfp8Afp8", 256, 16), codes=held.view(torch.float8_e4m3fn)[:, None].repeat(1, 16).contiguous())
    plain, fnuz = Fp8().pack(weight).tensors, Fnuz().pack(weight).tensors
    assert torch.equal(plain["codes"].float() * plain["scales"][:, None], fnuz["codes"].float() * fnuz["scales"][:, None])


def test_nan_and_inf_make_their_tokens_so_and_no_other() -> None:
    for kernel, text in ((Int8(), "W8A8"), (Fp8(), "Wfp8Afp8")):
        weight = make(text, 20, 64)
        x = torch.ones(3, 64, dtype=torch.bfloat16)
        x[1, 7], x[2, 3] = float("nan"), float("inf")
        y = kernel.apply(x, kernel.pack(weight))
        assert y[1].isnan().all()
        assert not y[2].isfinite().any()
        assert y[0].isfinite().all()


def test_split_k_gives_what_one_program_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel, text in ((Int8(), "W8A8_a:asym"), (Fp8(), "Wfp8Afp8_b128x128")):
        weight = make(text, 40, 1100)
        x = torch.randn(3, 1100, generator=torch.Generator().manual_seed(1)).half()
        results = []
        for splits in (1, 3):
            monkeypatch.setattr(triton_scaled, "splits_of", lambda *_, s=splits: s)
            results.append(kernel.apply(x, kernel.pack(weight)))
        assert distance(results[1], results[0].double()) < 2e-4


def test_no_tokens_and_leading_axes() -> None:
    kernel, weight = Int8(), make("W8A8", 48, 96)
    packed = kernel.pack(weight)
    assert kernel.apply(torch.empty(0, 96, dtype=torch.bfloat16), packed).shape == (0, 48)
    x = torch.randn(2, 3, 192, dtype=torch.bfloat16)[..., ::2]
    assert torch.equal(kernel.apply(x, packed).view(6, 48), kernel.apply(x.reshape(6, 96), packed))


def test_a_static_scale_that_divides_and_pre_scale() -> None:
    weight = replace(
        make("Wfp8Afp8_static", 33, 100), act_scale=torch.tensor(50.0), act_div=True, pre_scale=torch.linspace(0.5, 2, 100)
    )
    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(4)).half()
    assert weight.pre_scale is not None
    expected = exact(x * weight.pre_scale.half(), replace(weight, pre_scale=None))
    assert distance(Fp8().apply(x, Fp8().pack(weight)), expected) < 1e-3


@pytest.mark.parametrize(
    ("kernel", "text", "device", "code"),
    [
        (Int8(), "W8A8", "sm_80", ""),
        (Fp8(), "Wfp8Afp8", "sm_89", ""),
        (Fp8(), "Wfp8Afp8", "gfx942", ""),
        (Fp8(), "Wfp8Afp8", "sm_80", "device"),
        (Fp8(), "Wfp8Afp8", "gfx90a", "device"),
        (Int8(), "Wfp8Afp8", "sm_90", "scheme"),
        (Int8(), "W8A8_g128", "sm_90", "group"),
        (Fp8(), "Wfp8Afp8_b128x128_a:g64", "sm_90", "group"),
        (Int8(), "W8A8_asym", "sm_90", "zeros"),
    ],
)
def test_refusals(kernel: TritonScaled, text: str, device: str, code: str) -> None:
    problem = problem_of(make(text, 64, 256), "linear", "bfloat16")
    assert {r.code for r in kernel.supports(problem, Device.from_name(device))} == ({code} if code else set())
