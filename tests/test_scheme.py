"""Scheme names: the field's grammar, and a round trip for everything that can be said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qplug_core.errors import SchemeError
from qplug_core.scheme import NUMBER_TYPES, QuantScheme, TensorQuant

BLOCKS = st.sampled_from([(0, 0), (1, 0), (1, 16), (1, 32), (1, 64), (1, 128), (128, 128), (64, 32)])
RULES = st.sampled_from(["", "127", "127.5", "ct", "floor", "ceil"])


@st.composite
def weights(draw):
    dtype = draw(st.sampled_from([d for d in NUMBER_TYPES if d != "fp16"]))
    symmetric = True if NUMBER_TYPES[dtype].kind != "int" else draw(st.booleans())
    return TensorQuant(dtype, draw(BLOCKS), symmetric, scale_dtype=draw(st.sampled_from(["float", "e8m0", "e4m3"])))


@st.composite
def activations(draw):
    dtype = draw(st.sampled_from(["int8", "int4", "fp8_e4m3", "fp4_e2m1"]))
    symmetric = True if not dtype.startswith("int") else draw(st.booleans())
    dynamic = draw(st.sampled_from([True, False, "local"]))
    return TensorQuant(
        dtype, draw(BLOCKS), symmetric, dynamic, draw(st.sampled_from(["float", "e8m0", "e4m3"])), draw(RULES)
    )


@given(weights(), st.none() | activations(), st.booleans(), st.sampled_from(["", "2:4"]))
def test_every_scheme_is_its_name(weight, act, act_order, sparsity):
    scheme = QuantScheme(weight, act, None, act_order, sparsity)
    assert QuantScheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("W4A16", "W4A16_g128"),
        ("w8a8c8", "W8A8C8"),
        ("W8A8C16", "W8A8"),
        ("W4A16C16", "W4A16_g128"),
        ("WInt4", "W4A16_g128"),
        ("weight-only int4", "W4A16_g128"),
        ("weight only int8", "W8A16"),
        ("WNF4A8C8", "WNF4A8C8"),
        ("W4Afp8", "W4Afp8_g128"),
        ("Wfp8Afp8", "Wfp8Afp8"),
        ("W4A16 g32 zp", "W4A16_g32_asym"),
        ("W4A16-g64-asym", "W4A16_g64_asym"),
        ("W8A16_channel_sym", "W8A16"),
        ("Wfp8Afp8_block128x128", "Wfp8Afp8_b128x128"),
        ("W8A8_static", "W8A8_static"),
    ],
)
def test_the_fields_names(name, canonical):
    assert str(QuantScheme.parse(name)) == canonical


def test_what_is_left_out_means_16_bit():
    scheme = QuantScheme.parse("W4A16")
    assert scheme.act is None
    assert scheme.kv is None
    assert QuantScheme.parse("W16A16C8").weight is None


def test_block_scales_of_weights_bring_groups_of_activations():
    assert QuantScheme.parse("Wfp8Afp8_b128x128").act.block == (1, 128)


@pytest.mark.parametrize(
    "name", ["", "W9A16", "int4", "W4A16_g0", "W4A16_b0x4", "W4A16_wat", "W4A16_static", "Wfp8A16_asym", "W16A16_g128"]
)
def test_nonsense_is_one_sentence(name):
    with pytest.raises(SchemeError) as caught:
        QuantScheme.parse(name)
    assert name in str(caught.value)
