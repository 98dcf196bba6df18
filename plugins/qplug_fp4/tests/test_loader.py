"""The formats against an unpacker that reads one code at a time, golden bytes, the gpt-oss stack, and hostile input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_fp4.loader import MXFP4Format, MXFP8Format, NVFP4Format

from qplug_core.axes import StoredTensor
from qplug_core.config import LayerQuant, ModuleName
from qplug_core.errors import CannotEncode, CheckpointError, ConfigError, DecodeError
from qplug_core.layer import LayerSpec, StoredPart
from qplug_core.method import decode_part
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source
from qplug_core.testing import random_weight
from qplug_core.weight import E2M1, QuantWeight, stack

NV, MX, MX8 = NVFP4Format(), MXFP4Format(), MXFP8Format()
MODULE = "model.layers.0.mlp.up_proj"
DIVISOR = (("global_scale", "weight_global_scale"),)


def quant(name: str, layout: str, opts: tuple[tuple[str, Any], ...] = ()) -> LayerQuant:
    return LayerQuant(QuantScheme.parse(name), layout, opts)


def source(config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Source:
    infos = MemorySource(tensors or {}).tensors
    return Source(Path("memory"), {"quantization_config": config}, config, "config.json", {}, infos, {})


def named(tensors: dict[str, torch.Tensor], module: str = MODULE) -> dict[str, torch.Tensor]:
    return {StoredTensor(name, (), ()).full_name(module): tensor for name, tensor in tensors.items()}


def nvfp4(byte: int = 0x7A, scale: int = 0x38, outer: float = 0.01) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.full((1, 8), byte, dtype=torch.uint8),
        "weight_scale": torch.full((1, 1), scale, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(outer),
    }


def mxfp4(scale: int = 127, byte: int = 0x7A) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.full((1, 16), byte, dtype=torch.uint8),
        "weight_scale": torch.tensor([[scale]], dtype=torch.uint8),
    }


def slowly(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """gpt-oss blocks ``[N, K/32, 16]`` as float32 ``[N, K]``, one code at a time."""
    rows = []
    for row, exponents in zip(blocks.tolist(), scales.tolist(), strict=True):
        values = []
        for block, exponent in zip(row, exponents, strict=True):
            for byte in block:
                values += [E2M1[byte & 15] * 2.0 ** (exponent - 127), E2M1[byte >> 4] * 2.0 ** (exponent - 127)]
        rows.append(values)
    return torch.tensor(rows)


def gpt_oss(experts: int = 3, n: int = 64, k: int = 96) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "m.experts.gate_up_proj_blocks": torch.randint(0, 256, (experts, n, k // 32, 16), generator=draw, dtype=torch.uint8),
        "m.experts.gate_up_proj_scales": torch.randint(118, 126, (experts, n, k // 32), generator=draw, dtype=torch.uint8),
    }


def test_golden_nvfp4_byte() -> None:
    weight = NV.decode(nvfp4(), quant("Wnvfp4A16", "nvfp4"), 1, 16).dequantize()
    torch.testing.assert_close(weight[0, :2], torch.tensor([-0.01, 0.06]), rtol=1e-7, atol=0)


@pytest.mark.parametrize(("scale", "factor"), [(127, 1.0), (128, 2.0), (0, 2.0**-127), (252, 2.0**125)])
def test_golden_e8m0(scale: int, factor: float) -> None:
    weight = MX.decode(mxfp4(scale), quant("Wmxfp4A16", "mxfp4"), 1, 32)
    assert weight.dequantize()[0, :2].double().tolist() == [-1.0 * factor, 6.0 * factor]


def test_all_codes_by_value() -> None:
    stored = {
        "weight": torch.arange(256, dtype=torch.uint8).reshape(1, 256),
        "weight_scale": torch.full((1, 16), 127, dtype=torch.uint8),
    }
    weight = MX.decode(stored, quant("Wmxfp4A16", "mxfp4"), 1, 512).dequantize()[0]
    assert weight[0::2].tolist() == [E2M1[b & 15] for b in range(256)]
    assert weight[1::2].tolist() == [E2M1[b >> 4] for b in range(256)]


def test_sglang_23625_swapped_nibbles_are_another_weight() -> None:
    """One producer packed the high nibble first: the images were white. Nothing in a file shows it, the numbers do."""
    stored = nvfp4(0x7A)
    right = NV.decode(stored, quant("Wnvfp4A16", "nvfp4"), 1, 16).dequantize()
    wrong = NV.decode(
        {**stored, "weight": torch.full((1, 8), 0xA7, dtype=torch.uint8)}, quant("Wnvfp4A16", "nvfp4"), 1, 16
    ).dequantize()
    assert torch.equal(right[:, 0::2], wrong[:, 1::2])
    assert float((right - wrong).norm() / right.norm()) > 1


def test_block_scale_of_zero_is_a_block_of_zeros() -> None:
    weight = NV.decode(nvfp4(scale=0), quant("Wnvfp4A16", "nvfp4"), 1, 16)
    assert float(weight.dequantize().abs().max()) == 0.0
    assert NV.encode(weight, quant("Wnvfp4A16", "nvfp4"))["weight_scale"].view(torch.uint8).item() == 0


def test_e8m0_255_is_nan_and_refused() -> None:
    with pytest.raises(DecodeError, match="1 of 1 block scales are NaN"):
        MX.decode(mxfp4(255), quant("Wmxfp4A16", "mxfp4"), 1, 32)


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_nan_block_scale_of_nvfp4_is_refused(byte: int) -> None:
    with pytest.raises(DecodeError, match="NaN"):
        NV.decode(nvfp4(scale=byte), quant("Wnvfp4A16", "nvfp4"), 1, 16)


def test_modular_6600_global_scale_that_divides_is_read_as_a_divisor() -> None:
    """ModelOpt multiplies by weight_scale_2, compressed-tensors divides by weight_global_scale."""
    stored = nvfp4(outer=0.015625)
    divisor = {"weight": stored["weight"], "weight_scale": stored["weight_scale"], "weight_global_scale": torch.tensor(64.0)}
    multiplied = NV.decode(stored, quant("Wnvfp4A16", "nvfp4"), 1, 16)
    divided = NV.decode(divisor, quant("Wnvfp4A16", "nvfp4", DIVISOR), 1, 16)
    assert (multiplied.global_div, divided.global_div) == (False, True)
    assert torch.equal(multiplied.dequantize(), divided.dequantize())
    assert torch.equal(NV.encode(divided, quant("Wnvfp4A16", "nvfp4", DIVISOR))["weight_global_scale"], torch.tensor(64.0))


@pytest.mark.parametrize(
    ("value", "opts", "other"), [(3584.0, (), "weight_global_scale"), (0.00028, DIVISOR, "weight_scale_2")]
)
def test_modular_6600_reciprocal_under_the_wrong_name_is_refused(value: float, opts: Any, other: str) -> None:
    stored = nvfp4(outer=value)
    if opts:
        stored["weight_global_scale"] = stored.pop("weight_scale_2")
    with pytest.raises(DecodeError, match=f"reciprocal, so rename it to {other}"):
        NV.decode(stored, quant("Wnvfp4A16", "nvfp4", opts), 1, 16)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -0.1])
def test_global_scale_that_is_no_scale_is_refused(value: float) -> None:
    with pytest.raises(DecodeError, match="positive finite"):
        NV.decode(nvfp4(outer=value), quant("Wnvfp4A16", "nvfp4"), 1, 16)


def test_divisor_and_multiplier_have_flags_of_their_own_spelling() -> None:
    stored = {**nvfp4(), "input_scale": torch.tensor([0.5])}
    weight = NV.decode(stored, quant("Wnvfp4Anvfp4", "nvfp4"), 1, 16)
    assert (weight.act_div, weight.act_scale) == (False, torch.tensor(0.5))
    stored = {"weight_global_scale": torch.tensor(100.0), "input_global_scale": torch.tensor([2.0]), **nvfp4()}
    weight = NV.decode(stored, quant("Wnvfp4Anvfp4", "nvfp4", DIVISOR), 1, 16)
    assert (weight.act_div, weight.global_div) == (True, True)


def test_reciprocals_are_not_stored_for_each_other() -> None:
    weight = random_weight(QuantScheme.parse("Wnvfp4A16"), 4, 32)
    with pytest.raises(CannotEncode, match="a reciprocal is not exact"):
        NV.encode(weight, quant("Wnvfp4A16", "nvfp4", DIVISOR))


def test_vllm_47515_gate_and_up_with_other_global_scales_stay_exact() -> None:
    """Engines took the larger of two global scales for both halves. Here each row keeps its own."""
    from qplug_core.weight import concat

    gate, up = (NV.decode(nvfp4(outer=outer), quant("Wnvfp4A16", "nvfp4"), 1, 16) for outer in (0.01, 0.0214))
    assert torch.equal(concat([gate, up]).dequantize(), torch.cat([gate.dequantize(), up.dequantize()]))


def test_swizzled_scales_are_refused() -> None:
    """modular 6600: scales padded to 128 rows and 4 columns are in a kernel's order, not row by row."""
    tensors = {
        f"{MODULE}.weight": torch.zeros(96, 16, dtype=torch.uint8),
        f"{MODULE}.weight_scale": torch.zeros(128, 4).to(torch.float8_e4m3fn),
    }
    tensors[f"{MODULE}.weight_scale_2"] = torch.tensor(0.01)
    with pytest.raises(ConfigError, match=r"\[128, 4\].*linear scales"):
        NV.parse(source({"quant_method": "nvfp4"}, tensors))
    with pytest.raises(CheckpointError, match=r"\[128, 4\]"):
        decode_part(
            MemorySource(tensors),
            NV,
            quant("Wnvfp4A16", "nvfp4"),
            LayerSpec(MODULE, "linear", 96, 32),
            StoredPart(MODULE, 96),
        )


