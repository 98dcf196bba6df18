"""The hub: every operation on it commutes with dequantize()."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qplug_core.errors import SplitRequired
from qplug_core.quantizer import RoundToNearest
from qplug_core.scheme import QuantScheme
from qplug_core.testing.weights import random_weight
from qplug_core.weight import concat, decode_scales, stack

SCHEMES = [
    "W4A16_g32",
    "W4A16_g48_asym",
    "W8A16",
    "W8A16_tensor",
    "W3A16_g32_asym_actorder",
    "Wfp8A16_b64x32",
    "Wnvfp4A16",
    "Wmxfp4A16",
    "WNF4A16",
]


def weight(name, n=96, k=160, seed=0):
    return random_weight(QuantScheme.parse(name), n, k, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SCHEMES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_narrow_is_a_cut_of_the_dequantized(name, data):
    whole = weight(name)
    n0, n1 = sorted(data.draw(st.tuples(st.integers(0, 96), st.integers(0, 96))))
    k0, k1 = sorted(data.draw(st.tuples(st.integers(0, 160), st.integers(0, 160))))
    cut = whole.narrow((n0, n1), (k0, k1)).dequantize()
    assert torch.equal(cut, whole.dequantize()[n0:n1, k0:k1])


@pytest.mark.parametrize("name", SCHEMES)
def test_concat_is_exact(name):
    first = weight(name, 96)
    second = weight(name, 40, seed=1)
    if second.group_index is not None:
        second.group_index = first.group_index
    expected = torch.cat([first.dequantize(), second.dequantize()])
    assert torch.equal(concat([first, second]).dequantize(), expected)


def test_concat_refuses_what_would_change_a_number():
    with pytest.raises(SplitRequired, match="scheme"):
        concat([weight("W4A16_g32"), weight("W8A16")])
    with pytest.raises(SplitRequired, match="act order"):
        concat([weight("W3A16_g32_asym_actorder"), weight("W3A16_g32_asym_actorder", seed=1)])


@pytest.mark.parametrize("name", SCHEMES)
def test_stack_and_expert_are_inverse(name):
    parts = [weight(name, seed=i) for i in range(3)]
    stacked = stack(parts)
    assert stacked.codes.shape == (3, 96, 160)
    assert torch.equal(stacked.dequantize(), torch.stack([p.dequantize() for p in parts]))
    assert stacked.expert(1).equal(parts[1])


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_are_rows(name):
    whole = weight(name)
    rows = torch.tensor([[3, 95], [0, 3]])
    assert torch.equal(whole.dequantize_rows(rows), whole.dequantize()[rows])


def test_formula_by_hand():
    w = RoundToNearest().quantize(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), QuantScheme.parse("W2A16_g4_asym"))
    assert w.codes.tolist() == [[0, 1, 2, 3]]
    assert w.zeros.tolist() == [[0]]
    assert w.dequantize().tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_e8m0_is_a_power_of_two_and_255_is_nan():
    values = decode_scales(torch.tensor([0, 127, 130, 254, 255], dtype=torch.uint8), "e8m0")
    assert values[:4].tolist() == [2.0**-127, 1.0, 8.0, 2.0**127]
    assert values[4].isnan()


def test_one_rounding_to_16_bit():
    whole = weight("W4A16_g32")
    assert torch.equal(whole.dequantize(torch.bfloat16), whole.dequantize().to(torch.bfloat16))


def test_a_window_outside_is_an_error():
    with pytest.raises(IndexError):
        weight("W8A16").narrow(n=(0, 97))
