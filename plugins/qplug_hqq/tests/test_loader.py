"""Stored tensors: packings against codes placed by hand, both axes, values that decide, and layers that contradict the config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from qplug_hqq import packing
from qplug_hqq.loader import HQQFormat

from qplug_core.config import LayerQuant
from qplug_core.errors import CannotEncode, DecodeError
from qplug_core.layer import LayerSpec, StoredPart
from qplug_core.method import decode_part
from qplug_core.scheme import QuantScheme, TensorQuant
from qplug_core.source import MemorySource
from qplug_core.testing import random_weight
from qplug_core.weight import OpaqueWeight, QuantWeight, concat

FORMAT = HQQFormat()
MODULE = "model.layers.0.mlp.up_proj"


def quant(name: str, **options: Any) -> LayerQuant:
    return LayerQuant(QuantScheme.parse(name), "hqq", tuple(options.items()))


def weight(name: str, n: int = 48, k: int = 192, offset: float = 0.0) -> QuantWeight:
    """A random weight, with float zero points where there is an offset."""
    made = random_weight(QuantScheme.parse(name), n, k, torch.Generator().manual_seed(1))
    assert made.zeros is not None
    return replace(made, zeros=made.zeros.float() + offset) if offset else made


def stored(name: str, **options: Any) -> dict[str, torch.Tensor]:
    made = weight(name, **options)
    return FORMAT.encode(made, FORMAT.quant_for_scheme(made))


@pytest.mark.parametrize(
    ("bits", "codes", "word"),
    [
        (4, [0xA, 0x3], 0xA3),
        (2, [3, 0, 1, 2], 0b11000110),
        (3, [7, 0, 0, 0, 0, 0, 0, 0, 0, 5], (7 << 27) | 5),
        (6, [61], 61),
    ],
)
def test_first_run_of_rows_is_in_the_highest_bits(bits: int, codes: list[int], word: int) -> None:
    column = torch.tensor(codes, dtype=torch.uint8)[:, None]
    assert packing.pack(column, bits).tolist() == [[word]]
    assert torch.equal(packing.unpack(packing.pack(column, bits), bits, len(codes)), column)


def test_hqq_97_words_of_three_bits_are_no_codes() -> None:
    """Int32 words "out of the 3-bit range": ten codes each, and zeros behind the last row."""
    tensors = stored("W3A16_g64_asym")
    assert tensors["W_q"].dtype == torch.int32
    assert tensors["W_q"].shape == (15, 64)
    assert int(tensors["W_q"].max()) > 7
    assert FORMAT.decode(tensors, quant("W3A16_g64_asym"), 48, 192).equal(weight("W3A16_g64_asym"))


@pytest.mark.parametrize("name", ["W8A16_asym", "W6A16_g64_asym", "W4A16_g64_asym", "W3A16_g24_asym", "W2A16_channel_asym"])
def test_zero_points_that_are_no_integers(name: str) -> None:
    meant = weight(name, offset=0.375)
    decoded = FORMAT.decode(FORMAT.encode(meant, LayerQuant(meant.scheme, "hqq")), LayerQuant(meant.scheme, "hqq"), 48, 192)
    assert isinstance(decoded, QuantWeight)
    assert decoded.equal(meant)


def test_zero_points_that_are_all_integers_are_integers() -> None:
    """Kernels that take no float zero points then take the layer; the values are the same."""
    tensors = stored("W4A16_g64_asym")
    assert tensors["zero"].is_floating_point()
    decoded = FORMAT.decode(tensors, quant("W4A16_g64_asym"), 48, 192)
    assert isinstance(decoded, QuantWeight)
    assert decoded.zeros is not None
    assert decoded.zeros.dtype == torch.int16
    tensors["zero"][3] += 0.5
    mixed = FORMAT.decode(tensors, quant("W4A16_g64_asym"), 48, 192)
    assert isinstance(mixed, QuantWeight)
    assert mixed.zeros is not None
    assert mixed.zeros.is_floating_point()


def by_hand(bits: int, group: int, n: int, k: int, axis: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A layer in groups along ``axis``, and its values by the definition: a group is a row or a column of the reshaped weight."""
    draw = torch.Generator().manual_seed(bits)
    count = n * k // group
    shape, one = ((count, group), (count, 1)) if axis else ((group, count), (1, count))
    codes = torch.randint(0, 2**bits, shape, generator=draw, dtype=torch.uint8)
    scale, zero = torch.rand(one, generator=draw) + 0.1, torch.rand(one, generator=draw) * 2**bits
    return {"W_q": packing.pack(codes, bits), "scale": scale, "zero": zero}, ((codes - zero) * scale).reshape(n, k)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("group", "n", "k"), [(64, 64, 96), (16, 24, 64), (64, 24, 128)])