@pytest.mark.parametrize("expert", [0, 2])
def test_one_expert_of_the_gpt_oss_stack(expert: int) -> None:
    tensors = gpt_oss()
    layer = LayerSpec(f"m.experts.{expert}.gate_up_proj", "experts", 64, 96)
    part = StoredPart("m.experts.gate_up_proj", 64, expert=expert)
    weight = decode_part(MemorySource(tensors), MX, quant("Wmxfp4A16", "mxfp4_blocks"), layer, part)
    expected = slowly(tensors["m.experts.gate_up_proj_blocks"][expert], tensors["m.experts.gate_up_proj_scales"][expert])
    assert torch.equal(weight.dequantize(), expected)


@pytest.mark.parametrize(("rows", "columns"), [((0, 32), None), ((7, 40), None), ((0, 64), (32, 64)), ((5, 9), (30, 71))])
def test_cut_of_one_expert_is_the_cut(rows: tuple[int, int], columns: tuple[int, int] | None) -> None:
    tensors = gpt_oss()
    layer = LayerSpec("m.experts.1.gate_up_proj", "experts", rows[1] - rows[0], 96, columns=columns)
    part = StoredPart("m.experts.gate_up_proj", rows[1] - rows[0], rows=rows, stored_n=64, expert=1)
    weight = decode_part(MemorySource(tensors), MX, quant("Wmxfp4A16", "mxfp4_blocks"), layer, part)
    whole = slowly(tensors["m.experts.gate_up_proj_blocks"][1], tensors["m.experts.gate_up_proj_scales"][1])
    assert torch.equal(weight.dequantize(), whole[slice(*rows), slice(*(columns or (0, 96)))])


