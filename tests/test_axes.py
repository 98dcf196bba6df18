"""Declared axes: lengths, cuts, and the covering window."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qplug_core.axes import Axis, StoredTensor, Window, covering, slices


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("N", 64),
        ("K/8", 12),
        ("3*K/32", 9),
        ("ceil(K/128)", 1),
        ("N*K/2", 3072),
        ("7", 7),
        ("ceil(3*K/64)", 5),
        ("2*ceil(K/64)", 4),
    ],
)
def test_lengths(text, length):
    assert Axis.parse(text).length({"N": 64, "K": 96}) == length


def test_an_axis_that_does_not_divide_has_no_length():
    assert Axis.parse("K/128").length({"N": 1, "K": 96}) is None


@pytest.mark.parametrize("text", ["M", "K/", "K*8", "ceil(K", "", "-1"])
def test_what_is_no_axis(text):
    with pytest.raises(ValueError, match="axis"):
        Axis.parse(text)


TENSORS = (
    StoredTensor("qweight", ("3*K/32", "N"), ("I32",)),
    StoredTensor("scales", ("ceil(K/48)", "N"), ("F16",)),
    StoredTensor("zeros", ("ceil(K/48)", "N/8"), ("I32",)),
)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 96), st.integers(0, 96))
def test_the_covering_window_covers_and_can_be_cut(n0, n1, k0, k1):
    sizes = {"N": 40, "K": 96}
    matched = {t: tuple(Axis.parse(a) for a in t.axes) for t in TENSORS}
    window = Window(min(n0, n1), max(n0, n1), min(k0, k1), max(k0, k1))
    cover = covering(matched, window, 40, 96)
    assert cover.n0 <= window.n0
    assert cover.n1 >= window.n1
    assert cover.k0 <= window.k0
    assert cover.k1 >= window.k1
    for tensor, axes in matched.items():
        cut = slices(tensor, axes, cover, 96)
        for axis, piece in zip(axes, cut, strict=True):
            assert piece.stop - piece.start == axis.length(cover.sizes)
            assert piece.stop <= axis.length(sizes)


def test_a_look_up_table_is_never_cut():
    table = StoredTensor("scales", ("K/32", "N"), ("F16",), whole=("K",))
    axes = tuple(Axis.parse(a) for a in table.axes)
    cut = slices(table, axes, covering({table: axes}, Window(0, 8, 40, 41), 8, 96), 96)
    assert cut == (slice(None), slice(0, 8))


def test_what_is_not_local_is_read_whole():
    tensor = StoredTensor("data", ("N", "K"), ("U8",), local=False)
    axes = tuple(Axis.parse(a) for a in tensor.axes)
    assert covering({tensor: axes}, Window(1, 2, 3, 4), 8, 96) == Window(0, 8, 0, 96)


def test_alternative_shapes():
    scale = StoredTensor("scale", ("N",), ("F32",), alt=(("N", "1"), ("1",)))
    assert scale.match((8, 1), {"N": 8, "K": 4}) is not None
    assert scale.match((1,), {"N": 8, "K": 4}) is not None
    assert scale.match((4,), {"N": 8, "K": 4}) is None
    assert "[8, 1]" in scale.shapes({"N": 8, "K": 4})
