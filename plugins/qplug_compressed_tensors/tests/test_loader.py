"""The layouts against an unpacker that reads one bit at a time, golden bytes, and hostile input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qplug_compressed_tensors.loader import CompressedTensorsFormat
from qplug_compressed_tensors.packing import pack_rows, unpack_rows, words_axis
from qplug_compressed_tensors.sparse24 import Sparse24Format

from qplug_core.axes import Axis
from qplug_core.config import LayerQuant
from qplug_core.errors import CannotEncode, DecodeError
from qplug_core.scheme import QuantScheme
from qplug_core.testing import random_weight

FORMAT = CompressedTensorsFormat()
SPARSE = Sparse24Format()
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def quant(name: str, layout: str, **opts: Any) -> LayerQuant:
    return LayerQuant(QuantScheme.parse(name), layout, tuple(opts.items()))


def field(words: np.ndarray, i: int, bits: int, padded: bool) -> np.ndarray:
    """Unsigned value ``i`` of every row of int32 words, bit by bit."""
    each = 32 // bits
    start = i // each * 32 + i % each * bits if padded else i * bits
    return sum(((words[:, (start + b) // 32].astype(np.int64) >> ((start + b) % 32)) & 1) << b for b in range(bits))


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("n", "k"), [(32, 128), (33, 100), (5, 7), (96, 320)])
def test_packed_integers_equal_reading_bit_by_bit(bits: int, n: int, k: int, padded: bool) -> None:
    meant = quant(f"W{bits}A16_channel_asym", "pack-quantized", padded=padded)
    sizes = {"N": n, "K": k}
    columns, rows = (Axis.parse(words_axis(axis, bits, padded)).length(sizes) for axis in "KN")
    whole = (-(2**31), 2**31 - 1)
    stored = {
        "weight_packed": torch.randint(*whole, (n, columns), generator=draw(0), dtype=torch.int32),
        "weight_zero_point": torch.randint(*whole, (rows, 1), generator=draw(1), dtype=torch.int32),
        "weight_scale": torch.rand(n, 1, generator=draw(2)).bfloat16(),
        "weight_shape": torch.tensor([n, k]),
    }
    weight = FORMAT.decode(stored, meant, n, k)
    packed, zeros = stored["weight_packed"].numpy(), stored["weight_zero_point"].numpy().T
    codes = np.stack([field(packed, i, bits, padded) for i in range(k)], axis=1) - 2 ** (bits - 1)
    points = np.concatenate([field(zeros, i, bits, padded) for i in range(n)])[:, None] - 2 ** (bits - 1)
    expected = (codes - points).astype(np.float32) * stored["weight_scale"].float().numpy()
    np.testing.assert_array_equal(weight.dequantize().numpy(), expected)


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 200), st.booleans(), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_pack_is_the_inverse_of_unpack(bits: int, rows: int, length: int, padded: bool, seed: int) -> None:
    values = torch.randint(0, 2**bits, (rows, length), generator=draw(seed), dtype=torch.uint8)
    words = pack_rows(values, bits, padded)
    assert words.shape[1] == Axis.parse(words_axis("K", bits, padded)).length({"K": length})
    assert torch.equal(unpack_rows(words, bits, length, padded), values)


def test_golden_words() -> None:
    codes = torch.tensor([[-8, -7, -6, -5, 4, 5, 6, 7, 0]], dtype=torch.int8)
    weight = random_weight(QuantScheme.parse("W4A16_channel"), 1, 9)
    weight = weight.with_tensors({"codes": codes})
    stored = FORMAT.encode(weight, quant("W4A16_channel", "pack-quantized"))
    # Offset binary, the first column in the lowest bits; what is left of the last word is zero.
    assert [w & 0xFFFFFFFF for w in stored["weight_packed"][0].tolist()] == [0xFEDC3210, 0x8]
    assert stored["weight_shape"].tolist() == [1, 9]


def test_fp4_has_the_even_column_in_the_low_nibble() -> None:
    stored = {
        "weight_packed": torch.tensor([[0x21, 0xF7] * 4], dtype=torch.uint8),
        "weight_scale": torch.tensor([[2.0]]).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([3.0]),
    }
    weight = FORMAT.decode(stored, quant("Wnvfp4A16", "nvfp4-pack-quantized"), 1, 16)
    expected = torch.tensor([E2M1[c] for c in (1, 2, 7, 15)] * 4).float() * torch.tensor(2.0 / 3.0)
    assert torch.equal(weight.dequantize()[0], expected)
    assert weight.global_div


def test_global_scales_are_divisors() -> None:
    """vLLM and the contract: multiplying by a rounded reciprocal is another number, so it is refused."""
    weight = random_weight(QuantScheme.parse("Wnvfp4Anvfp4"), 32, 64)
    with pytest.raises(CannotEncode, match="modelopt"):
        FORMAT.quant_for_scheme(weight)


@pytest.mark.parametrize("name", ["W4A16_g32_asym", "W8A16_tensor_asym", "W3A16_channel"])
@pytest.mark.parametrize("layout", ["int-quantized", "naive-quantized"])
def test_integers_in_bytes_are_signed(name: str, layout: str) -> None:
    scheme = QuantScheme.parse(name)
    weight = random_weight(scheme, 16, 64)
    stored = FORMAT.encode(weight, quant(name, layout))
    values = stored["weight"].float()
    assert stored["weight"].dtype == torch.int8
    if weight.zeros is not None:
        zeros = stored["weight_zero_point"].float().reshape(weight.zeros.shape)
        values = values - zeros.repeat_interleave(weight.block[1] or 64, 1)[:, :64]
    columns = weight.block[1] or 64
    assert torch.equal(values * weight.scales.repeat_interleave(columns, 1)[:, :64], weight.dequantize())


def test_values_outside_of_the_width_are_refused() -> None:
    stored = FORMAT.encode(random_weight(QuantScheme.parse("W4A16_g32"), 16, 64), quant("W4A16_g32", "int-quantized"))
    stored["weight"][3, 5] = 8
    with pytest.raises(DecodeError, match="correct num_bits"):
        FORMAT.decode(stored, quant("W4A16_g32", "int-quantized"), 16, 64)


@pytest.mark.parametrize(("layout", "value"), [("int-quantized", 0), ("pack-quantized", 0)])
def test_zero_points_of_symmetric_weights_must_be_zero(layout: str, value: int) -> None:
    meant = quant("W4A16_g32", layout)
    stored = FORMAT.encode(random_weight(meant.scheme, 16, 64), meant)
    if layout == "pack-quantized":
        # Zero in offset binary.
        stored["weight_zero_point"] = torch.full((2, 2), 0x88888888 - 2**32, dtype=torch.int32)
    else:
        stored["weight_zero_point"] = torch.zeros(16, 2, dtype=torch.int8)
    assert FORMAT.decode(stored, meant, 16, 64).zeros is None
    stored["weight_zero_point"] += 1
    with pytest.raises(DecodeError, match="set symmetric to false"):
        FORMAT.decode(stored, meant, 16, 64)


def test_shape_of_another_model_is_refused() -> None:
    meant = quant("W4A16_g32", "pack-quantized")
    stored = FORMAT.encode(random_weight(meant.scheme, 16, 64), meant)
    stored["weight_shape"] = torch.tensor([16, 32])
    with pytest.raises(DecodeError, match="another model"):
        FORMAT.decode(stored, meant, 16, 64)


def test_order_of_columns() -> None:
    meant = quant("W4A16_g32_actorder", "pack-quantized")
    weight = random_weight(meant.scheme, 16, 128)
    stored = FORMAT.encode(weight, meant)
    assert FORMAT.decode(stored, meant, 16, 128).equal(weight)
    stored["weight_g_idx"] = torch.arange(128, dtype=torch.int32) // 32
    plain = FORMAT.decode(stored, meant, 16, 128)
    assert plain.group_index is None
    assert not plain.scheme.act_order
    stored["weight_g_idx"] = torch.full((128,), -1, dtype=torch.int32)
    assert FORMAT.decode(stored, meant, 16, 128).equal(plain)


@pytest.mark.parametrize("bad", [-1, 4])
def test_index_outside_of_the_scales_is_refused(bad: int) -> None:
    meant = quant("W4A16_g32_actorder", "pack-quantized")
    stored = FORMAT.encode(random_weight(meant.scheme, 16, 128), meant)
    stored["weight_g_idx"][7] = bad
    with pytest.raises(DecodeError, match="groups 0 to 3"):
        FORMAT.decode(stored, meant, 16, 128)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "layout", "tensor"),
    [
        ("Wfp8Afp8_tensor_static", "float-quantized", "input_scale"),
        ("Wnvfp4Anvfp4", "nvfp4-pack-quantized", "input_global_scale"),
        ("Wnvfp4Anvfp4", "nvfp4-pack-quantized", "weight_global_scale"),
    ],
)
def test_scale_that_is_no_positive_number_is_refused(name: str, layout: str, tensor: str, value: float) -> None:
    meant = quant(name, layout)
    weight = random_weight(meant.scheme, 32, 64)
    local = weight.scheme.act is not None and weight.scheme.act.dynamic == "local"
    weight.act_div, weight.global_div = local, weight.global_scale is not None
    stored = FORMAT.encode(weight, meant)
    stored[tensor].fill_(value)
    with pytest.raises(DecodeError, match=tensor):
        FORMAT.decode(stored, meant, 32, 64)


def test_static_asymmetric_activations() -> None:
    meant = quant("W8A8_a:tensor.static.asym", "int-quantized")
    weight = random_weight(meant.scheme, 16, 32)
    stored = FORMAT.encode(weight, meant)
    assert stored["input_zero_point"].tolist() == [-7]
    assert stored["input_scale"].shape == (1,)
    stored["input_scale"] = stored["input_scale"].bfloat16()
    stored["weight_scale"] = stored["weight_scale"].bfloat16()
    decoded = FORMAT.decode(stored, meant, 16, 32)
    assert decoded.act_scale is not None
    assert decoded.act_scale.dtype == torch.float32
    again = FORMAT.encode(decoded, meant)
    assert all(again[name].dtype == stored[name].dtype and torch.equal(again[name], stored[name]) for name in stored)


def test_dense_weights_become_codes_by_their_scales() -> None:
    """A frozen model holds 16-bit weights beside their scales, and its own forward rounds them."""
    weight = torch.tensor([[0.11, -0.29, 0.9, -3.0]]).bfloat16()
    stored = {"weight": weight, "weight_scale": torch.tensor([[0.25]]).bfloat16()}
    decoded = FORMAT.decode(stored, quant("W4A16_channel", "dense"), 1, 4)
    assert decoded.codes.tolist() == [[0, -1, 4, -8]]
    assert torch.equal(decoded.dequantize(), torch.tensor([[0, -0.25, 1.0, -2.0]]))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Wfp8A16_2:4", "store the pruned weights dense, for example in FP8"),
        ("W16A16_2:4", "store the pruned weights dense, for example in FP8"),
        ("WNF4A16", "choose another format"),
        ("Wfp8e5m2A16", "choose another format"),
        ("W8A8", "a:rule=127.5"),
    ],
)
def test_scheme_without_a_writer(name: str, words: str) -> None:
    with pytest.raises(CannotEncode, match=words):
        FORMAT.quant_for_scheme(random_weight(QuantScheme.parse(name), 128, 128))


def test_ragged_groups_are_not_written() -> None:
    with pytest.raises(CannotEncode, match="whole groups"):
        FORMAT.encode(random_weight(QuantScheme.parse("W4A16_g128"), 8, 100), quant("W4A16_g128", "pack-quantized"))


def sparse_file(values: torch.Tensor, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A 2:4 sparse file of dense ``values [N, K]``, of which a random half is dropped, and what is kept."""
    n, k = values.shape
    order = torch.rand(n, k // 4, 4, generator=draw(seed)).argsort(-1)
    kept = (order < 2).view(n, k)
    bits = torch.nn.functional.pad(kept, (0, -k % 8)).view(n, -1, 8)
    mask = sum((bits[:, :, i].to(torch.uint8) << i for i in range(8)), torch.zeros(1, dtype=torch.uint8))
    rows = [torch.stack([values[i, j] for j in range(k) if kept[i, j]]) for i in range(n)]
    return {"compressed": torch.stack(rows), "bitmask": mask, "shape": torch.tensor([[n], [k]])}, kept


@pytest.mark.parametrize("k", [16, 20])
def test_sparse_weights_of_16_bit(k: int) -> None:
    values = torch.randn(6, k, generator=draw(1)).bfloat16()
    stored, kept = sparse_file(values)
    weight = SPARSE.decode(stored, LayerQuant(QuantScheme.parse("W16A16_2:4"), "sparse-24-bitmask"), 6, k)
    assert torch.equal(weight.dequantize(torch.bfloat16), values * kept)
    assert weight.scheme.sparsity == "2:4"


@pytest.mark.parametrize("name", ["W8A8_a:rule=127.5_2:4", "Wfp8Afp8_2:4"])
def test_sparse_codes(name: str) -> None:
    dense = random_weight(QuantScheme.parse(name.removesuffix("_2:4")), 6, 32, scale_dtype=torch.bfloat16)
    codes = dense.codes.clone()
    codes.view(torch.int8)[0, :4] = -128 if codes.dtype == torch.int8 else 120
    stored, kept = sparse_file(codes)
    stored["weight_scale"] = dense.scales
    weight = SPARSE.decode(stored, LayerQuant(QuantScheme.parse(name), "sparse-24-bitmask"), 6, 32)
    assert torch.equal(weight.dequantize(), codes.float() * kept * dense.scales.float())


def test_damaged_mask_is_refused() -> None:
    stored, _ = sparse_file(torch.randn(6, 16).bfloat16())
    stored["bitmask"][2, 1] ^= 1
    with pytest.raises(DecodeError, match="two of every four"):
        SPARSE.decode(stored, LayerQuant(QuantScheme.parse("W16A16_2:4"), "sparse-24-bitmask"), 6, 16)