def test_stack_of_experts_is_written_as_gpt_oss_has_it() -> None:
    tensors = gpt_oss()
    experts = []
    for e in range(3):
        part = StoredPart("m.experts.gate_up_proj", 64, expert=e)
        found = decode_part(
            MemorySource(tensors), MX, quant("Wmxfp4A16", "mxfp4_blocks"), LayerSpec("x", "experts", 64, 96), part
        )
        assert isinstance(found, QuantWeight)
        experts.append(found)
    stacked = stack(experts)
    chosen = MX.quant_for_scheme(stacked)
    assert chosen.layout == "mxfp4_blocks"
    again = named(MX.encode(stacked, chosen), "m.experts.gate_up_proj")
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_gpt_oss_needs_columns_in_blocks_of_32() -> None:
    with pytest.raises(CannotEncode, match="48 columns"):
        MX.encode(random_weight(QuantScheme.parse("Wmxfp4A16"), 4, 48), quant("Wmxfp4A16", "mxfp4_blocks"))


GPT_OSS = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", "mxfp4_blocks"),
        ("model.layers.11.mlp.experts.3.down_proj", "mxfp4_blocks"),
        ("model.layers.0.self_attn.q_proj", ""),
        ("model.layers.0.mlp.router", ""),
        ("lm_head", ""),
        ("model.layers.0.mlp.shared", ""),
    ],
)
def test_gpt_oss_config(name: str, layout: str) -> None:
    found = MX.parse(source(GPT_OSS)).quant_for(ModuleName((name,)))
    assert (found.layout if found else "") == layout


