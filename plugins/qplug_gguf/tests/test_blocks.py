"""Decoded blocks against the gguf package, bit for bit, and bytes against bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from qplug_gguf.blocks import TYPES
from qplug_gguf.grids import GRIDS, GridFormat
from qplug_gguf.loader import GGUFFormat, quant_of

from qplug_core.axes import StoredTensor
from qplug_core.layer import LayerSpec, StoredPart
from qplug_core.method import decode_part
from qplug_core.source import MemorySource
from qplug_core.weight import QuantWeight, concat

FORMAT = GGUFFormat()
HALVES = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "iq4_nl": (0,), "q2_k": (80, 82), "q3_k": (108,),
    "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_xs": (0,),
}  # fmt: skip
"""Where float16 numbers stand in a block."""


def random_bytes(name: str, n: int, k: int, seed: int = 0) -> np.ndarray:
    """A file's bytes ``[n, k / B * T]``: everything random, factors finite, of both signs, some of them zero."""
    block, draw = TYPES[name], np.random.default_rng(seed)
    data = draw.integers(0, 256, (n, k // block.values, block.nbytes), dtype=np.uint8)
    for start in HALVES[name]:
        values = draw.standard_normal(data.shape[:2]).astype(np.float16)
        values[draw.random(data.shape[:2]) < 0.05] = draw.choice(np.array([0.0, -0.0, 6e-8], dtype=np.float16))
        data[..., start : start + 2] = values[..., None].view(np.uint8)
    return data.reshape(n, -1)


def decode(name: str, data: np.ndarray, k: int) -> QuantWeight:
    weight = FORMAT.decode({"weight": torch.from_numpy(data)}, quant_of(name, ""), len(data), k)
    assert isinstance(weight, QuantWeight)
    return weight


@pytest.mark.parametrize("name", TYPES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 5), blocks=st.integers(1, 4))
def test_dequantized_bits_are_those_of_the_gguf_package(name, seed, n, blocks):
    k = blocks * TYPES[name].values
    data = random_bytes(name, n, k, seed)
    weight = decode(name, data, k)
    expected = gguf.quants.dequantize(data, GGMLQuantizationType[name.upper()])
    assert np.array_equal(weight.dequantize().numpy().view(np.uint32), expected.view(np.uint32))
    rows = torch.tensor([n - 1, 0])
    assert torch.equal(weight.dequantize_rows(rows), torch.from_numpy(expected)[rows])


@pytest.mark.parametrize("name", TYPES)
def test_sizes_are_those_of_the_gguf_package(name):
    assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]] == (TYPES[name].values, TYPES[name].nbytes)


@pytest.mark.parametrize("name", TYPES)
def test_codes_fit_the_scheme(name):
    """Every code that bytes can say is one of the number type, so kernels may count on its bits."""
    block = TYPES[name]
    weight = decode(name, random_bytes(name, 64, 8 * block.values), 8 * block.values)
    part = weight.scheme.weight
    assert part is not None
    low, high = (-(2 ** (part.bits - 1)), 2 ** (part.bits - 1) - 1) if block.zero else (0, 2**part.bits - 1)
    assert (int(weight.codes.min()), int(weight.codes.max())) == (low, high)
    assert weight.codes.dtype == (torch.int8 if block.zero else torch.uint8)
    assert weight.scales.shape == (64, 8 * block.values // part.block[1])


@pytest.mark.parametrize("name", [name for name, block in TYPES.items() if block.pack])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_encode_gives_the_bytes_back(name, seed):
    data = random_bytes(name, 3, 96, seed)
    weight = decode(name, data, 96)
    stored = FORMAT.encode(weight, quant_of(name, ""))["weight"]
    assert np.array_equal(stored.numpy(), data)
    assert decode(name, stored.numpy(), 96).equal(weight)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("window", [(0, 5, 0, 512), (1, 4, 256, 768), (2, 3, 16, 32), (0, 5, 40, 600), (3, 5, 767, 768)])
def test_cuts_are_cuts_of_the_whole(name, window):
    """Row and column parallel: the covering read stops at whole blocks."""
    n0, n1, k0, k1 = window
    data = random_bytes(name, 5, 768)
    source = MemorySource({"m.weight": torch.from_numpy(data)})
    layer = LayerSpec("m", "linear", n1 - n0, 768, columns=(k0, k1))
    cut = decode_part(source, FORMAT, quant_of(name, ""), layer, StoredPart("m", n1 - n0, (n0, n1), 5))
    assert torch.equal(cut.dequantize(), decode(name, data, 768).dequantize()[n0:n1, k0:k1])


def test_fraction_is_not_reduced():
    """144 bytes for 256 values is not 9 for 16: a block has no halves."""
    stored = FORMAT.tensors(quant_of("q4_k", ""))
    assert stored == (StoredTensor("weight", ("N", "144*K/256"), ("U8",)),)
    assert stored[0].match((4, 9), {"N": 4, "K": 16}) is None


@pytest.mark.parametrize("name", TYPES)
def test_fused_parts_are_the_parts(name):
    parts = [decode(name, random_bytes(name, n, 512, n), 512) for n in (4, 2, 2)]
    assert torch.equal(concat(parts).dequantize(), torch.cat([p.dequantize() for p in parts]))


def grid_bytes(name: str, n: int, k: int) -> np.ndarray:
    """Random bytes with small finite factors: the last two of a block, or the first two."""
    values, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]
    data = np.random.default_rng(1).integers(0, 256, (n, k // values, size), dtype=np.uint8)
    if name == "iq1_m":
        # Its factor is spread over the high nibbles of the eight scale bytes at the end.
        data[..., -8:] &= 0x3F
    start = size - 2 if name.startswith("tq") else 0
    data[..., start : start + 2] = np.frombuffer(np.float16(0.01).tobytes(), dtype=np.uint8)
    return data.reshape(n, -1)


@pytest.mark.parametrize("name", GRIDS)
def test_grid_types_are_dequantized_by_the_gguf_package(name):
    """Opaque: whole, cut at whole blocks, and cut inside of one."""
    data = grid_bytes(name, 4, 768)
    expected = torch.from_numpy(gguf.quants.dequantize(data, GGMLQuantizationType[name.upper()]))
    assert expected.isfinite().all()
    quant = quant_of(name, "")
    source = MemorySource({"m.weight": torch.from_numpy(data)})
    for n0, n1, k0, k1 in [(0, 4, 0, 768), (1, 3, 256, 512), (0, 4, 40, 600)]:
        layer = LayerSpec("m", "linear", n1 - n0, 768, columns=(k0, k1))
        cut = decode_part(source, GridFormat(), quant, layer, StoredPart("m", n1 - n0, (n0, n1), 4))
        assert torch.equal(cut.dequantize(), expected[n0:n1, k0:k1])
    assert quant.opt("encoding") == GridFormat().decode({"weight": torch.from_numpy(data)}, quant, 4, 768).encoding
