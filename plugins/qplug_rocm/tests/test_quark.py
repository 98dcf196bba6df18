"""Quark's config, its tensor names, and the traps that engines fell into."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_rocm.loader import QuarkFormat

from qplug_core.config import LayerQuant, ModuleName
from qplug_core.errors import CannotEncode, ConfigError, DecodeError
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source
from qplug_core.testing import random_weight
from qplug_core.weight import E2M1

FORMAT = QuarkFormat()
MODULE = "model.layers.7.self_attn.q_a_proj"
INTERNAL = (("names", "internal"),)


def fp8(qscheme: str = "per_tensor", **more: Any) -> dict[str, Any]:
    return {
        "dtype": "fp8_e4m3",
        "is_dynamic": False,
        "qscheme": qscheme,
        "round_method": "half_even",
        "symmetric": True,
        **more,
    }


def fp4(dynamic: bool = False, **more: Any) -> dict[str, Any]:
    return {
        "dtype": "fp4", "is_dynamic": dynamic, "qscheme": "per_group", "ch_axis": -1, "group_size": 32, "symmetric": None, "scale_format": "e8m0",
        "scale_calculation_mode": "even", "scale_type": "float", "round_method": "half_even", "observer_cls": "PerBlockMXObserver",
        "mx_element_dtype": None, "is_scale_quant": False, "enable_buffer_reuse": False, "max_input_numel": 4194304, "block_size": None, **more,
    }  # fmt: skip


def int8(qscheme: str = "per_tensor", **more: Any) -> dict[str, Any]:
    return {**fp8(qscheme), "dtype": "int8", "scale_type": "float", **more}


PTPC = {"weight": fp8("per_channel", ch_axis=0), "input_tensors": fp8("per_channel", ch_axis=1, is_dynamic=True)}
MXFP4 = {"weight": fp4(), "input_tensors": fp4(True)}


def config(layer: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "quark", "quant_mode": "eager_mode", "version": "0.11", "algo_config": None, "softmax_quant_spec": None,
        "global_quant_config": {"bias": None, "output_tensors": None, "target_device": None, **layer}, "exclude": ["lm_head"],
        "layer_quant_config": {}, "layer_type_quant_config": {}, "kv_cache_quant_config": {}, "kv_cache_post_rope": False,
        "export": {"kv_cache_group": [], "min_kv_scale": 0.0, "pack_method": "reorder",
            "weight_format": "real_quantized", "weight_merge_groups": None},
        **more,
    }  # fmt: skip


def source(raw: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Source:
    infos = MemorySource(tensors or {}).tensors
    return Source(Path("memory"), {"quantization_config": raw}, raw, "config.json", {}, infos, {})


def rule(raw: dict[str, Any], name: str = MODULE) -> LayerQuant | None:
    return FORMAT.parse(source(raw)).quant_for(ModuleName((name,)))


def says(raw: dict[str, Any], name: str = MODULE) -> str:
    found = rule(raw, name)
    return f"{found.layout} {found.scheme}" if found else ""


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ({"weight": fp8(), "input_tensors": fp8()}, "quark_fp8 Wfp8Afp8_tensor_static"),
        ({"weight": fp8(), "input_tensors": fp8(is_dynamic=True)}, "quark_fp8 Wfp8Afp8_tensor_a:tensor"),
        (PTPC, "quark_fp8 Wfp8Afp8"),
        ({"weight": fp8("per_channel", ch_axis=0)}, "quark_fp8 Wfp8A16"),
        ({"weight": int8(), "input_tensors": int8()}, "quark_int8 W8A8_tensor_static"),
        ({"weight": int8(), "input_tensors": int8(symmetric=False)}, "quark_int8 W8A8_tensor_a:tensor.asym.static"),
        (
            {"weight": int8("per_channel", ch_axis=0), "input_tensors": int8("per_channel", ch_axis=1, is_dynamic=True)},
            "quark_int8 W8A8_a:rule=127.5",
        ),
        (MXFP4, "quark_mxfp4 Wmxfp4Amxfp4"),
        ({"weight": fp4()}, "quark_mxfp4 Wmxfp4A16"),
        (
            {"weight": fp4(), "input_tensors": fp4(True, scale_calculation_mode="floor")},
            "quark_mxfp4 Wmxfp4Amxfp4_a:rule=floor",
        ),
        ({"weight": fp4(), "input_tensors": fp4(True, scale_calculation_mode="ceil")}, "quark_mxfp4 Wmxfp4Amxfp4_a:rule=up"),
        ({"weight": fp4(), "input_tensors": fp8()}, "quark_mxfp4 Wmxfp4Afp8_static"),
        (
            {"weight": fp4(dtype="fp8_e4m3"), "input_tensors": fp4(True, dtype="fp8_e4m3")},
            "quark_mxfp8 Wmxfp8Amxfp8_a:rule=even",
        ),
        ({"weight": fp8("per_block", block_size=[128, 128])}, "quark_fp8 Wfp8A16_b128x128"),
        (
            {
                "weight": [fp4(group_size=16, scale_format="e4m3"), fp8(is_scale_quant=True)],
                "input_tensors": [fp4(True, group_size=16, scale_format="e4m3"), fp8(is_scale_quant=True)],
            },
            "quark_nvfp4 Wnvfp4Anvfp4",
        ),
    ],
)
def test_specs(layer: dict[str, Any], expected: str) -> None:
    assert says(config(layer)) == expected


def test_vllm_57071_block_of_32_by_32_with_powers_of_two() -> None:
    """An engine took every FP8 block for 128x128 and threw 226 entries away."""
    raw = config(
        MXFP4, layer_quant_config={MODULE: {"weight": fp8("per_block", block_size=[32, 32], scale_format="float8_e8m0fnu")}}
    )
    found = rule(raw)
    assert found is not None
    assert found.scheme.weight is not None
    assert (found.scheme.weight.block, found.scheme.weight.scale_dtype) == ((32, 32), "e8m0")
    assert {t.name: t.axes for t in FORMAT.tensors(found)} == {
        "weight": ("N", "K"),
        "weight_scale": ("ceil(N/32)", "ceil(K/32)"),
    }


def test_sglang_38998_layers_with_their_own_entry_do_not_fall_back() -> None:
    raw = config(MXFP4, layer_quant_config={MODULE: {"weight": fp8("per_block", block_size=[128, 128])}, "*.mlp.*": PTPC})
    assert says(raw) == "quark_fp8 Wfp8A16_b128x128"
    assert says(raw, "model.layers.45.mlp.experts.7.up_proj") == "quark_fp8 Wfp8Afp8"
    assert says(raw, "model.layers.7.self_attn.o_proj") == "quark_mxfp4 Wmxfp4Amxfp4"


def test_first_pattern_wins_and_exclude_goes_before_all() -> None:
    raw = config(
        MXFP4, layer_quant_config={"*.mlp.up_proj": PTPC, "*.mlp.*": {"weight": fp4()}}, exclude=["*.mlp.up_proj", "lm_head"]
    )
    assert says(raw, "model.layers.0.mlp.up_proj") == ""
    raw["exclude"] = []
    assert says(raw, "model.layers.0.mlp.up_proj") == "quark_fp8 Wfp8Afp8"
    assert says(raw, "model.layers.0.mlp.down_proj") == "quark_mxfp4 Wmxfp4A16"


@pytest.mark.parametrize(
    ("entry", "name", "plain"),
    [
        ("model.layers.0.mlp.gate", "model.layers.0.mlp.gate", True),
        ("model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("model.layers.1", "model.layers.10", False),
        ("*mlp.gate", "model.layers.0.mlp.gate", True),
        ("*mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("*lm_head*", "lm_head", True),
        ("re:.*mlp.gate$", "model.layers.3.mlp.gate", True),
        ("re:model.layers.61.*", "model.layers.61.self_attn.q_proj", True),
        ("re:.*mlp.gate$", "model.layers.3.mlp.gate_proj", False),
        ("*visual*", "model.visual.blocks.0.attn.qkv_proj", True),
    ],
)
def test_vllm_48606_exclude_is_exact_wildcard_or_regex(entry: str, name: str, plain: bool) -> None:
    assert (says(config(MXFP4, exclude=[entry]), name) == "") == plain


def test_vllm_54547_stored_names_decide() -> None:
    """The list has names of the checkpoint: a module that an engine renames is still found by them."""
    parsed = FORMAT.parse(source(config(MXFP4, exclude=["model.visual.merger"])))
    assert parsed.quant_for(ModuleName(("model.visual.merger", "visual.merger"))) is None
    assert "model.visual.merger (exact)" not in [str(r.matcher) for r in parsed.stale()]


def test_class_rules() -> None:
    raw = config({}, layer_type_quant_config={"Linear": PTPC})
    parsed = FORMAT.parse(source(raw))
    assert parsed.quant_for(ModuleName(("model.x",), "Conv2d")) is None
    found = parsed.quant_for(ModuleName(("model.x",), "Linear"))
    assert found is not None
    assert str(found.scheme) == "Wfp8Afp8"


def kv_entry(**more: Any) -> dict[str, Any]:
    return {"weight": fp8(), "input_tensors": fp8(), "output_tensors": fp8(), **more}


@pytest.mark.parametrize(
    "more",
    [
        {"kv_cache_quant_config": {"*k_proj": kv_entry(), "*v_proj": kv_entry()}},
        {
            "layer_quant_config": {"*k_proj": kv_entry(), "*v_proj": kv_entry()},
            "export": {"kv_cache_group": ["*k_proj", "*v_proj"]},
        },
    ],
)
def test_kv_cache(more: dict[str, Any]) -> None:
    parsed = FORMAT.parse(source(config({"weight": fp8(), "input_tensors": fp8()}, **more)))
    assert parsed.kv is not None
    assert (parsed.kv.dtype, parsed.kv.block) == ("fp8_e4m3", (0, 0))
    names = FORMAT.kv_tensors("model.layers.0.self_attn")["k_scale"]
    assert names[:2] == (
        "model.layers.0.self_attn.k_proj.output_scale",
        "model.layers.0.self_attn.k_proj.output_quantizer.scale",
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"surprise": 1}, "'surprise'"),
        ({"export": {"surprise": 1}}, r"export\.surprise"),
        ({"export": {"weight_format": "fake_quantized"}}, "fake_quantized"),
        ({"export": {"kv_cache_group": ["*k_proj"]}}, "kv_cache_group"),
        ({"softmax_quant_spec": {"dtype": "fp8_e4m3"}}, "softmax_quant_spec"),
        ({"algo_config": [{"name": "rotation", "r1": True, "r4": True}]}, "rotation with r4"),
        ({"global_quant_config": {"weight": fp8(), "output_tensors": fp8()}}, "quantizes output_tensors"),
        ({"global_quant_config": {"weight": fp8(), "bias": fp8()}}, "quantizes bias"),
        ({"global_quant_config": {"input_tensors": fp8()}}, "quantizes the inputs and not the weight"),
        ({"global_quant_config": {"weight": fp8(surprise=1)}}, "'surprise'"),
        ({"global_quant_config": {"weight": fp8(dtype="uint4")}}, "dtype: 'uint4'"),
        ({"global_quant_config": {"weight": fp4(dtype="mx", mx_element_dtype="fp4")}}, "mx_element_dtype: 'fp4'"),
        ({"global_quant_config": {"weight": int8(symmetric=False)}}, "symmetric: False"),
        ({"global_quant_config": {"weight": fp8("per_channel", ch_axis=1)}}, "ch_axis: 1"),
        ({"global_quant_config": {"weight": fp8(is_dynamic=True)}}, "is_dynamic: True"),
        ({"global_quant_config": {"weight": fp4(group_size=64)}}, "group_size: 64"),
        ({"global_quant_config": {"weight": fp4(scale_calculation_mode="nearest")}}, "nearest"),
        ({"global_quant_config": {"weight": fp8(round_method="floor")}}, "round_method: 'floor'"),
        ({"global_quant_config": {"weight": fp8("per_block", block_size=128)}}, "block_size: 128"),
        ({"global_quant_config": {"weight": [fp8(), {**fp8(), "dtype": "int8"}]}}, "in the stages"),
        ({"exclude": "lm_head"}, "exclude: 'lm_head'"),
        ({"exclude": ["re:("]}, "regular expression"),
        ({"layer_quant_config": ["x"]}, "layer_quant_config"),
        ({"kv_cache_quant_config": {"*k_proj": kv_entry(output_tensors=int8())}}, "KV cache"),
        (
            {"kv_cache_quant_config": {"*k_proj": kv_entry(), "*v_proj": kv_entry(output_tensors=fp8(is_dynamic=True))}},
            "different ways",
        ),
    ],
)
def test_config_that_is_not_understood_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FORMAT.parse(source(config(PTPC, **change)))


def test_empty_global_config_leaves_other_layers_at_16_bit() -> None:
    raw = config({}, layer_quant_config={"*block_sparse_moe.experts": MXFP4})
    assert says(raw, "model.layers.0.block_sparse_moe.experts.3.w1") == "quark_mxfp4 Wmxfp4Amxfp4"
    assert says(raw, MODULE) == ""


@pytest.mark.parametrize(
    "name", ["Wfp8Afp8", "Wfp8Afp8_tensor_static", "W8A8_tensor_a:tensor.asym.static", "Wmxfp4Afp8_static", "Wnvfp4Anvfp4"]
)
def test_internal_names_of_transformers_5(name: str) -> None:
    weight = random_weight(QuantScheme.parse(name), 32, 64)
    quant = FORMAT.quant_for_scheme(weight)
    internal = replace(quant, opts=INTERNAL)
    stored = FORMAT.encode(weight, internal)
    assert all("quantizer" in name or name == "weight" for name in stored)
    assert FORMAT.decode(stored, internal, 32, 64).equal(weight)
    tensors = {f"{MODULE}.{name}": tensor for name, tensor in stored.items()}
    raw = FORMAT.quantization_config({MODULE: quant})
    parsed = FORMAT.parse(source(raw, tensors))
    assert parsed.quant_for(ModuleName((MODULE,))) == internal
    assert parsed.inferred


def test_scales_of_either_shape() -> None:
    """Quark writes [N], compressed-tensors [N, 1]: both are one for each row."""
    weight = random_weight(QuantScheme.parse("Wfp8Afp8"), 8, 16)
    quant = FORMAT.quant_for_scheme(weight)
    stored = FORMAT.encode(weight, quant)
    assert stored["weight_scale"].shape == (8,)
    declared = {t.name: t for t in FORMAT.tensors(quant)}["weight_scale"]
    assert declared.match((8, 1), {"N": 8, "K": 16}) is not None
    assert FORMAT.decode({**stored, "weight_scale": stored["weight_scale"][:, None]}, quant, 8, 16).equal(weight)


def test_zero_points_of_symmetric_layers_are_checked() -> None:
    weight = random_weight(QuantScheme.parse("W8A8_tensor_static"), 8, 16)
    quant = FORMAT.quant_for_scheme(weight)
    stored = {
        **FORMAT.encode(weight, quant),
        "weight_zero_point": torch.zeros((), dtype=torch.int8),
        "input_zero_point": torch.zeros((), dtype=torch.int8),
    }
    assert FORMAT.decode(stored, quant, 8, 16).equal(weight)
    for name in ("weight_zero_point", "input_zero_point"):
        with pytest.raises(DecodeError, match=name):
            FORMAT.decode({**stored, name: torch.tensor(3, dtype=torch.int8)}, quant, 8, 16)


def test_fp4_nibbles_and_nan_scales() -> None:
    quant = LayerQuant(QuantScheme.parse("Wmxfp4A16"), "quark_mxfp4")
    stored = {
        "weight": torch.arange(256, dtype=torch.uint8).reshape(1, 256),
        "weight_scale": torch.full((1, 16), 127, dtype=torch.uint8),
    }
    values = FORMAT.decode(stored, quant, 1, 512).dequantize()[0]
    assert values[0::2].tolist() == [E2M1[b & 15] for b in range(256)]
    assert values[1::2].tolist() == [E2M1[b >> 4] for b in range(256)]
    stored["weight_scale"][0, 3] = 255
    with pytest.raises(DecodeError, match="1 of 16"):
        FORMAT.decode(stored, quant, 1, 512)


@pytest.mark.parametrize("name", ["W4A16_g128", "W8A8", "Wmxfp8Amxfp8", "Wnvfp4A16_g32"])
def test_foreign_weight_has_no_layout(name: str) -> None:
    with pytest.raises(CannotEncode, match="choose another format"):
        FORMAT.quant_for_scheme(random_weight(QuantScheme.parse(name), 16, 128))
