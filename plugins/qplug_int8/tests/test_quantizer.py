"""The two scale rules, on values where they differ."""

from __future__ import annotations

import pytest
import torch
from qplug_int8.quantizer import Amax127, Amax128

from qplug_core.errors import SchemeError
from qplug_core.quantizer import RoundToNearest
from qplug_core.scheme import QuantScheme

W8 = QuantScheme.parse("W8A16")


def test_amax128_loses_a_128th_of_the_positive_extreme() -> None:
    weight = torch.tensor([[1.0, -0.5], [-1.0, 0.5]])
    found = Amax128().quantize(weight, W8)
    assert found.codes.tolist() == [[127, -64], [-128, 64]]
    assert found.dequantize().tolist() == [[0.9921875, -0.5], [-1.0, 0.5]]


def test_amax127_keeps_both_extremes() -> None:
    weight = torch.tensor([[127.0, -127.0]])
    found = Amax127().quantize(weight, W8)
    assert found.codes.tolist() == [[127, -127]]
    assert found.dequantize().equal(weight)


def test_ties() -> None:
    assert Amax128().quantize(torch.tensor([[-128.0, 0.5, 1.5, -2.5]]), W8).codes.tolist() == [[-128, 0, 2, -2]]
    assert Amax127().quantize(torch.tensor([[127.0, 0.5, 1.5, -2.5]]), W8).codes.tolist() == [[127, 1, 2, -3]]


def test_scales_have_the_dtype_of_the_weight() -> None:
    assert Amax128().quantize(torch.ones(2, 4, dtype=torch.bfloat16), W8).scales.dtype == torch.bfloat16


def test_all_three_rules_differ() -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    scales = [q.quantize(weight, W8).scales for q in (Amax127(), Amax128(), RoundToNearest())]
    assert len({float(s[0]) for s in scales}) == 3


@pytest.mark.parametrize("name", ["W4A16_g128", "W8A16_g32", "W8A16_asym", "W8A8_static"])
def test_other_schemes_are_refused(name: str) -> None:
    with pytest.raises(SchemeError, match=r"W8|static"):
        Amax128().quantize(torch.ones(2, 128), QuantScheme.parse(name))
