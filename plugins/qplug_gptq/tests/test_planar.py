"""Bit planes against a packer that sets one bit at a time, and words worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qplug_gptq import planar
from qplug_gptq.loader import GPTQFormat

from qplug_core import packing
from qplug_core.config import LayerQuant
from qplug_core.errors import CannotEncode
from qplug_core.scheme import QuantScheme
from qplug_core.testing import random_weight

FORMAT = GPTQFormat()
PLANES = {3: [2, 1], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1]}


def slowly(codes: list[int], bits: int) -> list[int]:
    """The words of 32 codes, by the definition: planes lowest first, each a dense run of its fields."""
    words, low = [], 0
    for width in PLANES[bits]:
        plane = 0
        for i, code in enumerate(codes):
            plane |= ((code >> low) & (2**width - 1)) << (width * i)
        words += [plane >> (32 * i) & 0xFFFFFFFF for i in range(width)]
        low += width
    return words


@given(st.sampled_from([3, 5, 6, 7]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_words_are_those_of_the_definition(bits: int, rows: int, runs: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, 32 * runs), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = planar.pack(codes, bits)
    assert words.shape == (rows, runs * bits)
    for row in range(rows):
        for run in range(runs):
            found = [w & 0xFFFFFFFF for w in words[row, run * bits : (run + 1) * bits].tolist()]
            assert found == slowly(codes[row, 32 * run : 32 * run + 32].tolist(), bits)
    assert torch.equal(planar.unpack(words, bits), codes)


def test_golden_words() -> None:
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 0], codes[0, 31] = 0b1010011, 0b0100001
    # Low plane of 4 bits: four words; middle plane of 2 bits: two; top plane of 1 bit: one.
    assert [w & 0xFFFFFFFF for w in planar.pack(codes, 7)[0].tolist()] == [0x3, 0, 0, 0x10000000, 0x1, 0x80000000, 0x1]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_single_planes_are_the_dense_stream(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 48), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    assert torch.equal(planar.pack(codes, bits), packing.pack(codes, bits))


def test_three_bits_are_not_the_dense_stream() -> None:
    codes = torch.randint(0, 8, (3, 64), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    assert not torch.equal(planar.pack(codes, 3), packing.pack(codes, 3))


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_zero_points_are_stored_as_they_are(bits: int) -> None:
    scheme = QuantScheme.parse(f"W{bits}A16_g32")
    stored = FORMAT.encode(random_weight(scheme, 32, 64), LayerQuant(scheme, "gptq_p"))
    assert set(planar.unpack(stored["qzeros"], bits).flatten().tolist()) == {2 ** (bits - 1)}


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_wide_codes_have_no_dense_layout(layout: str) -> None:
    scheme = QuantScheme.parse("W6A16_g32")
    with pytest.raises(CannotEncode, match="store them as gptq_p"):
        FORMAT.encode(random_weight(scheme, 32, 64), LayerQuant(scheme, layout))
