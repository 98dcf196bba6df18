"""The four layouts against unpackers that read one field at a time, golden words of AutoAWQ's packers, and cuts."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from qplug_awq.layouts import words_multiple
from qplug_awq.loader import AWQFormat
from qplug_awq.packing import pack_gemm, unpack_gemm

from qplug_core.config import LayerQuant
from qplug_core.errors import CannotEncode, DecodeError
from qplug_core.layer import LayerSpec, StoredPart
from qplug_core.method import decode_part
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource
from qplug_core.testing import random_weight
from qplug_core.weight import OpaqueWeight, QuantWeight, concat

FORMAT = AWQFormat()
GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PAIRS_ORDER = (
    0,
    1,
    8,
    9,
    16,
    17,
    24,
    25,
    2,
    3,
    10,
    11,
    18,
    19,
    26,
    27,
    4,
    5,
    12,
    13,
    20,
    21,
    28,
    29,
    6,
    7,
    14,
    15,
    22,
    23,
    30,
    31,
)


def quant(name: str, layout: str = "awq_gemm", **opts: Any) -> LayerQuant:
    return LayerQuant(QuantScheme.parse(name), layout, tuple(opts.items()))


def weight_of(name: str, n: int, k: int, **options: Any) -> QuantWeight:
    return random_weight(QuantScheme.parse(name), n, k, torch.Generator().manual_seed(n + k), **options)


def known_weight(n: int, k: int, group: int, symmetric: bool) -> QuantWeight:
    """Numbers that every layout tells apart from those of its neighbours."""
    i, j, g = torch.arange(n)[:, None], torch.arange(k)[None], torch.arange(k // group)[None]
    codes = (i * i * 3 + 5 * j + i * j // 7) % 16
    scales = (2.0 ** (-(i + 3 * g) % 5)).half()
    scheme = QuantScheme.parse(f"W4A16_g{group}" + ("" if symmetric else "_asym"))
    if symmetric:
        return QuantWeight(scheme, (codes - 8).to(torch.int8), scales, (1, group))
    return QuantWeight(scheme, codes.to(torch.uint8), scales, (1, group), zeros=((i * 3 + g * 7) % 16).to(torch.int16))


GOLDEN = [
    ("awq_gemm", {"qweight": 0xCCF50FA6, "qzeros": 0x0989F779, "scales": 0xED88B3D4}),
    ("awq_gemv", {"qweight": 0x1066D128, "qzeros": 0x9BD28E33, "scales": 0x80432839}),
    ("awq_gemv_fast", {"qweight": 0x87E04628, "qzeros": 0xDEA13F82, "scales": 0x02876BC9}),
    ("awq_marlin", {"qweight": 0x25C7E330, "scales": 0xBBA89242}),
]


@pytest.mark.parametrize(("layout", "expected"), GOLDEN, ids=[layout for layout, _ in GOLDEN])
def test_written_bytes_are_those_of_autoawq(layout: str, expected: dict[str, int]) -> None:
    """CRC-32 of what the packers of AutoAWQ 0.2.9 make of the same numbers."""
    weight = known_weight(128, 320, 64, symmetric=layout == "awq_marlin")
    stored = FORMAT.encode(weight, LayerQuant(weight.scheme, layout))
    found = {name: zlib.crc32(tensor.contiguous().numpy().tobytes()) for name, tensor in stored.items()}
    assert found == expected
    assert FORMAT.decode(stored, LayerQuant(weight.scheme, layout), 128, 320).equal(weight)


def test_d6_order_of_a_word() -> None:
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert unpack_gemm(word, 4).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert pack_gemm(unpack_gemm(word, 4), 4).tolist() == word.tolist()
    stored = FORMAT.encode(weight_of("W4A16_g128", 8, 128), quant("W4A16_g128"))
    assert stored["qzeros"].tolist() == [[0x88888888 - 2**32]]


def test_eight_bits_keep_the_order_of_eight_over_two_words() -> None:
    """RTP-LLM regroups eight bytes as 2 x 4, transposed, whatever the width."""
    words = torch.arange(8, dtype=torch.uint8)[None].view(torch.int32)
    assert unpack_gemm(words, 8).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    stored = FORMAT.encode(weight_of("W8A16_g128", 8, 128), quant("W8A16_g128"))
    assert stored["qzeros"].view(torch.uint8).tolist() == [[128] * 8]


def field(words: np.ndarray, position: int, bits: int) -> int:
    """Field ``position`` of a row of little-endian words."""
    data = words.tobytes()
    byte, shift = divmod(position * bits, 8)
    return (data[byte] >> shift) & (2**bits - 1)


def by_fields(tensors: dict[str, torch.Tensor], layout: str, bits: int, n: int, k: int, group: int) -> np.ndarray:
    """The float32 weight ``[N, K]``, one field at a time."""
    stored = {name: tensor.numpy() for name, tensor in tensors.items()}
    qweight, qzeros, scales = stored["qweight"], stored["qzeros"], stored["scales"].astype(np.float32)
    out = np.empty((n, k), np.float32)
    for row in range(n):
        for column in range(k):
            g = column // group
            if layout == "awq_gemm":
                place = row // 8 * 8 + GEMM_ORDER.index(row % 8)
                code, zero = field(qweight[column], place, bits), field(qzeros[g], place, bits)
                out[row, column] = np.float32(code - zero) * scales[g, row]
            elif layout == "awq_gemv":
                code, zero = field(qweight[row], column, 4), field(qzeros[row], g, 4)
                out[row, column] = np.float32(code - zero) * scales[row, g]
            else:
                paired = PAIRS_ORDER.index(column % 32)
                in_row = column % 64 // 32 * 32 + paired // 8 * 8 + GEMM_ORDER.index(paired % 8)
                place = column // 64 * 256 + row % 4 * 64 + in_row
                code = field(qweight[row // 4], place, 4)
                zero = np.rint(-np.float32(qzeros[g, row]) / scales[g, row])
                out[row, column] = (np.float32(code) - zero) * scales[g, row]
    return out


@pytest.mark.parametrize(
    ("layout", "bits", "n", "k", "group"),
    [
        ("awq_gemm", 4, 24, 96, 32),
        ("awq_gemm", 8, 16, 96, 64),
        ("awq_gemm", 4, 16, 100, 48),
        ("awq_gemv", 4, 5, 192, 64),
        ("awq_gemv", 4, 6, 1184, 32),
        ("awq_gemv", 4, 3, 104, 48),
        ("awq_gemv_fast", 4, 12, 192, 64),
        ("awq_gemv_fast", 4, 8, 320, 32),
    ],
)
def test_decode_equals_reading_field_by_field(layout: str, bits: int, n: int, k: int, group: int) -> None:
    meant = quant(f"W{bits}A16_g{group}_asym", layout)
    weight = weight_of(f"W{bits}A16_g{group}_asym", n, k, scale_dtype=torch.float16)
    stored = FORMAT.encode(weight, meant)
    decoded = FORMAT.decode(stored, meant, n, k)
    assert decoded.equal(weight)
    np.testing.assert_array_equal(decoded.dequantize().numpy(), by_fields(stored, layout, bits, n, k, group))


def in_plain_order(codes: torch.Tensor) -> torch.Tensor:
    """What a reader gets that does not know that eight codes are interleaved."""
    return codes.view(-1, 8, codes.shape[1])[:, list(GEMM_ORDER)].reshape(codes.shape)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (
            "nibbles swapped",
            lambda t: {**t, "qweight": ((t["qweight"] & 0x0F0F0F0F) << 4) | ((t["qweight"] >> 4) & 0x0F0F0F0F)},
        ),
        ("zeros of GPTQ v1", lambda t: {**t, "qzeros": t["qzeros"] - 0x11111111}),
        ("order of GPTQ", lambda t: {**t, "qweight": pack_gemm(in_plain_order(unpack_gemm(t["qweight"], 4)), 4)}),
    ],
)
def test_wrong_reading_is_far_from_right(name: str, change: Any) -> None:
    """The bounds separate: an error of the decoder is larger than 2**-7 for each of these."""
    weight = weight_of("W4A16_g128_asym", 64, 256, zeros=(1, 15))
    stored = FORMAT.encode(weight, quant("W4A16_g128_asym"))
    wrong = FORMAT.decode(change(stored), quant("W4A16_g128_asym"), 64, 256).dequantize()
    right = weight.dequantize()
    assert float((wrong - right).norm() / right.norm()) > 0.05, name


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("multiple", [None, 1, 2, 4, 8])
def test_gemv_padding_of_every_producer(group: int, multiple: int | None) -> None:
    """Rows of zero points are padded to 1, 2, 4 or 8 words, or scales not at all, with the same numbers."""
    n, k = 8, 1280
    meant = quant(f"W4A16_g{group}_asym", "awq_gemv")
    weight = weight_of(f"W4A16_g{group}_asym", n, k)
    stored = FORMAT.encode(weight, meant)
    groups = -(-k // group)
    words = -(-groups // 8)
    width = words if multiple is None else -(-words // multiple) * multiple
    resized = {
        "qweight": stored["qweight"],
        "qzeros": torch.nn.functional.pad(stored["qzeros"], (0, width - stored["qzeros"].shape[1])),
        "scales": torch.nn.functional.pad(
            stored["scales"], (0, (groups if multiple is None else 8 * width) - stored["scales"].shape[1])
        ),
    }
    for tensor in FORMAT.tensors(meant):
        assert tensor.match(tuple(resized[tensor.name].shape), {"N": n, "K": k}) is not None
    assert FORMAT.decode(resized, meant, n, k).equal(weight)
    assert stored["qzeros"].shape[1] % words_multiple(group) == 0


@pytest.mark.parametrize("layout", ["awq_gemm", "awq_gemv", "awq_gemv_fast", "awq_marlin"])
@pytest.mark.parametrize("world", [2, 3])
def test_vllm_17604_row_parallel_cut_through_a_group(layout: str, world: int) -> None:
    """vLLM issues 13640 and 17604: K of a rank that is no multiple of 128 is cut exactly, not refused and not padded."""
    n, k, name = 64, 1088, "W4A16_g64" if layout == "awq_marlin" else "W4A16_g64_asym"
    weight = weight_of(name, n, k)
    source = MemorySource({f"m.{t}": v for t, v in FORMAT.encode(weight, quant(name, layout)).items()})
    for rank in range(world):
        for axis in ("N", "K"):
            layer = LayerSpec("m", "linear", n, k).sharded(axis, rank, world)
            part = layer.stored[0][0] if layer.stored else StoredPart("m", n)
            cut = decode_part(source, FORMAT, quant(name, layout), layer, part)
            rows, columns = part.rows or (0, n), layer.columns or (0, k)
            assert torch.equal(cut.dequantize(), weight.dequantize()[slice(*rows), slice(*columns)])


def test_fused_qkv_on_disk_is_cut_at_its_parts() -> None:
    weight = weight_of("W4A16_g128_asym", 512, 256)
    source = MemorySource({f"qkv_proj.{t}": v for t, v in FORMAT.encode(weight, quant("W4A16_g128_asym")).items()})
    parts = []
    for start, stop in ((0, 256), (256, 384), (384, 512)):
        layer = LayerSpec("proj", "linear", stop - start, 256)
        part = StoredPart("qkv_proj", stop - start, rows=(start, stop), stored_n=512)
        cut = decode_part(source, FORMAT, quant("W4A16_g128_asym"), layer, part)
        assert isinstance(cut, QuantWeight)
        parts.append(cut)
    assert concat(parts).equal(weight)


def test_zero_points_are_stored_as_they_are() -> None:
    """0 and 15 are both held, and neither is moved by one as GPTQ's are."""
    for zero in (0, 15):
        weight = weight_of("W4A16_g128_asym", 8, 128, zeros=(zero, zero))
        stored = FORMAT.encode(weight, quant("W4A16_g128_asym"))
        assert stored["qzeros"].view(torch.uint8).tolist() == [[zero * 17] * 4]


