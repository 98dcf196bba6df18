"""The format against one number at a time, and the traps of files that tools wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_bitsandbytes.loader import BitsAndBytesFormat
from qplug_bitsandbytes.quantizer import LLMInt8
from torch import Tensor

from qplug_core.config import LayerQuant, ModuleName
from qplug_core.errors import CannotEncode, ConfigError, DecodeError
from qplug_core.layer import LayerSpec, StoredPart
from qplug_core.method import decode_part
from qplug_core.planner import plan
from qplug_core.quantizer import NF4
from qplug_core.reference.linear import ReferenceLinear
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source
from qplug_core.testing import random_weight
from qplug_core.weight import QuantWeight

FORMAT = BitsAndBytesFormat()
FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
OFFSET = 0.0123456789


def layer(n: int, k: int, size: int = 64, double: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of an NF4 layer ``l``, of random bytes."""
    draw = torch.Generator().manual_seed(seed)
    blocks = -(-n * k // size)
    said: dict[str, Any] = {"quant_type": "nf4", "blocksize": size, "dtype": "bfloat16", "shape": [n, k]}
    stored = {
        "weight": torch.randint(0, 256, (-(-n * k // 2), 1), generator=draw, dtype=torch.uint8),
        "weight.absmax": torch.rand(blocks, generator=draw) + 0.5,
        "weight.quant_map": torch.tensor(NF4),
    }
    if double:
        said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": OFFSET}
        stored["weight.absmax"] = torch.randint(0, 256, (blocks,), generator=draw, dtype=torch.uint8)
        stored["weight.nested_absmax"] = torch.rand(-(-blocks // 256), generator=draw)
        stored["weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
    stored["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    return {f"l.{name}": tensor for name, tensor in stored.items()}


def slowly(stored: dict[str, Tensor], n: int, k: int, size: int = 64, double: bool = False) -> Tensor:
    """The float32 weight ``[n, k]``, one value at a time."""
    values = []
    for i in range(n * k):
        byte = int(stored["l.weight"][i // 2, 0])
        scale = stored["l.weight.absmax"][i // size]
        if double:
            outer = stored["l.weight.nested_absmax"][i // size // 256]
            scale = stored["l.weight.nested_quant_map"][int(scale)] * outer + torch.tensor(OFFSET)
        values.append(torch.tensor(NF4[byte & 15 if i % 2 else byte >> 4]) * scale)
    return torch.stack(values).view(n, k)


def source(tensors: dict[str, Tensor], config: dict[str, Any]) -> Source:
    return Source(Path("memory"), {}, config, "config.json", {}, MemorySource(tensors).tensors, {})


def read(tensors: dict[str, Tensor], n: int, k: int, config: dict[str, Any] | None = None) -> QuantWeight:
    quant = FORMAT.parse(source(tensors, config or FOUR)).quant_for(ModuleName(("l",)))
    assert quant is not None
    plan(source(tensors, config or FOUR), [LayerSpec("l", "linear", n, k)], complete=True)
    weight = decode_part(MemorySource(tensors), FORMAT, quant, LayerSpec("l", "linear", n, k), StoredPart("l", n))
    assert isinstance(weight, QuantWeight)
    return weight


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("n", "k", "size"), [(8, 128, 64), (5, 96, 64), (3, 33, 64), (8, 256, 128), (700, 32, 64)])
def test_decode_equals_reading_one_by_one(n: int, k: int, size: int, double: bool) -> None:
    """First code in the high bits; blocks from row to row; K odd; more than 256 blocks under double quantization."""
    stored = layer(n, k, size, double)
    weight = read(stored, n, k)
    assert torch.equal(weight.dequantize(), slowly(stored, n, k, size, double))
    quant = FORMAT.parse(source(stored, FOUR)).quant_for(ModuleName(("l",)))
    assert quant is not None
    for n0, n1, k0, k1 in ((1, n, 0, k), (n // 3, n // 2 + 1, 0, k), (0, n, k // 3, k - 1)):
        part = StoredPart("l", n1 - n0, rows=(n0, n1), stored_n=n)
        cut = decode_part(MemorySource(stored), FORMAT, quant, LayerSpec("l", "linear", n1 - n0, k, columns=(k0, k1)), part)
        assert torch.equal(cut.dequantize(), weight.dequantize()[n0:n1, k0:k1])
    if not double:
        again = FORMAT.encode(weight, quant)
        assert all(torch.equal(again[name.removeprefix("l.")], tensor) for name, tensor in stored.items() if n * k % 2 == 0)


def test_bitsandbytes_1971_nested_offset_is_added_in_float32() -> None:
    """Read as bfloat16, the offset of double quantization turned training losses into NaN."""
    stored = layer(4, 64, double=True)
    rounded = read(stored, 4, 64).scales - float(torch.tensor(OFFSET)) + float(torch.tensor(OFFSET).bfloat16())
    exact = slowly(stored, 4, 64, double=True)
    assert torch.equal(read(stored, 4, 64).dequantize(), exact)
    assert float((rounded - read(stored, 4, 64).scales).abs().max()) > 1e-6


def test_bitsandbytes_1873_blocksize_of_amd_devices_is_seen() -> None:
    """The default was 128 on CDNA devices; the config does not say so."""
    config = FORMAT.parse(source(layer(8, 256, 128), FOUR))
    assert str(config.quant_for(ModuleName(("l",))).scheme) == "WNF4A16_g128"  # type: ignore[union-attr]
    assert config.inferred == ["blocks of 128 values: read off the shapes of weight and absmax"]
    mixed = {**layer(8, 256, 128), **{name.replace("l.", "m."): t for name, t in layer(8, 256, 64).items()}}
    config = FORMAT.parse(source(mixed, FOUR))
    assert {str(config.quant_for(ModuleName((name,))).scheme) for name in "lm"} == {"WNF4A16", "WNF4A16_g128"}  # type: ignore[union-attr]


def test_vllm_5569_config_of_8_bit_has_4_bit_keys() -> None:
    """transformers writes every key with its default, fp4 among them."""
    raw = {
        **EIGHT, "_load_in_8bit": True, "_load_in_4bit": False, "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None,
    }  # fmt: skip
    found = FORMAT.parse(source({}, raw)).quant_for(ModuleName(("l",)))
    assert found == LayerQuant(QuantScheme.parse("W8A8_a:outlier=6"), "bnb_8bit")


def test_axolotl_3953_a_skip_list_disables_the_default_that_protects_the_head() -> None:
    plain = FORMAT.parse(source({}, FOUR))
    assert plain.quant_for(ModuleName(("lm_head",))) is None
    listed = FORMAT.parse(source({}, {**FOUR, "llm_int8_skip_modules": ["out_proj", "model.layers.1"]}))
    quantized = ("lm_head", "layers.0.in_proj", "layers.0.out_projection", "model.layers.10.up", "x.model.layers.1.up")
    found = [listed.quant_for(ModuleName((name,))) is not None for name in quantized]
    assert found == [True, True, True, True, False]
    assert listed.quant_for(ModuleName(("layers.0.out_proj",))) is None
    assert listed.quant_for(ModuleName(("embed",), "Embedding")) is None


def test_head_that_is_stored_quantized_is_quantized() -> None:
    tensors = {name.replace("l.", "lm_head.", 1): t for name, t in layer(8, 64).items()}
    assert FORMAT.parse(source(tensors, FOUR)).quant_for(ModuleName(("lm_head",))) is not None


def test_tied_head_needs_no_tensor() -> None:
    tensors = {**layer(8, 64), "embed.weight": torch.zeros(16, 64, dtype=torch.bfloat16)}
    layers = [
        LayerSpec("l", "linear", 8, 64),
        LayerSpec("embed", "embedding", 16, 64, module_class="Embedding"),
        LayerSpec("lm_head", "lm_head", 16, 64, tied_to="embed"),
    ]
    found = {d.layer.name: d.quantized for d in plan(source(tensors, FOUR), layers, complete=True).decisions}
    assert found == {"l": True, "embed": False, "lm_head": False}


@pytest.mark.parametrize(
    ("storage", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)]
)
def test_codes_stored_under_another_dtype(storage: str, dtype: torch.dtype) -> None:
    stored = layer(8, 128)
    other = {**stored, "l.weight": stored["l.weight"].view(-1).view(dtype).view(-1, 1)}
    raw = {**FOUR, "bnb_4bit_quant_storage": storage}
    weight = read(other, 8, 128, raw)
    assert weight.equal(read(stored, 8, 128))
    quant = FORMAT.parse(source(other, raw)).quant_for(ModuleName(("l",)))
    assert quant is not None
    again = FORMAT.encode(weight, quant)["weight"]
    assert again.dtype == dtype
    assert torch.equal(again.view(torch.uint8), other["l.weight"].view(torch.uint8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"load_in_8bit": True}, "both load_in_4bit and load_in_8bit"),
        ({"load_in_4bit": False}, "neither load_in_4bit nor load_in_8bit"),
        ({"load_in_4bit": "yes"}, "load_in_4bit: 'yes'"),
        ({"bnb_4bit_quant_type": "int4"}, "'int4'"),
        ({"bnb_4bit_quant_storage": "float64"}, "'float64'"),
        ({"llm_int8_skip_modules": "lm_head"}, "'lm_head'"),
        ({"llm_int8_has_fp16_weight": True}, "16-bit weights"),
        ({"no_such_numerics": 1}, "no_such_numerics"),
    ],
)
def test_config_that_is_not_understood_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FORMAT.parse(source({}, {**FOUR, **change}))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**FOUR, "bnb_4bit_quant_type": "fp4"}, "'fp4' and l is stored as nf4"),
        (EIGHT, "load_in_8bit and l is stored with 4"),
    ],
)
def test_config_that_lies_about_the_tensors_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FORMAT.parse(source(layer(8, 64), config))


@pytest.mark.parametrize(
    "change", [{"blocksize": 128}, {"shape": [8, 65]}, {"quant_type": "fp4"}, {"shape": None}, {"more": 1}]
)
def test_state_of_another_layer_is_refused(change: dict[str, Any]) -> None:
    stored = layer(8, 64)
    name = "l.weight.quant_state.bitsandbytes__nf4"
    said = {**json.loads(bytes(stored[name].tolist())), **change}
    stored[name] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    with pytest.raises(DecodeError):
        read(stored, 8, 64)


def test_another_codebook_is_refused() -> None:
    stored = layer(8, 64)
    stored["l.weight.quant_map"] = torch.linspace(-1, 1, 16)
    with pytest.raises(DecodeError, match="is not nf4"):
        read(stored, 8, 64)


def test_permuted_rows_of_old_int8_files_are_refused() -> None:
    stored = {"weight": torch.zeros(4, 8, dtype=torch.int8), "SCB": torch.ones(4), "weight_format": torch.tensor(2).byte()}
    with pytest.raises(DecodeError, match="weight_format 2"):
        FORMAT.decode(stored, LayerQuant(QuantScheme.parse("W8A8_a:outlier=6"), "bnb_8bit"), 4, 8)


def test_int8_scale_is_a_127th() -> None:
    draw = torch.Generator().manual_seed(0)
    stored = {
        "weight": torch.randint(-127, 128, (300, 8), generator=draw, dtype=torch.int8),
        "SCB": torch.rand(300, generator=draw),
    }
    quant = LayerQuant(QuantScheme.parse("W8A8_a:outlier=6"), "bnb_8bit")
    weight = FORMAT.decode(stored, quant, 300, 8)
    assert torch.equal(weight.scales, stored["SCB"][:, None] / 127)
    assert FORMAT.decode(FORMAT.encode(weight, quant), quant, 300, 8).equal(weight)


def test_scales_that_are_no_127th_are_refused() -> None:
    weight = random_weight(QuantScheme.parse("W8A8_a:outlier=6"), 4096, 4, torch.Generator().manual_seed(0))
    with pytest.raises(CannotEncode, match="divided by 127"):
        FORMAT.quant_for_scheme(weight)


def test_llm_int8_is_written() -> None:
    weight = LLMInt8().quantize(
        torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), QuantScheme.parse("W8A8_a:outlier=6.5")
    )
    quant = FORMAT.quant_for_scheme(weight)
    written = FORMAT.quantization_config({"l": quant, "m": None})
    assert (written["llm_int8_threshold"], written["llm_int8_skip_modules"]) == (6.5, ["m"])
    assert FORMAT.decode(FORMAT.encode(weight, quant), quant, 64, 128).equal(weight)


@pytest.mark.parametrize("name", ["W4A16", "WNF4A16_g48", "W8A16", "W8A8_a:asym", "W8A8_a:rule=127.5", "W8A8_g32", "WNF4A8"])
def test_foreign_weight_is_refused(name: str) -> None:
    with pytest.raises(CannotEncode, match="another format"):
        FORMAT.quant_for_scheme(random_weight(QuantScheme.parse(name), 32, 384))


def test_groups_that_blocks_span_are_refused() -> None:
    with pytest.raises(CannotEncode, match="run from row to row"):
        FORMAT.quant_for_scheme(random_weight(QuantScheme.parse("WNF4A16"), 32, 96))
    weight = random_weight(QuantScheme.parse("WNF4A16_g32"), 32, 96)
    with pytest.raises(CannotEncode, match="span several"):
        FORMAT.encode(weight, LayerQuant(QuantScheme.parse("WNF4A16"), "bnb_4bit"))
    with pytest.raises(CannotEncode, match="rounds the scales again"):
        FORMAT.encode(weight, LayerQuant(weight.scheme, "bnb_4bit", (("double", True),)))


def test_outliers_are_no_part_of_the_scale_and_their_columns_stay_16_bit() -> None:
    """The product of LLM.int8, computed in float64 from its definition."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(9, 64, generator=draw, dtype=torch.float64)
    x[2, 5], x[7, 40] = 60.0, -6.0
    weight = LLMInt8().quantize(torch.randn(32, 64, generator=draw), QuantScheme.parse("W8A8_a:outlier=6"))
    plain = weight.dequantize(torch.float64)
    rest = x.masked_fill(x.abs() >= 6, 0)
    step = rest.abs().amax(1, keepdim=True) / 127
    inner = torch.round(rest / step) * step
    inner[:, [5, 40]] = x[:, [5, 40]]
    kernel = ReferenceLinear()
    found = kernel.apply(x, kernel.pack(weight))
    expected = inner @ plain.t()
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    naive = torch.round(x / (x.abs().amax(1, keepdim=True) / 127)) * (x.abs().amax(1, keepdim=True) / 127)
    naive[:, [5, 40]] = x[:, [5, 40]]
    assert float((found - naive @ plain.t()).norm() / expected.norm()) > 1e-3
