"""What users of engines and quantizers ran into with these files, each under its upstream number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_compressed_tensors.loader import CompressedTensorsFormat

from qplug_core.config import LayerQuant, ModuleName
from qplug_core.errors import CoverError
from qplug_core.layer import LayerSpec, StoredPart
from qplug_core.method import decode_part
from qplug_core.planner import Planner
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source
from qplug_core.testing import random_weight

FORMAT = CompressedTensorsFormat()
ATTENTION = "model.layers.0.self_attn"
W4 = LayerQuant(QuantScheme.parse("W4A16_g32"), "pack-quantized")
FP8 = LayerQuant(QuantScheme.parse("Wfp8Afp8"), "float-quantized")
BLOCK = LayerQuant(QuantScheme.parse("Wfp8Afp8_b128x128"), "float-quantized")


def stored(module: str, quant: LayerQuant, n: int, k: int) -> dict[str, torch.Tensor]:
    tensors = FORMAT.encode(random_weight(quant.scheme, n, k), quant)
    return {f"{module}.{name}": tensor for name, tensor in tensors.items()}


def source(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Source:
    return Source(Path("memory"), {}, config, "config.json", {}, MemorySource(tensors).tensors, {})


def linear(name: str, n: int = 64, k: int = 128) -> LayerSpec:
    return LayerSpec(name, "linear", n, k)


@pytest.mark.parametrize(("bits", "words"), [(3, 26), (5, 43), (6, 52), (7, 64)])
def test_compressed_tensors_715_odd_widths_were_padded(bits: int, words: int) -> None:
    quant = LayerQuant(QuantScheme.parse(f"W{bits}A16_g128"), "pack-quantized")
    padded = LayerQuant(quant.scheme, "pack-quantized", (("padded", True),))
    config = FORMAT.quantization_config({"m": quant})
    for meant, said in ((quant, "0.12.2"), (padded, "0.19.0")):
        weight = random_weight(quant.scheme, 8, 256)
        tensors = FORMAT.encode(weight, meant)
        assert (tensors["weight_packed"].shape[1] == words) == (meant is padded)
        named = {f"m.{name}": tensor for name, tensor in tensors.items()}
        # The shapes decide, whatever version the config names.
        found = FORMAT.parse(source({**config, "version": said}, named)).quant_for(ModuleName(("m",)))
        assert found == meant
        assert FORMAT.decode(tensors, found, 8, 256).equal(weight)


@pytest.mark.parametrize(("version", "padded"), [("0.16.9", True), ("0.17.0", False), ("0.9.1", True), (None, False)])
def test_compressed_tensors_715_version_decides_without_headers(version: str | None, padded: bool) -> None:
    quant = LayerQuant(QuantScheme.parse("W3A16_g128"), "pack-quantized")
    config = {**FORMAT.quantization_config({"m": quant}), "version": version}
    found = FORMAT.parse(source(config, {}))
    assert bool(found.quant_for(ModuleName(("m",))).opt("padded")) is padded
    assert "3-bit" in " ".join(found.inferred)


def test_vllm_31623_targets_mean_the_parts_of_a_fused_layer() -> None:
    names = [f"{ATTENTION}.{p}_proj" for p in "qkv"]
    config = FORMAT.quantization_config(dict.fromkeys(names, W4))
    config["config_groups"]["group_0"]["targets"] = [names[0], "re:.*k_proj$", "re:.*v_proj$"]
    tensors = {key: t for name in names for key, t in stored(name, W4, 64, 128).items()}
    fused = LayerSpec(f"{ATTENTION}.qkv_proj", "linear", 192, 128, (tuple(StoredPart(name, 64) for name in names),))
    decision = Planner(source(config, tensors)).plan([fused]).decisions[0]
    assert [segment.quant for segment in decision.segments] == [W4]


def test_vllm_31623_parts_of_two_schemes_run_as_two_weights() -> None:
    names = [f"{ATTENTION}.{p}_proj" for p in "qkv"]
    config = FORMAT.quantization_config({names[0]: W4, names[1]: W4, names[2]: FP8})
    quants = [W4, W4, FP8]
    tensors = {key: t for name, quant in zip(names, quants, strict=True) for key, t in stored(name, quant, 64, 128).items()}
    fused = LayerSpec(f"{ATTENTION}.qkv_proj", "linear", 192, 128, (tuple(StoredPart(name, 64) for name in names),))
    decision = Planner(source(config, tensors)).plan([fused]).decisions[0]
    assert [segment.quant for segment in decision.segments] == [W4, FP8]


def test_vllm_11790_rules_that_meet_nothing_are_reported() -> None:
    config = FORMAT.quantization_config({"a": W4})
    config["ignore"] = ["language_model.lm_head", "re:visual.*"]
    notes = Planner(source(config, stored("a", W4, 64, 128))).plan([linear("a")]).notes
    assert sum("meant no module" in note for note in notes) == 2
    assert any("language_model.lm_head" in note for note in notes)


def test_vllm_47445_16_bit_weight_with_a_scale_is_refused() -> None:
    config = FORMAT.quantization_config({"a": FP8})
    tensors = stored("a", FP8, 64, 128)
    tensors["a.weight"] = tensors["a.weight"].bfloat16()
    with pytest.raises(CoverError, match=r"a\.weight is BF16 where float-quantized has F8_E4M3"):
        Planner(source(config, tensors)).plan([linear("a")])


def test_vllm_47445_scale_without_its_weight_is_refused() -> None:
    config = FORMAT.quantization_config({"a": FP8})
    tensors = stored("a", FP8, 64, 128)
    del tensors["a.weight_scale"]
    with pytest.raises(CoverError, match=r"a\.weight_scale"):
        Planner(source(config, tensors)).plan([linear("a")])


def test_vllm_25047_cache_scales_are_claimed_or_refused() -> None:
    config = FORMAT.quantization_config({"a": FP8})
    scales = {f"{ATTENTION}.{which}_scale": torch.ones(1).bfloat16() for which in "kv"}
    tensors = {**stored("a", FP8, 64, 128), **scales}
    layers = [linear("a"), LayerSpec(ATTENTION, "kv_cache", 64, 64)]
    with pytest.raises(CoverError, match="k_scale"):
        Planner(source(config, tensors)).plan(layers)
    config["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    cache = Planner(source(config, tensors)).plan(layers).caches[0]
    assert set(cache.scales) == {"k_scale", "v_scale"}


@pytest.mark.parametrize("rows", [(0, 64), (64, 128), (96, 160), (128, 200)])
def test_vllm_54178_shard_smaller_than_a_block(rows: tuple[int, int]) -> None:
    tensors = stored("a", BLOCK, 200, 320)
    whole = decode_part(MemorySource(tensors), FORMAT, BLOCK, linear("a", 200, 320), StoredPart("a", 200)).dequantize()
    part = StoredPart("a", rows[1] - rows[0], rows=rows, stored_n=200)
    layer = LayerSpec("a", "linear", part.n, 320, columns=(80, 208))
    cut = decode_part(MemorySource(tensors), FORMAT, BLOCK, layer, part).dequantize()
    assert torch.equal(cut, whole[rows[0] : rows[1], 80:208])


def test_vllm_48998_square_zero_points_are_packed_along_the_rows() -> None:
    quant = LayerQuant(QuantScheme.parse("W4A16_g32_asym"), "pack-quantized")
    weight = random_weight(quant.scheme, 64, 256)
    tensors = FORMAT.encode(weight, quant)
    assert tensors["weight_zero_point"].shape == (8, 8)
    assert weight.zeros is not None
    # Row 9 is the second field of the second word.
    assert (int(tensors["weight_zero_point"][1, 5]) >> 4) & 15 == int(weight.zeros[9, 5])
    assert FORMAT.decode(tensors, quant, 64, 256).equal(weight)


@pytest.mark.parametrize("k", [3420, 100, 12])
def test_vllm_23320_columns_that_do_not_fill_words(k: int) -> None:
    quant = LayerQuant(QuantScheme.parse("W4A16_channel"), "pack-quantized")
    weight = random_weight(quant.scheme, 7, k)
    tensors = {f"a.{name}": t for name, t in FORMAT.encode(weight, quant).items()}
    layer = LayerSpec("a", "linear", 7, k, columns=(5, k - 3))
    cut = decode_part(MemorySource(tensors), FORMAT, quant, layer, StoredPart("a", 7))
    assert torch.equal(cut.dequantize(), weight.dequantize()[:, 5 : k - 3])


def test_llmcompressor_2163_experts_are_linear_layers_of_their_own_names() -> None:
    experts = "model.layers.0.block_sparse_moe.experts.3"
    parts = tuple(StoredPart(f"{experts}.{name}", 64) for name in ("gate_proj", "up_proj"))
    layer = LayerSpec("model.layers.0.mlp.experts.3.gate_up_proj", "experts", 128, 128, (parts,))
    config = {**FORMAT.quantization_config({"m": W4}), "ignore": ["re:.*gate$"]}
    tensors = {key: t for part in parts for key, t in stored(part.name, W4, 64, 128).items()}
    decision = Planner(source(config, tensors)).plan([layer]).decisions[0]
    assert [segment.quant for segment in decision.segments] == [W4]


def test_four_bits_in_bytes_are_read_though_the_docs_say_packed() -> None:
    """llm-compressor 0.14 writes W4AFP8 and W4A8 as int-quantized, whatever its table of formats says."""
    quant = LayerQuant(QuantScheme.parse("W4Afp8_g128"), "int-quantized")
    weight = random_weight(quant.scheme, 16, 256)
    assert FORMAT.quant_for_scheme(weight) == quant
    tensors = FORMAT.encode(weight, quant)
    assert tensors["weight"].shape == (16, 256)
    assert (int(tensors["weight"].min()), int(tensors["weight"].max())) == (-8, 7)


def test_16_bit_layer_that_the_config_calls_quantized_is_reported() -> None:
    """``ignore: []`` with an lm_head that was never quantized: the file is right, and it is said."""
    config = FORMAT.quantization_config({"a": FP8})
    tensors = {**stored("a", FP8, 64, 128), "lm_head.weight": torch.zeros(32, 128).bfloat16()}
    layers = [linear("a"), LayerSpec("lm_head", "lm_head", 32, 128)]
    decision = Planner(source(config, tensors)).plan(layers).decisions[1]
    assert not decision.quantized
    assert "the file holds 16 bit" in " ".join(decision.notes)


def test_quantized_embedding_is_targeted_by_its_class() -> None:
    config = FORMAT.quantization_config({"model.embed_tokens": W4, "a": W4})
    config["config_groups"]["group_0"]["targets"] = ["Linear", "Embedding"]
    tensors = {**stored("a", W4, 64, 128), **stored("model.embed_tokens", W4, 32, 128)}
    table = LayerSpec("model.embed_tokens", "embedding", 32, 128, module_class="Embedding")
    plan = Planner(source(config, tensors)).plan([linear("a"), table])
    assert all(decision.quantized for decision in plan.decisions)