def test_ignored_layer_1_is_not_layer_10() -> None:
    config = {"quant_method": "mxfp4", "scheme": "Wmxfp4A16", "modules_to_not_convert": ["model.layers.1"]}
    parsed = MX.parse(source(config))
    assert parsed.quant_for(ModuleName(("model.layers.1.mlp.up_proj",))) is None
    assert parsed.quant_for(ModuleName(("model.layers.10.mlp.up_proj",))) is not None


@pytest.mark.parametrize(
    ("name", "plain"), [("model.layers.0.mlp.gate", True), ("model.layers.0.mlp.gate_proj", False), ("gate.x", True)]
)
def test_gate_is_not_gate_proj(name: str, plain: bool) -> None:
    config = {"quant_method": "nvfp4", "scheme": "Wnvfp4A16", "modules_to_not_convert": ["gate"]}
    assert (NV.parse(source(config)).quant_for(ModuleName((name,))) is None) == plain


def test_plain_mxfp4_is_told_from_gpt_oss_by_the_headers() -> None:
    weight = random_weight(QuantScheme.parse("Wmxfp4A16"), 32, 64)
    tensors = named(MX.encode(weight, quant("Wmxfp4A16", "mxfp4")))
    found = MX.parse(source({"quant_method": "mxfp4"}, tensors)).quant_for(ModuleName((MODULE,)))
    assert found == quant("Wmxfp4A16", "mxfp4")


@pytest.mark.parametrize(("stored", "scheme"), [("input_scale", "Wnvfp4Anvfp4"), ("other", "Wnvfp4A16")])
def test_nvfp4_activations_follow_from_the_file(stored: str, scheme: str) -> None:
    tensors = {f"{MODULE}.{stored}": torch.tensor(1.0)}
    parsed = NV.parse(source({"quant_method": "nvfp4"}, tensors))
    found = parsed.quant_for(ModuleName((MODULE,)))
    assert found is not None
    assert str(found.scheme) == scheme
    assert bool(parsed.inferred) == (stored == "other")


def test_names_before_files_are_known_have_their_defaults() -> None:
    schemes = {
        fmt.name: fmt.parse(source({"quant_method": fmt.name})).quant_for(ModuleName(("m.experts.0.up_proj",)))
        for fmt in (NV, MX, MX8)
    }
    assert {name: str(found.scheme) for name, found in schemes.items() if found} == {
        "nvfp4": "Wnvfp4Anvfp4",
        "mxfp4": "Wmxfp4A16",
        "mxfp8": "Wmxfp8Amxfp8_a:rule=ceil",
    }


