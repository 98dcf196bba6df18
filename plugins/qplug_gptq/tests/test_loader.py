"""The format against an unpacker that reads one bit at a time, golden words, and hostile input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qplug_gptq.loader import GPTQFormat

from qplug_core.config import LayerQuant, ModuleName
from qplug_core.errors import CannotEncode, ConfigError, DecodeError
from qplug_core.packing import pack, unpack
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source
from qplug_core.testing import random_weight
from qplug_core.weight import QuantWeight

FORMAT = GPTQFormat()
W4 = QuantScheme.parse("W4A16_g128")
MODULE = "model.layers.0.mlp.up_proj"


def bit(words: np.ndarray, position: int) -> np.ndarray:
    """Bit ``position`` of the streams that run down the rows of ``words``."""
    return (words[position // 32].astype(np.int64) >> (position % 32)) & 1


def by_bits(tensors: dict[str, torch.Tensor], bits: int, v1: bool) -> np.ndarray:
    """The float32 weight ``[N, K]``, slowly."""
    qweight, qzeros = tensors["qweight"].numpy(), tensors["qzeros"].numpy().T
    scales, index = tensors["scales"].float().numpy(), tensors["g_idx"].numpy()
    codes = np.stack([sum(bit(qweight, bits * k + b) << b for b in range(bits)) for k in range(len(index))])
    zeros = np.stack([sum(bit(qzeros, bits * n + b) << b for b in range(bits)) for n in range(scales.shape[1])], axis=1)
    return ((codes - (zeros + v1)[index]).astype(np.float32) * scales[index]).T


def quant(name: str, layout: str = "gptq", **opts: Any) -> LayerQuant:
    return LayerQuant(QuantScheme.parse(name), layout, tuple(opts.items()))


def random_file(bits: int, n: int, k: int, group: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random words, with zero points that both versions can hold: all ones have no meaning that readers agree on in v1."""
    draw = torch.Generator().manual_seed(seed)
    groups = -(-k // group)
    zeros = torch.randint(0, 2**bits - 1, (groups, n), generator=draw, dtype=torch.uint8)
    return {
        "qweight": torch.randint(-(2**31), 2**31 - 1, (k * bits // 32, n), generator=draw, dtype=torch.int32),
        "qzeros": pack(zeros, bits),
        "scales": torch.rand(groups, n, generator=draw).half(),
        "g_idx": (torch.arange(k) // group).int(),
    }


def source(config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None, **files: Any) -> Source:
    infos = MemorySource(tensors or {}).tensors
    return Source(Path("memory"), {"quantization_config": config}, config, "config.json", files, infos, {})


def rule(config: dict[str, Any], name: str = MODULE, tensors: dict[str, torch.Tensor] | None = None) -> LayerQuant | None:
    return FORMAT.parse(source(config, tensors)).quant_for(ModuleName((name,)))


BASE = {
    "bits": 4, "group_size": 128, "quant_method": "gptq", "sym": True, "desc_act": False, "checkpoint_format": "gptq",
}  # fmt: skip


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("n", "k", "group"), [(32, 128, 32), (64, 96, 64), (96, 256, 128)])
def test_decode_equals_reading_bit_by_bit(bits: int, layout: str, n: int, k: int, group: int) -> None:
    stored = random_file(bits, n, k, group)
    weight = FORMAT.decode(stored, quant(f"W{bits}A16_g{group}_asym", layout), n, k)
    np.testing.assert_array_equal(weight.dequantize().numpy(), by_bits(stored, bits, layout == "gptq"))
    again = FORMAT.encode(weight, quant(f"W{bits}A16_g{group}_asym", layout))
    assert all(torch.equal(again[name], stored[name]) for name in stored)


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_pack_is_the_inverse_of_unpack(bits: int, rows: int, units: int, seed: int) -> None:
    values = torch.randint(0, 2**bits, (rows, 32 * units), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = pack(values, bits)
    assert words.shape == (rows, units * bits)
    assert torch.equal(unpack(words, bits), values)


def test_golden_words() -> None:
    words = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert unpack(words, 4).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert pack(torch.full((1, 8), 7, dtype=torch.uint8), 4).item() == 0x77777777
    stored = FORMAT.encode(random_weight(W4, 8, 128), quant("W4A16_g128"))
    assert stored["qzeros"].tolist() == [[0x77777777]]
    stored = FORMAT.encode(random_weight(W4, 8, 128), quant("W4A16_g128", "gptq_v2"))
    assert stored["qzeros"].tolist() == [[0x88888888 - 2**32]]
    # Values 10 and 21 of a 3-bit stream lie on both sides of a word's end.
    values = torch.zeros(1, 32, dtype=torch.uint8)
    values[0, 10], values[0, 21] = 7, 5
    assert [w & 0xFFFFFFFF for w in pack(values, 3)[0].tolist()] == [0xC0000000, 0x80000001, 0x2]


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_zero_point_that_readers_disagree_about_is_not_written(layout: str) -> None:
    weight = random_weight(QuantScheme.parse("W4A16_g128_asym"), 8, 128, zeros=(16, 16))
    with pytest.raises(CannotEncode, match="agree on 0 to 15"):
        FORMAT.encode(weight, quant("W4A16_g128_asym", layout))
    with pytest.raises(CannotEncode, match="agree on 0 to 15"):
        FORMAT.quant_for_scheme(weight)


def test_zero_point_zero_needs_v2() -> None:
    weight = random_weight(QuantScheme.parse("W4A16_g128_asym"), 8, 128, zeros=(0, 0))
    assert FORMAT.quant_for_scheme(weight).layout == "gptq_v2"
    with pytest.raises(CannotEncode, match="gptq_v2"):
        FORMAT.encode(weight, quant("W4A16_g128_asym", "gptq"))


def test_symmetric_codes_are_signed_and_have_no_zeros() -> None:
    weight = FORMAT.decode(FORMAT.encode(random_weight(W4, 16, 256), quant("W4A16_g128")), quant("W4A16_g128"), 16, 256)
    assert weight.codes.dtype == torch.int8
    assert weight.zeros is None
    assert (int(weight.codes.min()), int(weight.codes.max())) == (-8, 7)


@pytest.mark.parametrize(("said", "right"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_config_that_lies_about_zero_points_is_refused(said: str, right: str) -> None:
    stored = FORMAT.encode(random_weight(W4, 16, 256), quant("W4A16_g128", right))
    with pytest.raises(DecodeError, match=f"set checkpoint_format to '{right}'"):
        FORMAT.decode(stored, quant("W4A16_g128", said), 16, 256)


def test_zero_points_in_a_symmetric_layer_are_refused() -> None:
    with pytest.raises(DecodeError, match="set sym to false"):
        FORMAT.decode(random_file(4, 16, 256, 128), quant("W4A16_g128"), 16, 256)


def test_order_of_columns_is_obeyed_whatever_the_config_says() -> None:
    stored = random_file(4, 16, 256, 128)
    stored["g_idx"] = stored["g_idx"][torch.randperm(256, generator=torch.Generator().manual_seed(1))]
    weight = FORMAT.decode(stored, quant("W4A16_g128_asym"), 16, 256)
    assert weight.group_index is not None
    assert weight.scheme.act_order
    np.testing.assert_array_equal(weight.dequantize().numpy(), by_bits(stored, 4, True))


def test_index_that_says_nothing_is_dropped() -> None:
    weight = FORMAT.decode(random_file(4, 16, 256, 128), quant("W4A16_g128_asym_actorder"), 16, 256)
    assert weight.group_index is None
    assert not weight.scheme.act_order


@pytest.mark.parametrize("bad", [-1, 2])
def test_index_outside_of_the_scales_is_refused(bad: int) -> None:
    stored = random_file(4, 16, 256, 128)
    stored["g_idx"][77] = bad
    with pytest.raises(DecodeError, match="groups 0 to 1"):
        FORMAT.decode(stored, quant("W4A16_g128_asym"), 16, 256)


def test_file_without_index() -> None:
    meant = quant("W4A16_g128", g_idx=False)
    weight = random_weight(W4, 16, 256)
    stored = FORMAT.encode(weight, meant)
    assert "g_idx" not in stored
    assert {t.name for t in FORMAT.tensors(meant)} == set(stored)
    assert FORMAT.decode(stored, meant, 16, 256).equal(weight)
    config = {**BASE}
    names = {f"{MODULE}.{name}": tensor for name, tensor in stored.items()}
    assert rule(config, tensors=names) == meant


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (random_weight(QuantScheme.parse("WNF4A16"), 32, 128), "scheme WNF4A16"),
        (random_weight(QuantScheme.parse("W8A16_2:4"), 32, 128), "scheme W8A16"),
        (random_weight(QuantScheme.parse("W8A16_tensor"), 32, 128), "scales by tensor"),
        (random_weight(QuantScheme.parse("Wfp8A16"), 32, 128), "scheme Wfp8A16"),
    ],
)
def test_foreign_weight_has_no_layout(weight: QuantWeight, words: str) -> None:
    with pytest.raises(CannotEncode, match=words):
        FORMAT.quant_for_scheme(weight)


def test_ragged_shape_is_refused() -> None:
    with pytest.raises(CannotEncode, match=r"\[8, 100\].*8 codes of 4 bits"):
        FORMAT.encode(random_weight(W4, 8, 100), quant("W4A16_g128"))


def test_smallest_config() -> None:
    found = FORMAT.parse(source({"bits": 4, "group_size": 128, "quant_method": "gptq"}))
    quant_ = found.quant_for(ModuleName((MODULE,)))
    assert quant_ is not None
    assert str(quant_.scheme) == "W4A16_g128_asym"
    assert quant_.layout == "gptq"
    said = " ".join(found.inferred)
    assert all(word in said for word in ("sym", "desc_act", "checkpoint_format"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 5}, "bits: 5"),
        ({"bits": True}, "bits: True"),
        ({"bits": "4"}, "bits: '4'"),
        ({"group_size": 0}, "group_size: 0"),
        ({"sym": "yes"}, "sym: 'yes'"),
        ({"w_bit": 8}, "bits: 4 and w_bit: 8"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, "contradict"),
        ({"checkpoint_format": "bitblas"}, "'bitblas'"),
        ({"checkpoint_format": "gptq", "is_marlin_format": True}, "different layouts"),
        ({"quant_method": "gptq_marlin_24"}, "different layouts"),
        ({"checkpoint_format": "marlin", "sym": False}, "holds no zero points"),
        ({"checkpoint_format": "marlin", "desc_act": True}, "holds no g_idx"),
        ({"checkpoint_format": "marlin", "bits": 8}, "bits: 8"),
        ({"bits": 16}, "bits: 16"),
        ({"quant_method": "awq"}, "'awq'"),
        ({"pack_dtype": "int64"}, "pack_dtype"),
        ({"is_marlin_format": "yes"}, "is_marlin_format"),
        ({"rotation": "hadamard"}, "rotation"),
        ({"surprise": 1}, "'surprise'"),
        ({"dynamic": {".*": {"surprise": 1}}}, "'surprise'"),
        ({"dynamic": {"+:(": {}}}, "regular expression"),
        ({"dynamic": ["x"]}, "dynamic"),
        ({"modules_in_block_to_quantize": [1]}, "modules_in_block_to_quantize"),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert"),
    ],
)
def test_config_that_is_not_understood_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FORMAT.parse(source({**BASE, **change}))


def test_keys_that_change_nothing_are_listed() -> None:
    found = FORMAT.parse(source({**BASE, "meta": {"quantizer": ["gptqmodel:7.6.0"]}, "damp_percent": 0.1, "rotation": None}))
    assert found.producer == "gptqmodel:7.6.0"
    assert {"meta", "damp_percent", "rotation"} <= found.metadata.keys()


def test_two_files_that_disagree_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"bits: 4 and quantize_config\.json says 8"):
        FORMAT.parse(source(BASE, **{"quantize_config.json": {**BASE, "bits": 8}}))


@pytest.mark.parametrize(
    ("key", "value", "words"), [("bits", 8, "stored with 4 bits"), ("group_size", 64, "2 groups over 256 columns")]
)
def test_config_that_the_shapes_contradict_is_refused(key: str, value: int, words: str) -> None:
    stored = FORMAT.encode(random_weight(W4, 16, 256), quant("W4A16_g128"))
    names = {f"{MODULE}.{name}": tensor for name, tensor in stored.items()}
    with pytest.raises(ConfigError, match=words):
        FORMAT.parse(source({**BASE, key: value}, names))


def test_act_order_without_index_is_refused() -> None:
    stored = FORMAT.encode(random_weight(W4, 16, 256), quant("W4A16_g128", g_idx=False))
    names = {f"{MODULE}.{name}": tensor for name, tensor in stored.items()}
    with pytest.raises(ConfigError, match="g_idx"):
        FORMAT.parse(source({**BASE, "desc_act": True}, names))


def test_dynamic_rules_first_match_wins() -> None:
    config = {
        **BASE,
        "dynamic": {r"-:.*layers\.0\.": {}, r"+:.*up_proj": {"bits": 8, "group_size": 32}, "lm_head": {"bits": 2}},
    }
    assert rule(config) is None
    second = rule(config, "model.layers.1.mlp.up_proj")
    assert second is not None
    assert str(second.scheme) == "W8A16_g32"
    head = rule(config, "lm_head")
    assert head is not None
    assert str(head.scheme) == "W2A16_g128"
    last = rule(config, "model.layers.1.mlp.down_proj")
    assert last is not None
    assert str(last.scheme) == "W4A16_g128"


def test_lm_head_and_embeddings_stay_16_bit_unless_said() -> None:
    assert rule(BASE, "lm_head") is None
    assert rule({**BASE, "dynamic": {".*": {"bits": 8}}}, "lm_head") is None
    assert rule({**BASE, "lm_head": True}, "lm_head") is not None
    assert rule(BASE, "lm_head", {"lm_head.qweight": torch.zeros(1, 1, dtype=torch.int32)}) is not None
    parsed = FORMAT.parse(source(BASE))
    assert parsed.quant_for(ModuleName(("model.embed_tokens",), "Embedding")) is None
    assert parsed.stale() == [parsed.rules[-1]]


def test_allow_list() -> None:
    config = {**BASE, "modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.up_proj"]]}
    assert rule(config) is not None
    assert rule(config, "model.layers.0.mlp.down_proj") is None


def test_written_config_says_every_layer() -> None:
    layers = {
        "a.q_proj": quant("W4A16_g128"),
        "a.k_proj": quant("W4A16_g128"),
        "a.v_proj": quant("W8A16_g32_asym"),
        "a.o_proj": None,
        "lm_head": quant("W8A16"),
    }
    found = FORMAT.parse(source(FORMAT.quantization_config(layers)))
    assert {name: found.quant_for(ModuleName((name,))) for name in layers} == layers
    with pytest.raises(CannotEncode, match="one checkpoint_format"):
        FORMAT.quantization_config({**layers, "b": quant("W4A16_g128", "gptq_v2")})