def test_symmetric_layer_with_other_zero_points_is_refused() -> None:
    stored = FORMAT.encode(weight_of("W4A16_g128_asym", 16, 256), quant("W4A16_g128_asym"))
    with pytest.raises(DecodeError, match="set zero_point to true"):
        FORMAT.decode(stored, quant("W4A16_g128"), 16, 256)
    stored["qzeros"].fill_(0x77777777)
    with pytest.raises(DecodeError, match="quant_method to 'gptq'"):
        FORMAT.decode(stored, quant("W4A16_g128"), 16, 256)


def test_symmetric_codes_are_signed_and_have_no_zeros() -> None:
    for layout in ("awq_gemm", "awq_gemv", "awq_gemv_fast", "awq_marlin"):
        weight = weight_of("W4A16_g128", 64, 256)
        decoded = FORMAT.decode(FORMAT.encode(weight, quant("W4A16_g128", layout)), quant("W4A16_g128", layout), 64, 256)
        assert decoded.zeros is None
        assert decoded.codes.dtype == torch.int8
        assert decoded.equal(weight)


def test_gemv_fast_zero_points_that_are_no_products_are_refused() -> None:
    stored = FORMAT.encode(weight_of("W4A16_g128_asym", 8, 256), quant("W4A16_g128_asym", "awq_gemv_fast"))
    stored["qzeros"][1, 3] *= 1.05
    with pytest.raises(DecodeError, match="row 3, group 1"):
        FORMAT.decode(stored, quant("W4A16_g128_asym", "awq_gemv_fast"), 8, 256)


