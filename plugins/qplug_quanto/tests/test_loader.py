"""Stored tensors: packing against codes placed by hand, the group sizes of quanto, shifts and zero points, activation scales."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from qplug_quanto import loader
from qplug_quanto.loader import QuantoFormat

from qplug_core.config import LayerQuant
from qplug_core.errors import CannotEncode, DecodeError
from qplug_core.layer import LayerSpec, StoredPart
from qplug_core.method import decode_part
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource
from qplug_core.testing import random_weight
from qplug_core.weight import QuantWeight

FORMAT = QuantoFormat()
MODULE = "model.layers.0.mlp.up_proj"


def quant(name: str) -> LayerQuant:
    return LayerQuant(QuantScheme.parse(name), "quanto")


def weight(name: str, n: int = 50, k: int = 256, shifted: bool = False, **options: Any) -> QuantWeight:
    """A random weight, with a shift in the units of the weight in place of zero points where ``shifted``."""
    made = random_weight(QuantScheme.parse(name), n, k, torch.Generator().manual_seed(1), **options)
    if not shifted:
        return made
    assert made.zeros is not None
    return replace(made, zeros=None, shift=(made.zeros * made.scales.float() + 0.003).to(made.scales.dtype))


@pytest.mark.parametrize(("bits", "codes", "byte"), [(4, [0xA, 0x3], 0x3A), (2, [3, 0, 1, 2], 0b10010011)])
def test_first_run_of_rows_is_in_the_lowest_bits(bits: int, codes: list[int], byte: int) -> None:
    column = torch.tensor(codes, dtype=torch.uint8)[:, None]
    assert loader._pack(column, bits).tolist() == [[byte]]
    assert torch.equal(loader._unpack(loader._pack(column, bits), bits, len(codes)), column)


@pytest.mark.parametrize("shifted", [True, False], ids=["shift", "zero-point"])
@pytest.mark.parametrize(
    ("name", "k"),
    [
        ("W4A16_g128_asym", 256), ("W4A16_g96_asym", 192), ("W2A16_g64_asym", 320), ("W4A16_g32_asym", 160),
        ("W4A16_channel_asym", 100), ("W2A16_channel_asym", 140), ("W2A16_channel_asym", 128), ("W4A16_g128_asym", 128),
    ],
)  # fmt: skip
def test_every_group_size_of_quanto(name: str, k: int, shifted: bool) -> None:
    """Also with rows that do not fill bytes: 50 rows, or groups of theirs."""
    meant = weight(name, k=k, shifted=shifted)
    found = FORMAT.decode(FORMAT.encode(meant, FORMAT.quant_for_scheme(meant)), quant(name), 50, k)
    assert found.equal(meant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quanto_311_signed_int4_is_unsigned_codes_and_a_shift(dtype: torch.dtype) -> None:
    """qint4 is stored as uint8 0 to 15, and the shift is subtracted after scaling, in units of the weight."""
    meant = weight("W4A16_g128_asym", shifted=True, scale_dtype=dtype)
    tensors = FORMAT.encode(meant, FORMAT.quant_for_scheme(meant))
    assert tensors["weight._data._data"].dtype == torch.uint8
    codes = loader._unpack(tensors["weight._data._data"], 4, 100)
    value = codes[7, 3].float() * tensors["weight._scale"][7, 0].float() - tensors["weight._shift"][7, 0].float()
    found = FORMAT.decode(tensors, quant("W4A16_g128_asym"), 50, 256)
    assert found.shift is not None
    assert found.shift.dtype == dtype
    assert found.dequantize()[3, 128 + 3] == value


def test_integer_shift_is_a_zero_point_in_units_of_codes() -> None:
    meant = weight("W4A16_g128_asym")
    tensors = FORMAT.encode(meant, FORMAT.quant_for_scheme(meant))
    assert tensors["weight._shift"].dtype == torch.uint8
    signed = {**tensors, "weight._shift": tensors["weight._shift"].view(torch.int8)}
    assert FORMAT.decode(signed, quant("W4A16_g128_asym"), 50, 256).equal(meant)


@pytest.mark.parametrize(("name", "k"), [("W4A16_g64_asym", 320), ("W2A16_channel_asym", 140)])
def test_group_size_that_only_the_file_says(name: str, k: int) -> None:
    """A config says int4 and no group size: 128 is planned, and the file is obeyed."""
    meant = weight(name, k=k, shifted=True)
    tensors = FORMAT.encode(meant, FORMAT.quant_for_scheme(meant))
    source = MemorySource({f"{MODULE}.{role}": tensor for role, tensor in tensors.items()})
    planned = quant(name.split("_")[0] + "_g128_asym")
    for n0, n1, k0, k1 in [(0, 50, 0, k), (3, 17, 0, k), (0, 50, 64, 101)]:
        layer = LayerSpec(MODULE, "linear", n1 - n0, k, columns=(k0, k1))
        cut = decode_part(source, FORMAT, planned, layer, StoredPart(MODULE, n1 - n0, (n0, n1), 50))
        assert torch.equal(cut.dequantize(), meant.dequantize()[n0:n1, k0:k1])


def test_scales_of_another_group_size_are_refused() -> None:
    meant = weight("W4A16_g128_asym")
    tensors = FORMAT.encode(meant, FORMAT.quant_for_scheme(meant))
    with pytest.raises(DecodeError, match=r"weight\._scale has 50 groups"):
        FORMAT.decode({**tensors, "weight._scale": tensors["weight._scale"][:50]}, quant("W4A16_g128_asym"), 50, 256)


@pytest.mark.parametrize("name", ["input_scale", "output_scale"])
def test_quanto_155_scales_of_one_are_no_activation_quantization(name: str) -> None:
    """Every layer has an input_scale and an output_scale; a value that is not 1 means activations that the config does not."""
    tensors = FORMAT.encode(weight("W8A16"), quant("W8A16"))
    assert float(tensors[name]) == 1
    assert FORMAT.decode(tensors, quant("W8A16"), 50, 256).act_scale is None
    with pytest.raises(DecodeError, match=f"{name} is 0.02"):
        FORMAT.decode({**tensors, name: torch.tensor(0.02)}, quant("W8A16"), 50, 256)


@pytest.mark.parametrize("name", ["W8A8_static", "W8Afp8_static", "W4A8_g128_asym_static", "Wfp8Afp8_static"])
def test_static_activations_are_read(name: str) -> None:
    plain = weight(name.replace("A8", "A16").replace("Afp8", "A16").removesuffix("_static"))
    tensors = FORMAT.encode(plain, FORMAT.quant_for_scheme(plain))
    given = {**tensors, "input_scale": torch.tensor(0.0625).bfloat16(), "output_scale": torch.tensor(0.5)}
    found = FORMAT.decode(given, quant(name), 50, 256)
    assert found.act_scale is not None
    assert (found.act_scale.dtype, float(found.act_scale)) == (torch.float32, 0.0625)
    assert torch.equal(found.dequantize(), plain.dequantize())


@pytest.mark.parametrize("value", [1.0, 0.0, float("nan")])
def test_quanto_79_activations_that_were_never_calibrated(value: float) -> None:
    tensors = {**FORMAT.encode(weight("W8A16"), quant("W8A16")), "input_scale": torch.tensor(value)}
    with pytest.raises(DecodeError, match=r"Calibration"):
        FORMAT.decode(tensors, quant("W8A8_static"), 50, 256)


@pytest.mark.parametrize(
    ("name", "k", "match"),
    [
        ("W4A16_g32_asym", 256, "quanto reads 128 there"),
        ("W4A16_channel_asym", 256, "quanto reads 128 there"),
        ("W4A16_g128_asym", 320, "quanto reads 64 there"),
        ("W4A16_g32_asym", 128, "one group for each row"),
        ("W4A16_g128", 256, "asym by group"),
        ("W8A16_asym", 256, "by channel"),
        ("W8A16_g128", 256, "by channel"),
        ("W8A8", 256, "W8A16 and Wfp8A16"),
        ("WNF4A16", 256, "choose another format"),
    ],
)
def test_what_quanto_does_not_read_is_not_written(name: str, k: int, match: str) -> None:
    made = weight(name, k=k)
    with pytest.raises(CannotEncode, match=match):
        FORMAT.encode(made, LayerQuant(made.scheme, "quanto"))


@pytest.mark.parametrize("offset", [0.5, 200.0])
def test_zero_points_that_quanto_cannot_hold(offset: float) -> None:
    made = weight("W4A16_g128_asym")
    assert made.zeros is not None
    zeros = made.zeros + (offset if offset < 1 else int(offset))
    with pytest.raises(CannotEncode, match="store them as hqq"):
        FORMAT.encode(replace(made, zeros=zeros), FORMAT.quant_for_scheme(made))
