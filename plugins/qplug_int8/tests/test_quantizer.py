"""The two scale rules, on values where they differ."""

from __future__ import annotations

import pytest
import torch
from qplug_int8.paddle.quantizer import PaddleRound
from qplug_int8.quantizer import Amax128, ExpertsInt8

from qplug_core.errors import SchemeError
from qplug_core.quantizer import RoundToNearest
from qplug_core.scheme import QuantScheme

W8 = QuantScheme.parse("W8A16")


def test_amax128_loses_a_128th_of_the_positive_extreme() -> None:
    weight = torch.tensor([[1.0, -0.5], [-1.0, 0.5]])
    found = Amax128().quantize(weight, W8)
    assert found.codes.tolist() == [[127, -64], [-128, 64]]
    assert found.dequantize().tolist() == [[0.9921875, -0.5], [-1.0, 0.5]]


def test_paddle_keeps_both_extremes() -> None:
    weight = torch.tensor([[127.0, -127.0]])
    found = PaddleRound().quantize(weight, W8)
    assert found.codes.tolist() == [[127, -127]]
    assert found.dequantize().equal(weight)


def test_ties() -> None:
    assert Amax128().quantize(torch.tensor([[-128.0, 0.5, 1.5, -2.5]]), W8).codes.tolist() == [[-128, 0, 2, -2]]
    assert PaddleRound().quantize(torch.tensor([[127.0, 0.5, 1.5, -2.5]]), W8).codes.tolist() == [[127, 1, 2, -3]]


def test_scales_have_the_dtype_of_the_weight() -> None:
    assert Amax128().quantize(torch.ones(2, 4, dtype=torch.bfloat16), W8).scales.dtype == torch.bfloat16


def test_paddle_rounds_before_its_scale_is_stored() -> None:
    """The codes are those of ``w / amax * 127`` in float32; a division by the stored bfloat16 scale gives others."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = PaddleRound().quantize(weight, W8)
    quotients = weight.float() / weight.float().abs().amax(1, keepdim=True) * 127
    expected = torch.tensor([[int(q + 0.5) if q >= 0 else -int(-q + 0.5) for q in row] for row in quotients.tolist()])
    assert torch.equal(found.codes.long(), expected)
    assert found.codes.abs().amax(1).tolist() == [127] * 64
    divided = torch.round(weight.float() / found.scales.float()).clamp(-127, 127)
    assert 0.01 < float((divided != found.codes).float().mean()) < 0.5


def test_paddle_half_way_is_away_from_zero() -> None:
    weight = torch.tensor([[127.0, 62.5, -62.5, 63.5, -63.5, 0.5, -0.5]])
    assert PaddleRound().quantize(weight, W8).codes.tolist() == [[127, 63, -63, 64, -64, 1, -1]]
    assert ExpertsInt8().quantize(weight, W8).codes.tolist() == [[127, 62, -62, 64, -64, 0, 0]]


def test_experts_int8_divides_in_the_dtype_of_the_weight() -> None:
    """vLLM: bfloat16 quotients, then ties to even. The same weight in float32 has other codes."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = ExpertsInt8().quantize(weight, W8)
    scales = weight.abs().amax(1, keepdim=True) / 127
    assert torch.equal(found.scales, scales)
    assert torch.equal(found.codes, (weight / scales).round().clamp(-127, 127).to(torch.int8))
    assert not torch.equal(found.codes, torch.round(weight.float() / scales.float()).clamp(-127, 127).to(torch.int8))


def test_golden_extremes() -> None:
    """One row with both extremes: RTP-LLM loses 1/128 of the positive one, Paddle neither."""
    weight = torch.tensor([[3.0, -3.0]])
    assert Amax128().quantize(weight, W8).dequantize().tolist() == [[0.9921875 * 3.0, -3.0]]
    assert PaddleRound().quantize(weight, W8).codes.tolist() == [[127, -127]]


def test_all_three_rules_differ() -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    scales = [q.quantize(weight, W8).scales for q in (PaddleRound(), Amax128(), RoundToNearest())]
    assert len({float(s[0]) for s in scales}) == 3


@pytest.mark.parametrize("name", ["W4A16_g128", "W8A16_g32", "W8A16_asym", "W8A8_static"])
def test_other_schemes_are_refused(name: str) -> None:
    with pytest.raises(SchemeError, match=r"W8|static"):
        Amax128().quantize(torch.ones(2, 128), QuantScheme.parse(name))
