"""Configs that are wrong about zero points: each is read right, because values prove it, or refused with what to set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_gptq import planar
from qplug_gptq.loader import GPTQFormat

from qplug_core.config import LayerQuant, ModuleName
from qplug_core.errors import DecodeError
from qplug_core.layer import LayerSpec, StoredPart
from qplug_core.method import decode_part
from qplug_core.packing import pack
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source
from qplug_core.testing import random_weight
from qplug_core.weight import QuantWeight

FORMAT = GPTQFormat()
MODULE = "model.layers.0.mlp.up_proj"
BASE = {"bits": 4, "group_size": 32, "quant_method": "gptq", "desc_act": False}


def parsed(config: dict[str, Any]) -> LayerQuant:
    source = Source(Path("memory"), {"quantization_config": config}, config, "config.json", {}, {}, {})
    found = FORMAT.parse(source).quant_for(ModuleName((MODULE,)))
    assert found is not None
    return found


def stored(
    scheme: str, layout: str, n: int = 32, k: int = 256, **options: Any
) -> tuple[QuantWeight, dict[str, torch.Tensor]]:
    weight = random_weight(QuantScheme.parse(scheme), n, k, torch.Generator().manual_seed(1), **options)
    return weight, FORMAT.encode(weight, LayerQuant(weight.scheme, layout))


def decode(tensors: dict[str, torch.Tensor], config: dict[str, Any], n: int = 32, k: int = 256) -> QuantWeight:
    return FORMAT.decode(tensors, parsed(config), n, k)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_vllm_26343_v2_zero_points_called_v1(bits: int) -> None:
    """A symmetric v2 file read as v1 gave "!!!!"."""
    _, tensors = stored(f"W{bits}A16_g32", "gptq_v2")
    with pytest.raises(DecodeError, match="set checkpoint_format to 'gptq_v2'"):
        decode(tensors, {**BASE, "bits": bits, "sym": True, "checkpoint_format": "gptq"})


def test_vllm_14126_v1_zero_points_called_v2() -> None:
    """The other way round: all "!" too."""
    _, tensors = stored("W4A16_g32", "gptq")
    with pytest.raises(DecodeError, match="set checkpoint_format to 'gptq'"):
        decode(tensors, {**BASE, "sym": True, "checkpoint_format": "gptq_v2"})


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_vllm_38966_values_decide_where_the_config_names_no_version(bits: int, layout: str) -> None:
    weight, tensors = stored(f"W{bits}A16_g32", layout)
    assert decode(tensors, {**BASE, "bits": bits, "sym": True}).equal(weight)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_smallest_config_of_a_symmetric_file(layout: str) -> None:
    """Neither sym nor checkpoint_format: zero points of a whole layer that are one constant say both."""
    weight, tensors = stored("W4A16_g32", layout)
    found = decode(tensors, {"bits": 4, "group_size": 32, "quant_method": "gptq"})
    assert torch.equal(found.dequantize(), weight.dequantize())


def test_smallest_config_of_a_symmetric_file_is_cut_exactly() -> None:
    """A cut has too few zero points to prove anything, so that the layer is read whole."""
    weight, tensors = stored("W4A16_g32", "gptq_v2")
    quant = parsed({"bits": 4, "group_size": 32, "quant_method": "gptq"})
    source = MemorySource({f"{MODULE}.{name}": tensor for name, tensor in tensors.items()})
    layer = LayerSpec(MODULE, "linear", 8, 256, columns=(64, 96))
    cut = decode_part(source, FORMAT, quant, layer, StoredPart(MODULE, 8, (8, 16), 32))
    assert torch.equal(cut.dequantize(), weight.dequantize()[8:16, 64:96])


@pytest.mark.parametrize(("layout", "said"), [("gptq_v2", "gptq"), ("gptq", "gptq_v2")])
def test_symmetric_file_called_asymmetric_and_of_the_other_version(layout: str, said: str) -> None:
    _, tensors = stored("W4A16_g32", layout)
    with pytest.raises(DecodeError, match=f"set checkpoint_format to '{layout}'"):
        decode(tensors, {**BASE, "sym": False, "checkpoint_format": said})


def test_few_equal_zero_points_prove_nothing() -> None:
    """8 zero points that agree are chance: an asymmetric layer is believed."""
    weight, tensors = stored("W4A16_g32_asym", "gptq", n=8, k=32, zeros=(9, 9))
    assert set(tensors["qzeros"].flatten().tolist()) == {0x88888888 - 2**32}
    assert decode(tensors, {**BASE, "sym": False, "checkpoint_format": "gptq"}, 8, 32).equal(weight)


@pytest.mark.parametrize(("low", "high"), [(1, 15), (1, 1), (8, 8)])
def test_asymmetric_files_are_read_as_they_say(low: int, high: int) -> None:
    weight, tensors = stored("W4A16_g32_asym", "gptq", zeros=(low, high))
    assert decode(tensors, {**BASE, "sym": False, "checkpoint_format": "gptq"}).equal(weight)


def test_skewed_layer_of_two_bits_is_believed() -> None:
    """Zero point 1 everywhere is a quarter of all there is with 2 bits, and what weights with a longer positive tail have."""
    weight, tensors = stored("W2A16_g32_asym", "gptq_v2", zeros=(1, 1))
    config = {**BASE, "bits": 2, "sym": False, "checkpoint_format": "gptq_v2"}
    assert decode(tensors, config).equal(weight)


def in_whole_words(bits: int) -> tuple[QuantWeight, dict[str, torch.Tensor]]:
    """An asymmetric v1 file with zero point 0, as GPTQModel writes it: 1 is subtracted from every field of a word at once."""
    weight, tensors = stored(f"W{bits}A16_g32_asym", "gptq_v2", zeros=(0, 3))
    ones = sum(1 << shift for shift in range(0, 32, bits))
    assert bool((weight.zeros == 0).any())
    return weight, {**tensors, "qzeros": tensors["qzeros"] - ones}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "producer",
    [{"meta": {"quantizer": ["gptqmodel:7.6.0"]}}, {"meta": {"quantizer": ["optimum:1.2", "gptqmodel:0.9.0"]}},
     {"provider": "auto-round", "autoround_version": "0.16.1"}],
)  # fmt: skip
def test_autogptq_640_zero_point_zero_of_v1_borrows_from_the_next(bits: int, producer: dict[str, Any]) -> None:
    """GPTQModel says of its v1 files that about 13% overflow: adding 1 to whole words undoes it exactly, field by field does not."""
    weight, tensors = in_whole_words(bits)
    config = {**BASE, "bits": bits, "sym": False, "checkpoint_format": "gptq", **producer}
    assert decode(tensors, config).equal(weight)


@pytest.mark.parametrize(
    "producer", [{}, {"meta": {"quantizer": ["gptqmodel:0.8.0"]}}, {"meta": {"quantizer": ["autogptq:0.7.1"]}}]
)
def test_autogptq_640_wrapped_zero_point_of_an_unknown_writer_is_refused(producer: dict[str, Any]) -> None:
    _, tensors = in_whole_words(4)
    with pytest.raises(DecodeError, match="as gptq_v2"):
        decode(tensors, {**BASE, "sym": False, "checkpoint_format": "gptq", **producer})


def test_gptqmodel_2763_wrapped_zero_point_of_three_bits_is_refused() -> None:
    """Fields of 3 bits straddle words, and GPTQModel's conversion of them changed: which one wrote a file is not said."""
    _, tensors = stored("W3A16_g32_asym", "gptq_v2", zeros=(0, 7))
    values = torch.full((8, 32), 7, dtype=torch.uint8)
    config = {**BASE, "bits": 3, "sym": False, "checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:7.6.0"]}}
    with pytest.raises(DecodeError, match="as gptq_v2"):
        decode({**tensors, "qzeros": pack(values, 3)}, config)


def test_all_ones_are_an_ordinary_zero_point_of_v2() -> None:
    weight, tensors = stored("W4A16_g32_asym", "gptq_v2", zeros=(0, 15))
    assert decode(tensors, {**BASE, "sym": False, "checkpoint_format": "gptq_v2"}).equal(weight)


def test_planes_of_the_other_convention_are_refused() -> None:
    _, tensors = stored("W6A16_g32", "gptq_p")
    other = torch.full((8, 32), 31, dtype=torch.uint8)
    with pytest.raises(DecodeError, match="convert the file with GPTQModel"):
        decode({**tensors, "qzeros": planar.pack(other, 6)}, {**BASE, "bits": 6, "sym": True, "checkpoint_format": "gptq_p"})
