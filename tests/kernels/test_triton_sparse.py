from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qplug_core.device import Device
from qplug_core.errors import SchemeError
from qplug_core.kernel import problem_of
from qplug_core.kernels.triton_scaled import TritonScaled
from qplug_core.scheme import QuantScheme
from qplug_core.testing.interpreter import need_interpreter
from qplug_core.testing.weights import random_weight
from qplug_core.weight import QuantWeight

sys.path.insert(0, str(Path(__file__).parent))
from definition import distance, exact

need_interpreter()


class Int8(TritonScaled):
    name = "test.triton_w8a8"
    number = "int8"


class Fp8(TritonScaled):
    name = "test.triton_wfp8afp8"
    number = "fp8_e4m3"


class Fnuz(Fp8):
    fnuz = True


def make(text: str, n: int, k: int, seed: int = 0) -> QuantWeight:
    """A weight of which two of every four columns are kept, others in each row."""
    generator = torch.Generator().manual_seed(seed + n)
    weight = random_weight(QuantScheme.parse(text.replace("_2:4", "")), n, k, generator)
    dropped = torch.rand(n, k // 4, 4, generator=generator).argsort(-1)[..., :2]
    held = weight.codes.view(torch.uint8).view(n, k // 4, 4).scatter(2, dropped, 0).view(n, k)
    return replace(weight, codes=held.view(weight.codes.dtype), scheme=QuantScheme.parse(text))


@pytest.mark.parametrize(
    ("kernel", "text"),
    [
        (Int8(), "W8A8_2:4"),
        (Int8(), "W8A8_a:asym_2:4"),
        (Int8(), "W8A8_tensor_static_2:4"),
        (Fp8(), "Wfp8Afp8_2:4"),
        (Fnuz(), "Wfp8Afp8_2:4"),
    ],
)
def test_product_of_ragged_shapes(kernel: TritonScaled, text: str) -> None:
    for n, k, m in ((20, 16, 2), (33, 516, 18)):
        weight = make(text, n, k)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).half()
        bias = torch.linspace(-1, 1, n)
        y = kernel.apply(x, kernel.pack(weight), bias)
        assert distance(y, exact(x, weight) + bias.double()) < 5e-4


def test_packed_weights_take_five_bits_of_eight() -> None:
    packed = Int8().pack(make("W8A8_2:4", 64, 512))
    assert packed.tensors["values"].nbytes + packed.tensors["places"].nbytes == 64 * 512 * 5 // 8


@pytest.mark.parametrize(("kernel", "text"), [(Int8(), "W8A8_a:asym_2:4"), (Fp8(), "Wfp8Afp8_2:4")])
def test_one_launch_gives_what_the_experts_give_one_by_one(kernel: TritonScaled, text: str) -> None:
    packs = [kernel.pack(make(text, 24, 256, e)) for e in range(3)]
    stack = kernel.pack(make(text, 24, 256))
    stack.tensors = {name: torch.stack([p.tensors[name] for p in packs]) for name in stack.tensors}
    x = torch.randn(22, 256, generator=torch.Generator().manual_seed(9)).half()
    y = kernel.apply_experts(x, stack, torch.tensor([2, 2, 20]))
    assert torch.equal(y[:2], kernel.apply(x[:2], packs[0]))
    assert torch.equal(y[2:20], kernel.apply(x[2:20], packs[2]))
    assert not y[20:].any()


def test_a_weight_that_keeps_three_of_four_is_refused() -> None:
    weight = make("W8A8_2:4", 8, 64)
    weight.codes[3, :3] = 5
    with pytest.raises(SchemeError, match="three of four neighbouring columns"):
        Int8().pack(weight)


def test_minus_zero_is_not_kept() -> None:
    weight = make("Wfp8Afp8_2:4", 8, 64)
    held = weight.codes.view(torch.uint8)
    weight = replace(weight, codes=torch.where(held == 0, 0x80, held).to(torch.uint8).view(torch.float8_e4m3fn))
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).half()
    assert distance(Fp8().apply(x, Fp8().pack(weight)), exact(x, weight)) < 5e-4


def test_no_tokens_and_nan() -> None:
    packed = Fp8().pack(make("Wfp8Afp8_2:4", 16, 64))
    assert Fp8().apply(torch.empty(0, 64).half(), packed).shape == (0, 16)
    x = torch.ones(3, 64).half()
    x[1, 5] = float("nan")
    y = Fp8().apply(x, packed)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_sparse_weights_with_scales_by_block_are_refused() -> None:
    problem = problem_of(make("Wfp8Afp8_b128x128_2:4", 128, 256), "linear", "bfloat16")
    assert [r.code for r in Fp8().supports(problem, Device.from_name("sm_90"))] == ["scheme"]