def test_gemv_fast_by_the_name_of_llm_awq() -> None:
    meant = quant("W4A16_g128_asym", "awq_gemv_fast", zeros="scaled_zeros")
    weight = weight_of("W4A16_g128_asym", 8, 256)
    stored = FORMAT.encode(weight, meant)
    assert set(stored) == {"qweight", "scaled_zeros", "scales"} == {t.name for t in FORMAT.tensors(meant)}
    assert FORMAT.decode(stored, meant, 8, 256).equal(weight)


def test_gemv_fast_products_that_overflow_are_not_written() -> None:
    weight = weight_of("W4A16_g128_asym", 8, 128, scale_dtype=torch.float16, zeros=(15, 15))
    weight = replace(weight, scales=torch.full_like(weight.scales, 60000.0))
    with pytest.raises(CannotEncode, match="store awq_gemm"):
        FORMAT.encode(weight, quant("W4A16_g128_asym", "awq_gemv_fast"))


def test_one_group_for_each_row() -> None:
    for layout, k in (("awq_gemm", 100), ("awq_gemv", 200), ("awq_gemv", 64), ("awq_gemv", 32), ("awq_gemv_fast", 192)):
        meant = quant("W4A16_channel_asym", layout)
        weight = weight_of("W4A16_channel_asym", 16, k)
        stored = FORMAT.encode(weight, meant)
        assert all(t.match(tuple(stored[t.name].shape), {"N": 16, "K": k}) is not None for t in FORMAT.tensors(meant))
        assert FORMAT.decode(stored, meant, 16, k).equal(weight)


