"""The format against its formula, and files whose metadata, config and tensors disagree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_torchao.loader import TorchAOFormat
from qplug_torchao.write import config_of, metadata
from torch import Tensor

from qplug_core.config import LayerQuant, ModuleName, QuantizationConfig
from qplug_core.errors import CannotEncode, ConfigError, CoverError, DecodeError
from qplug_core.layer import LayerSpec
from qplug_core.planner import plan
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source
from qplug_core.testing import random_weight

FORMAT = TorchAOFormat()
PER_ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
INT8: dict[str, Any] = {
    "_type": "Int8WeightOnlyConfig",
    "_version": 2,
    "_data": {"granularity": PER_ROW, "group_size": None, "set_inductor_config": True},
}


def group(size: int) -> dict[str, Any]:
    return {"_type": "PerGroup", "_version": 1, "_data": {"group_size": size}}


def intx(bits: int, size: int, mapping: str = "SYMMETRIC") -> dict[str, Any]:
    data = {
        "granularity": group(size),
        "intx_choose_qparams_algorithm": {"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"},
        "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
        "mapping_type": {"_type": "MappingType", "_data": mapping},
        "scale_dtype": None,
        "weight_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"},
    }
    return {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": data}


def config(quant_type: Any, **more: Any) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": quant_type}, "modules_to_not_convert": None, **more}


def source(raw: dict[str, Any], tensors: dict[str, Tensor] | None = None, meta: dict[str, str] | None = None) -> Source:
    return Source(Path("memory"), {}, raw, "config.json", {}, MemorySource(tensors or {}).tensors, meta or {})


def parse(raw: dict[str, Any], **more: Any) -> QuantizationConfig:
    return FORMAT.parse(source(raw, **more))


def scheme(found: QuantizationConfig, name: str = "l", module_class: str = "Linear") -> str | None:
    quant = found.quant_for(ModuleName((name,), module_class))
    return None if quant is None else str(quant.scheme)


def test_codes_and_zero_points_are_shifted_together() -> None:
    draw = torch.Generator().manual_seed(0)
    q = torch.randint(-8, 8, (16, 64), generator=draw, dtype=torch.int8)
    z = torch.randint(-8, 8, (16, 2), generator=draw, dtype=torch.int8)
    s = torch.rand(16, 2, generator=draw).bfloat16()
    stored = {"_weight_qdata": q, "_weight_scale": s, "_weight_zero_point": z}
    quant = LayerQuant(QuantScheme.parse("W4A16_g32_asym"), "torchao")
    weight = FORMAT.decode(stored, quant, 16, 64)
    expected = (q.float() - z.float().repeat_interleave(32, 1)) * s.float().repeat_interleave(32, 1)
    assert torch.equal(weight.dequantize(), expected)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in FORMAT.encode(weight, quant).items())


def test_pre_scale_multiplies_the_input() -> None:
    weight = random_weight(QuantScheme.parse("W8A16"), 8, 16)
    stored = FORMAT.encode(weight, LayerQuant(weight.scheme, "torchao"))
    stored["_weight_act_pre_scale"] = torch.linspace(0.5, 2, 16)
    found = FORMAT.decode(stored, LayerQuant(weight.scheme, "torchao"), 8, 16)
    assert found.pre_scale is not None
    assert torch.equal(found.pre_scale, torch.linspace(0.5, 2, 16))
    assert FORMAT.encode(found, LayerQuant(weight.scheme, "torchao")).keys() == stored.keys()


@pytest.mark.parametrize(
    ("name", "words"),
    [("_weight_zero_point", "set its mapping_type to ASYMMETRIC"), ("_weight_qdata", "codes from .* of 4 bits")],
)
def test_tensors_that_contradict_the_scheme_are_refused(name: str, words: str) -> None:
    weight = random_weight(QuantScheme.parse("W4A16_g32"), 8, 64)
    quant = LayerQuant(weight.scheme, "torchao")
    stored = FORMAT.encode(weight, quant)
    stored[name] = torch.full_like(stored[name], 9)
    with pytest.raises(DecodeError, match=words):
        FORMAT.decode(stored, quant, 8, 64)


@pytest.mark.parametrize(
    "name",
    [
        "W8A16", "W8A16_tensor", "W8A16_g64", "W4A16_g32", "W3A16_channel_asym", "W8A8_a:rule=127.5", "W8A8_a:asym",
        "W4A8_g32_a:asym", "W4A8_g32_a:rule=127.5", "Wfp8A16", "Wfp8A16_tensor", "Wfp8e5m2A16", "Wfp8Afp8",
        "Wfp8Afp8_tensor_a:tensor", "Wfp8Afp8_a:rule=ub1200",
    ],
)  # fmt: skip
def test_config_and_metadata_say_the_scheme(name: str) -> None:
    meant = QuantScheme.parse(name)
    assert meant.weight is not None
    assert scheme(parse(config(config_of(meant)))) == str(meant)
    stored = FORMAT.encode(random_weight(meant, 32, 128), LayerQuant(meant, "torchao"))
    tensors = {f"l.{suffix}": tensor for suffix, tensor in stored.items()}
    meta = metadata({"l": (LayerQuant(meant, "torchao"), (32, 128))}, {"norm.weight": ""})
    # The config says something else, so that only the metadata can be the source.
    other = config_of(meant) if not meant.weight.symmetric else INT8
    found = parse(config(other), tensors=tensors, meta=meta)
    assert scheme(found) == str(meant)
    assert bool(found.inferred) == (str(meant) != "W8A16" and other is INT8)
    plan(source(config(other), tensors, meta), [LayerSpec("l", "linear", 32, 128)], complete=True)


def test_ao_fqn_to_config_names_patterns_and_default() -> None:
    by_name = {"re:.*down_proj": intx(4, 32), "model.q": None, "model.k.weight": intx(8, 64), "_default": INT8}
    found = parse(
        config({"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": by_name, "module_fqn_to_config": by_name}})
    )
    names = ("a.down_proj", "a.down_proj_2", "model.q", "model.k", "other", "lm_head")
    assert [scheme(found, name) for name in names] == ["W4A16_g32", "W8A16", None, "W8A16_g64", "W8A16", None]


def test_transformers_should_convert_module_is_given_the_parameter() -> None:
    """transformers 5.23 looks for ``o_proj`` at the end of ``...o_proj.weight``, so it converts what it was told to leave."""
    raw = config(INT8, modules_to_not_convert=["o_proj", "layers.1"])
    weight = random_weight(QuantScheme.parse("W8A16"), 32, 64)
    quant = LayerQuant(weight.scheme, "torchao")
    tensors = {f"a.o_proj.{name}": tensor for name, tensor in FORMAT.encode(weight, quant).items()}
    with pytest.raises(CoverError, match=r"a\.o_proj\.weight"):
        plan(source(raw, tensors), [LayerSpec("a.o_proj", "linear", 32, 64)], complete=True)
    meta = metadata({"a.o_proj": (quant, (32, 64))})
    found = parse(raw, tensors=tensors, meta=meta)
    assert found.inferred == ["1 layers are W8A16 in the metadata of the file, whatever the config says"]
    assert [scheme(found, name) for name in ("a.o_proj", "b.o_proj", "x.layers.1.up", "x.layers.11.up")] == [
        "W8A16",
        None,
        None,
        "W8A16",
    ]
    plan(source(raw, tensors, meta), [LayerSpec("a.o_proj", "linear", 32, 64)], complete=True)


def test_embeddings_and_head() -> None:
    plain, both = (
        parse(config(INT8)),
        parse(config(INT8, include_input_output_embeddings=True, untie_embedding_weights=True)),
    )
    listed = parse(config(INT8, modules_to_not_convert=["x"]))
    assert [scheme(c, "lm_head") for c in (plain, both, listed)] == [None, "W8A16", "W8A16"]
    assert [scheme(c, "embed", "Embedding") for c in (plain, both, listed)] == [None, "W8A16", None]


@pytest.mark.parametrize(
    ("quant_type", "words"),
    [
        ({"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 128}}, "Int4WeightOnlyConfig; Int8WeightOnlyConfig,"),
        ("int8_weight_only", "_type and _data"),
        ({**INT8, "_data": {**INT8["_data"], "no_such_numerics": 1}}, "no_such_numerics"),
        (
            {"_type": "Int8DynamicActivationInt8WeightConfig", "_data": {"weight_only_decode": True}},
            "weight_only_decode: True",
        ),
        ({"_type": "Int8DynamicActivationInt8WeightConfig", "_data": {"reduce_range": True}}, "reduce_range: True"),
        (
            {"_type": "Float8DynamicActivationFloat8WeightConfig", "_data": {"activation_value_lb": 1.0}},
            "activation_value_lb",
        ),
        ({"_type": "IntxWeightOnlyConfig", "_data": {"weight_dtype": {"_type": "torch.dtype", "_data": "int1"}}}, "'int1'"),
        ({"_type": "Int8WeightOnlyConfig", "_data": {"granularity": {"_type": "PerBlock", "_data": {}}}}, "PerBlock"),
    ],
)
def test_config_that_is_not_understood_is_refused(quant_type: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(config(quant_type))


@pytest.mark.parametrize(
    "kind", ["Int4Tensor", "Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor", "MXTensor", "NVFP4Tensor"]
)
def test_unknown_tensor_class_is_refused_with_the_list(kind: str) -> None:
    meta = {"l.weight": json.dumps({"_type": kind, "_data": {}, "_tensor_data_names": ["qdata"]})}
    with pytest.raises(
        ConfigError, match=f"l.weight is a {kind}; Int8Tensor, IntxUnpackedToInt8Tensor, Float8Tensor are read"
    ):
        parse(config(INT8), meta=meta)


@pytest.mark.parametrize("name", ["no_such_key", "quant_type"])
def test_keys(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        parse({**config(INT8), name: 3})


@pytest.mark.parametrize(
    "name", ["WNF4A16", "W8A8", "W8A16_tensor_asym", "Wfp8Afp8_b128x128", "W4A16_g128_actorder", "W4Afp8"]
)
def test_foreign_weight_is_refused(name: str) -> None:
    with pytest.raises(CannotEncode, match="another format"):
        FORMAT.quant_for_scheme(random_weight(QuantScheme.parse(name), 128, 256))


def test_mixture_is_written_by_names() -> None:
    layers = {
        name: LayerQuant(QuantScheme.parse(text), "torchao")
        for name, text in {"a": "W8A16", "b": "W8A16", "c": "W4A16_g32"}.items()
    }
    found = parse(FORMAT.quantization_config({**layers, "d": None}))
    assert [scheme(found, name) for name in "abcd"] == ["W8A16", "W8A16", "W4A16_g32", None]
