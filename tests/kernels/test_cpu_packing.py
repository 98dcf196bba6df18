"""Decoding and packing in C are bit-equal to the same in torch."""

from __future__ import annotations

import pytest
import torch
from qplug_awq.packing import GEMM_ORDER, pack_gemm, unpack_gemm

from qplug_core import packing
from qplug_core.kernels import cpu_packing, cpu_weight_only
from qplug_core.kernels.cpu_weight_only import E4M3, INT2, INT3, INT8, LUT4, TYPES, UNITS
from qplug_core.scheme import QuantScheme
from qplug_core.testing.weights import random_weight
from qplug_core.weight import QuantWeight

BITS = (2, 3, 4, 5, 6, 7, 8)


@pytest.fixture
def torch_code(monkeypatch):
    """Off: C. On: what runs where there is no compiler."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(cpu_packing, "available", lambda words: not on)

    return switch


@pytest.mark.parametrize("rows", [1, 15, 16, 130])
@pytest.mark.parametrize("units", [1, 2, 5, 9])
@pytest.mark.parametrize("bits", BITS)
def test_streams_along_rows_and_along_columns(bits, units, rows, torch_code):
    values = torch.randint(0, 2**bits, (rows, units * packing.word_values(bits)), dtype=torch.uint8)
    words = packing.pack(values, bits)
    middle = 2 ** (bits - 1)
    for on in (False, True):
        torch_code(on)
        assert torch.equal(packing.unpack(words, bits), values)
        assert torch.equal(packing.unpack_columns(words.t().contiguous(), bits), values)
        assert torch.equal(packing.unpack_columns(words.t().contiguous(), bits, middle), values - middle)


def test_words_that_are_a_window_of_others():
    values = torch.randint(0, 16, (40, 64), dtype=torch.uint8)
    words = packing.pack(values, 4)
    assert torch.equal(cpu_packing.unpack(words[3:20, 2:5], 4), values[3:20, 16:40])


def test_large_streams_take_all_threads():
    values = torch.randint(0, 16, (512, 1024), dtype=torch.uint8)
    assert torch.equal(packing.unpack_columns(packing.pack(values, 4).t().contiguous(), 4), values)


@pytest.mark.parametrize(("n", "k"), [(8, 1), (24, 7), (136, 64), (512, 100)])
def test_awq_words(n, k, torch_code):
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    words = pack_gemm(codes, 4)
    for on in (False, True):
        torch_code(on)
        assert torch.equal(unpack_gemm(words, 4), codes)
    if n and k > 1:
        assert not torch.equal(cpu_packing.unpack_awq(words, GEMM_ORDER[::-1]), codes)


def reference(weight: QuantWeight, x_block: int) -> torch.Tensor:
    """The layout of codes.h, written down in torch."""
    kind = TYPES[weight.scheme.weight.dtype]
    low = 0 if kind >= LUT4 or weight.codes.dtype == torch.uint8 else {INT2: 2, INT3: 4, INT8: 128}.get(kind, 8)
    order = cpu_weight_only._columns(weight, UNITS[kind], x_block).order
    source = weight.codes.view(torch.uint8) + low
    if kind >= E4M3:
        source = source.masked_fill(weight.codes.float().isnan(), 0)
    codes = torch.zeros(-(-weight.n // 16) * 16, len(order), dtype=torch.uint8)
    codes[: weight.n, order >= 0] = source[:, order[order >= 0].long()]
    tiles, unit = codes.view(-1, 16, len(order)).transpose(1, 2), UNITS[kind]
    if unit == 4:
        return (tiles ^ 128).contiguous().view(torch.int8) if kind == INT8 else tiles.contiguous()
    fields = tiles.reshape(len(tiles), -1, unit, 16).to(torch.int64)
    if kind != INT3:
        bits = 32 // unit
        return sum(fields[:, :, i] << bits * i for i in range(unit)).to(torch.int32)[:, :, None]
    words = []
    for i in range(3):
        word = sum(fields[:, :, 10 * i + j] << (3 * j + (j >= 5)) for j in range(10))
        word |= (fields[:, :, 30] >> i & 1) << 15 | (fields[:, :, 31] >> i & 1) << 31
        words.append(word.to(torch.int32))
    return torch.stack(words, dim=2)


@pytest.mark.parametrize("shape", [(1, 16), (17, 100), (40, 257), (96, 640)])
@pytest.mark.parametrize(
    "name", ["W2A16_g16", "W3A16_g32_asym", "W4A16_g48", "W4A16_g128_asym", "W5A16_g32", "W8A16", "W8A16_g32_asym", "WNF4A16", "Wfp8A16"]
)  # fmt: skip
def test_every_layout_of_codes(name, shape):
    weight = random_weight(QuantScheme.parse(name), *shape, torch.Generator().manual_seed(1))
    packed = cpu_weight_only.pack(weight, "test").tensors["codes"]
    expected = reference(weight, 0)
    assert packed.dtype == expected.dtype
    assert torch.equal(packed, expected)


def test_act_order_is_a_gather():
    weight = random_weight(QuantScheme.parse("W4A16_g32_actorder"), 40, 96, torch.Generator().manual_seed(1))
    assert weight.group_index is not None
    assert torch.equal(cpu_weight_only.pack(weight, "test").tensors["codes"], reference(weight, 0))


@pytest.mark.parametrize(
    ("name", "code"), [("Wfp8A16", 0x7F), ("Wfp8A16", 0xFF), ("Wfp8e5m2A16", 0x7D), ("Wfp8e5m2A16", 0xFE)]
)
def test_a_nan_is_a_nan_scale_of_its_row(name, code):
    weight = random_weight(QuantScheme.parse(name), 20, 80, torch.Generator().manual_seed(1))
    weight.codes.view(torch.uint8)[17, 70] = code
    packed = cpu_weight_only.pack(weight, "test").tensors
    assert packed["row_scales"].isnan().nonzero().tolist() == [[17]]
    assert torch.equal(packed["codes"], reference(weight, 0))