def test_groups_along_axis_0(bits: int, group: int, n: int, k: int) -> None:
    """A group is every G-th weight of the flat matrix, within a column or not: no block, so the weight stays packed."""
    tensors, expected = by_hand(bits, group, n, k, axis=0)
    meant = LayerQuant(QuantScheme(TensorQuant(f"int{bits}", (group, 1), symmetric=False)), "hqq", (("axis", 0),))
    source = MemorySource({f"{MODULE}.{name}": tensor for name, tensor in tensors.items()})
    for n0, n1, k0, k1 in [(0, n, 0, k), (3, 17, 0, k), (0, n, 5, 61)]:
        layer = LayerSpec(MODULE, "linear", n1 - n0, k, columns=(k0, k1))
        cut = decode_part(source, FORMAT, meant, layer, StoredPart(MODULE, n1 - n0, (n0, n1), n))
        assert isinstance(cut, OpaqueWeight)
        assert torch.equal(cut.dequantize(), expected[n0:n1, k0:k1])


@pytest.mark.parametrize(("group", "n", "k"), [(64, 32, 96), (512, 32, 128), (48, 8, 36)])
def test_groups_that_end_inside_of_a_row(group: int, n: int, k: int) -> None:
    tensors, expected = by_hand(8, group, n, k, axis=1)
    meant = quant(f"W8A16_g{group}_asym")
    source = MemorySource({f"{MODULE}.{name}": tensor for name, tensor in tensors.items()})
    for n0, n1, k0, k1 in [(0, n, 0, k), (3, 7, 0, k), (0, n, 5, 31)]:
        layer = LayerSpec(MODULE, "linear", n1 - n0, k, columns=(k0, k1))
        cut = decode_part(source, FORMAT, meant, layer, StoredPart(MODULE, n1 - n0, (n0, n1), n))
        assert torch.equal(cut.dequantize(), expected[n0:n1, k0:k1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["W8A16_asym", "W4A16_g64_asym", "W3A16_g64_asym", "W3A16_channel_asym"])
def test_codes_seen_as_floats(name: str, dtype: torch.dtype) -> None:
    """``view_as_float``: bits of NaN and all, they are the same bytes."""
    meant, tensors = weight(name), stored(name)
    tensors["W_q"] = tensors["W_q"].view(dtype)
    tensors["view_as_float"] = torch.tensor(1, dtype=torch.uint8)
    source = MemorySource({f"{MODULE}.{role}": tensor for role, tensor in tensors.items()})
    found = decode_part(
        source, FORMAT, quant(name, view_as_float=True), LayerSpec(MODULE, "linear", 48, 192), StoredPart(MODULE, 48)
    )
    assert torch.equal(found.dequantize(), meant.dequantize())


def test_axis_0_seen_as_floats() -> None:
    tensors, expected = by_hand(3, 64, 64, 96, axis=0)
    tensors["W_q"] = tensors["W_q"].view(torch.bfloat16)
    source = MemorySource({f"{MODULE}.{role}": tensor for role, tensor in tensors.items()})
    meant = quant("W3A16_b64x1_asym", axis=0, view_as_float=True)
    found = decode_part(source, FORMAT, meant, LayerSpec(MODULE, "linear", 64, 96), StoredPart(MODULE, 64))
    assert torch.equal(found.dequantize(), expected)


def test_fused_parts_with_and_without_integer_zero_points() -> None:
    parts = [weight("W4A16_g64_asym", offset=offset) for offset in (0.25, 0.5)]
    quants = [FORMAT.quant_for_scheme(part) for part in parts]
    decoded = [FORMAT.decode(FORMAT.encode(p, q), q, 48, 192) for p, q in zip(parts, quants, strict=True)]
    fused = concat([d for d in decoded if isinstance(d, QuantWeight)])
    assert torch.equal(fused.dequantize(), torch.cat([part.dequantize() for part in parts]))


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("nbits", 8, "nbits is 8 and the config says 4"),
        ("group_size", 32, "group_size is 32 and the config says 64"),
        ("axis", 0, "axis is 0 and the config says 1"),
        ("quant_scale", 1, r"quant_scale is true.*quantize again"),
        ("quant_zero", 1, r"quant_zero is true.*quantize again"),
    ],
)
def test_layer_that_contradicts_the_config(name: str, value: int, match: str) -> None:
    tensors = {**stored("W4A16_g64_asym"), name: torch.tensor(value)}
    with pytest.raises(DecodeError, match=match):
        FORMAT.decode(tensors, quant("W4A16_g64_asym"), 48, 192)


