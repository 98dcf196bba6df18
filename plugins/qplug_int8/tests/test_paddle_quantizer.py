"""Paddle's rule, on values where it differs from the others."""

from __future__ import annotations

import math

import pytest
import torch
from qplug_int8.paddle.quantizer import PaddleRound

from qplug_core.errors import SchemeError
from qplug_core.scheme import QuantScheme

W8, W4 = QuantScheme.parse("W8A16"), QuantScheme.parse("W4A16_channel")


def c_round(value: float) -> int:
    """lround: the nearest whole number, ties away from zero."""
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def test_both_extremes_are_exact() -> None:
    found = PaddleRound().quantize(torch.tensor([[127.0, -127.0, 63.5]]), W8)
    assert found.codes.tolist() == [[127, -127, 64]]
    assert found.dequantize()[0, :2].tolist() == [127.0, -127.0]


def test_ties_go_away_from_zero() -> None:
    found = PaddleRound().quantize(torch.tensor([[127.0, 0.5, 1.5, -2.5]]), W8)
    assert found.codes.tolist() == [[127, 1, 2, -3]]
    assert PaddleRound().quantize(torch.tensor([[7.0, 0.5, 2.5, -3.5]]), W4).codes.tolist() == [[7, 1, 3, -4]]


def test_int4_leaves_minus_8_unused() -> None:
    weight = torch.randn(32, 512, generator=torch.Generator().manual_seed(0))
    found = PaddleRound().quantize(torch.cat([weight, -weight]), W4)
    assert (int(found.codes.min()), int(found.codes.max())) == (-7, 7)


def test_codes_come_from_the_scale_before_it_is_rounded() -> None:
    """In bf16 the stored scale is up to 2**-9 off, which moves a code by a quarter: a rule that divides by it is another."""
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = PaddleRound().quantize(weight, W8)
    rows = zip(weight.float(), weight.float().abs().amax(1), strict=True)
    assert found.codes.tolist() == [[c_round(float(q)) for q in row / amax * 127] for row, amax in rows]
    by_scale = torch.round(weight.float() / found.scales.float())
    assert found.scales.dtype == torch.bfloat16
    assert float((found.codes != by_scale).float().mean()) > 0.02


def test_row_of_zeros_is_what_fmin_makes_of_nan() -> None:
    found = PaddleRound().quantize(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), W8)
    assert (found.codes.tolist(), found.scales[0].tolist()) == ([[127, 127], [127, 0]], [0.0])
    assert found.dequantize()[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["W4A16_g128", "W8A16_asym", "W8A8", "W3A16_channel", "Wfp8A16"])
def test_other_schemes_are_refused(name: str) -> None:
    with pytest.raises(SchemeError, match="choose another algorithm"):
        PaddleRound().quantize(torch.ones(2, 128), QuantScheme.parse(name))