def test_scale_called_inverse_multiplies() -> None:
    weight = random_weight(QuantScheme.parse("Wmxfp8Amxfp8_a:rule=ceil"), 32, 64)
    stored = MX8.encode(weight, MX8.quant_for_scheme(weight))
    stored["weight_scale_inv"] = stored.pop("weight_scale")
    parsed = MX8.parse(source({"quant_method": "mxfp8", "weight_block_size": [1, 32]}, named(stored)))
    found = parsed.quant_for(ModuleName((MODULE,)))
    assert found is not None
    assert MX8.decode(stored, found, 32, 64).equal(weight)
    assert any("weight_scale_inv" in text for text in parsed.inferred)


def test_quantized_lm_head_is_seen() -> None:
    tensors = {
        "lm_head.weight": torch.zeros(8, 16, dtype=torch.uint8),
        "lm_head.weight_scale": torch.zeros(8, 2).to(torch.float8_e4m3fn),
    }
    config = {"quant_method": "nvfp4", "scheme": "Wnvfp4A16"}
    assert NV.parse(source(config, tensors)).quant_for(ModuleName(("lm_head",))) is not None
    assert NV.parse(source(config)).quant_for(ModuleName(("lm_head",))) is None


def test_both_global_scales_are_refused() -> None:
    tensors = {f"{MODULE}.weight_scale_2": torch.tensor(0.1), f"{MODULE}.weight_global_scale": torch.tensor(10.0)}
    with pytest.raises(ConfigError, match="one is a multiplier and one a divisor"):
        NV.parse(source({"quant_method": "nvfp4"}, tensors))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"surprise": 1}, "'surprise'"),
        ({"group_size": 64}, "group_size: 64"),
        ({"scheme": "W4A16"}, "nvfp4 stores fp4_e2m1"),
        ({"scheme": "what"}, "not a scheme name"),
        ({"scheme": "Wnvfp4A16", "group_size": 32}, "contradict"),
        ({"group_size": 32}, "which of FP8 or FP4 is not said"),
        ({"modules_to_not_convert": "lm_head"}, "a list of names"),
        ({"layers": ["x"]}, "an object"),
        ({"layers": {MODULE: "W8A8"}}, MODULE.replace(".", r"\.")),
        ({"global_scale": "inverse"}, "global_scale: 'inverse'"),
        ({"activation_scheme": "static"}, "activation_scheme"),
        ({"kv_cache_quant_algo": "INT2"}, "INT2"),
    ],
)
def test_config_that_is_not_understood_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        NV.parse(source({"quant_method": "nvfp4", **change}))


@pytest.mark.parametrize(
    "said", [{"kv_cache_quant_algo": "FP8"}, {"kv_cache_scheme": {"type": "float", "num_bits": 8, "dynamic": False}}]
)
def test_kv_cache(said: dict[str, Any]) -> None:
    kv = NV.parse(source({"quant_method": "nvfp4", **said})).kv
    assert kv is not None
    assert kv.dtype == "fp8_e4m3"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Wnvfp4A16", "mxfp4 stores fp4_e2m1 with e8m0"),
        ("W4A16", "mxfp4 stores"),
        ("Wmxfp4Amxfp4_static", "have no tensors"),
    ],
)
def test_foreign_weight_has_no_layout(name: str, words: str) -> None:
    with pytest.raises(CannotEncode, match=words):
        MX.quant_for_scheme(random_weight(QuantScheme.parse(name), 16, 128))


def test_gpt_oss_config_of_other_layers_is_refused() -> None:
    with pytest.raises(CannotEncode, match="gpt-oss stores experts alone"):
        MX.quantization_config({MODULE: quant("Wmxfp4A16", "mxfp4_blocks")})
    written = MX.quantization_config({"m.experts.gate_up_proj": quant("Wmxfp4A16", "mxfp4_blocks"), "lm_head": None})
    assert written == {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