def test_transposed_shape_is_refused() -> None:
    """Flat groups fit both ways round, so only ``shape`` tells."""
    with pytest.raises(DecodeError, match=r"shape is \[48, 192\]"):
        FORMAT.decode(stored("W4A16_g64_asym"), quant("W4A16_g64_asym"), 192, 48)


def test_three_values_are_stored_in_two_bits() -> None:
    tensors = {**stored("W2A16_g64_asym"), "nbits": torch.tensor(1.58)}
    assert FORMAT.decode(tensors, quant("W2A16_g64_asym"), 48, 192).equal(weight("W2A16_g64_asym"))


@pytest.mark.parametrize(
    ("name", "n", "k", "match"),
    [
        ("W4A16_g64_asym", 48, 100, "choose a size that divides"),
        ("W4A16_g64_asym", 3, 64, "choose a smaller group size"),
        ("W2A16_channel_asym", 6, 64, "choose a smaller group size"),
        ("W4A16_g64", 48, 192, "with zero points"),
        ("W7A16_g64_asym", 48, 192, "without 7"),
        ("W8A8_asym", 48, 192, "choose another format"),
    ],
)
def test_what_hqq_cannot_hold(name: str, n: int, k: int, match: str) -> None:
    made = random_weight(QuantScheme.parse(name), n, k)
    with pytest.raises(CannotEncode, match=match):
        FORMAT.encode(made, LayerQuant(made.scheme, "hqq"))


def test_zero_points_that_would_come_back_otherwise() -> None:
    made = weight("W4A16_g64_asym")
    assert made.zeros is not None
    with pytest.raises(CannotEncode, match=r"read as torch\.int16"):
        FORMAT.encode(replace(made, zeros=made.zeros.float()), FORMAT.quant_for_scheme(made))
    rounded = replace(made, zeros=made.zeros + 256, scales=made.scales.bfloat16())
    with pytest.raises(CannotEncode, match="or rounded"):
        FORMAT.encode(rounded, FORMAT.quant_for_scheme(rounded))


def test_weight_along_axis_0_is_not_written() -> None:
    tensors, _ = by_hand(4, 64, 64, 96, axis=0)
    found = FORMAT.decode(tensors, quant("W4A16_b64x1_asym", axis=0), 64, 96)
    with pytest.raises(CannotEncode, match="dequantize it first"):
        FORMAT.encode(found, FORMAT.quant_for_scheme(weight("W4A16_g64_asym")))