def test_pre_quant_scale_and_static_activations() -> None:
    """W4A8_AWQ of TensorRT-LLM: FP8 activations with a stored scale, after a multiplication by column."""
    name = "W4Afp8_g128_asym_static"
    weight = replace(weight_of(name, 16, 256), pre_scale=torch.rand(256).bfloat16())
    meant = FORMAT.quant_for_scheme(weight)
    stored = FORMAT.encode(weight, meant)
    assert set(stored) == {"qweight", "qzeros", "scales", "input_scale", "pre_quant_scale"}
    assert FORMAT.decode(stored, meant, 16, 256).equal(weight)
    stored["input_scale"].fill_(0)
    with pytest.raises(DecodeError, match=r"input_scale is 0\.0"):
        FORMAT.decode(stored, meant, 16, 256)
    with pytest.raises(CannotEncode, match="option pre_quant_scale"):
        FORMAT.encode(weight, LayerQuant(weight.scheme, "awq_gemm"))


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (weight_of("W8A8", 32, 128), "scheme W8A8"),
        (weight_of("W3A16_g128", 32, 128), "scheme W3A16"),
        (weight_of("W8A16_tensor", 32, 128), "scales by tensor"),
        (weight_of("W4A16_g32_actorder", 32, 128), "actorder"),
        (weight_of("W4A8_g128_a:g128", 32, 128), "activations by token"),
        (replace(weight_of("W4A16_g128", 32, 128), shift=torch.zeros(32, 1)), "shift"),
        (OpaqueWeight(QuantScheme.parse("W4A16_g128"), "x", {}, 8, 8, lambda t, n, k: torch.zeros(n, k)), "opaque"),
    ],
)
def test_foreign_weight_has_no_layout(weight: Any, words: str) -> None:
    with pytest.raises(CannotEncode, match=words):
        FORMAT.quant_for_scheme(weight)


@pytest.mark.parametrize(
    ("name", "layout", "n", "k", "words"),
    [
        ("W4A16_g128", "awq_gemm", 12, 128, "8 rows"),
        ("W8A16_g128", "awq_gemm", 12, 128, "8 rows"),
        ("W4A16_g128", "awq_gemv", 8, 100, "8 columns"),
        ("W4A16_g128", "awq_gemv_fast", 6, 128, "4 rows"),
        ("W4A16_g32", "awq_gemv_fast", 8, 96, "64 columns"),
        ("W4A16_g128", "awq_marlin", 32, 128, "64 rows"),
        ("W4A16_g128_asym", "awq_marlin", 64, 128, "symmetric"),
        ("W8A16_g128", "awq_gemv", 8, 128, "stores 4"),
        ("W8A16_g128", "awq_marlin", 64, 128, "stores 4"),
    ],
)
def test_shape_that_a_layout_cannot_pack(name: str, layout: str, n: int, k: int, words: str) -> None:
    with pytest.raises(CannotEncode, match=words):
        FORMAT.encode(weight_of(name, n, k), quant(name, layout))


def test_zero_point_sixteen_is_gptqs() -> None:
    weight = weight_of("W4A16_g128_asym", 8, 128, zeros=(16, 16))
    with pytest.raises(CannotEncode, match="choose gptq"):
        FORMAT.quant_for_scheme(weight)
