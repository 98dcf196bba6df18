"""WINT2 and WINT2.5: golden vectors, an independent decoder, and the mistakes that must not pass."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from qplug_int8.paddle import ccq
from qplug_int8.paddle.wint2 import CCQFormat
from torch import Tensor

from qplug_core.config import LayerQuant
from qplug_core.errors import CannotEncode, DecodeError
from qplug_core.layer import LayerSpec, StoredPart
from qplug_core.method import decode_part
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource
from qplug_core.testing import random_weight
from qplug_core.weight import OpaqueWeight, QuantWeight

FORMAT = CCQFormat()
CCQ2 = LayerQuant(QuantScheme.parse("Wccq2A16"), "ccq2")
CCQ25 = LayerQuant(QuantScheme.parse("W3A16_g64"), "ccq2.5")


def f32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def slow(
    stored: dict[str, Tensor], n: int, k: int, *, high_first: bool = True, zero: int = 32, rounded: bool = True
) -> Tensor:
    """One weight at a time, in Python's numbers, each operation rounded to float32."""
    weight = torch.empty(n, k)
    for row in range(n):
        scale, offset = float(stored["code_scale"][row]), float(stored["code_zp"][row])
        outer = float(stored["super_scales"][row].float())
        for column in range(k):
            byte = int(stored["quant_weight"][column // 4, row])
            code = math.floor(f32(f32(f32(byte * scale) + offset) + (0.5 if rounded else 0.0)))
            group = column // 64
            nibbles = int(stored["weight_scale"][group // 2, row])
            local = nibbles >> 4 if (group % 2 == 0) == high_first else nibbles & 15
            value = (code >> (9 - 3 * (column % 4)) & 63) - zero
            weight[row, column] = f32(f32(local * outer) * value)
    return weight


def random_file(n: int, k: int, seed: int = 0, super_dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "quant_weight": torch.randint(0, 256, (k // 4, n), generator=generator, dtype=torch.uint8),
        "weight_scale": torch.randint(0, 256, (k // 128, n), generator=generator, dtype=torch.uint8),
        "super_scales": (torch.rand(n, generator=generator) * 0.01).to(super_dtype),
        "code_scale": torch.rand(n, generator=generator) * 8 + 120,
        "code_zp": torch.rand(n, generator=generator) * 5,
    }


def decode(stored: dict[str, Tensor], n: int, k: int) -> OpaqueWeight:
    weight = FORMAT.decode(stored, CCQ2, n, k)
    assert isinstance(weight, OpaqueWeight)
    return weight


def test_golden_vector() -> None:
    """u = 200 under slope 128.5 and offset 3 is code 25703: values 18, -15, -20, 7; local byte 0xA3 gives 10, then 3."""
    stored = {
        "quant_weight": torch.full((32, 1), 200, dtype=torch.uint8),
        "weight_scale": torch.tensor([[0xA3]], dtype=torch.uint8),
        "super_scales": torch.tensor([0.001]),
        "code_scale": torch.tensor([128.5]),
        "code_zp": torch.tensor([3.0]),
    }
    found = decode(stored, 1, 128).dequantize()
    assert found[0, :4].tolist() == pytest.approx([0.18, -0.15, -0.20, 0.07], rel=1e-6)
    assert found[0, 64:68].tolist() == pytest.approx([0.054, -0.045, -0.060, 0.021], rel=1e-6)


@pytest.mark.parametrize("super_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(1, 128), (5, 256), (3, 384)])
def test_every_weight_is_that_of_the_slow_decoder(n: int, k: int, super_dtype: torch.dtype) -> None:
    stored = random_file(n, k, super_dtype=super_dtype)
    assert torch.equal(decode(stored, n, k).dequantize(), slow(stored, n, k))


@pytest.mark.parametrize("mistake", [{"high_first": False}, {"zero": 31}, {"rounded": False}], ids=str)
def test_mistake_is_another_weight(mistake: dict[str, bool]) -> None:
    stored = random_file(5, 256)
    right, wrong = decode(stored, 5, 256).dequantize(), slow(stored, 5, 256, **mistake)  # type: ignore[arg-type]
    assert float((right - wrong).norm() / right.norm()) > 0.02


def test_value_order_within_a_byte() -> None:
    stored = random_file(5, 128)
    right = decode(stored, 5, 128).dequantize()
    assert not torch.equal(right, right.view(5, -1, 4).flip(-1).reshape(5, 128))


def test_rounding_is_to_the_model_dtype_once_and_last() -> None:
    stored = random_file(4, 128)
    weight = decode(stored, 4, 128)
    assert torch.equal(weight.dequantize(torch.bfloat16), slow(stored, 4, 128).bfloat16())


def test_signed_bytes_are_the_same_bytes() -> None:
    """FastDeploy's page on the format says int8, its kernels read uint8."""
    stored = random_file(4, 128)
    signed = {name: t.view(torch.int8) if t.dtype == torch.uint8 else t for name, t in stored.items()}
    assert torch.equal(decode(signed, 4, 128).dequantize(), slow(stored, 4, 128))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = random_file(7, 1024)
    whole = decode(stored, 7, 1024).dequantize()
    for size in (1, 7 * 32, 7 * 96):
        monkeypatch.setattr(ccq, "CHUNK", size)
        assert torch.equal(decode(stored, 7, 1024).dequantize(), whole)


def test_memory_beyond_the_result_is_bounded() -> None:
    """The largest temporary has a chunk's elements, whatever the weight has."""
    n, k = 1024, 8192
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.untyped_storage().nbytes() != 4 * n * k:
                sizes.append(result.untyped_storage().nbytes())
            return result

    stored = random_file(n, k)
    inputs = {t.untyped_storage().nbytes() for t in stored.values()}
    with Watch():
        ccq.decode(stored, n, k)
    assert max(size for size in sizes if size not in inputs) <= 4 * ccq.CHUNK


def test_rows_are_cut_anywhere_and_columns_at_128() -> None:
    stored = random_file(37, 512)
    whole = slow(stored, 37, 512)
    source = MemorySource({f"m.{name}": t for name, t in stored.items()})
    for n0, n1, k0, k1 in [(0, 13, 0, 512), (13, 37, 0, 512), (5, 6, 128, 384), (0, 37, 384, 512)]:
        layer = LayerSpec("m", "experts", n1 - n0, 512, columns=(k0, k1))
        cut = decode_part(source, FORMAT, CCQ2, layer, StoredPart("m", n1 - n0, rows=(n0, n1), stored_n=37))
        assert torch.equal(cut.dequantize(), whole[n0:n1, k0:k1])


def test_cut_through_a_scale_byte_is_exact_and_another_encoding() -> None:
    """A kernel that reads the bytes of ``ccq2`` must not take the bytes of a window for it."""
    stored = random_file(8, 512)
    source = MemorySource({f"m.{name}": t for name, t in stored.items()})
    layer = LayerSpec("m", "experts", 8, 512, columns=(64, 300))
    found = decode_part(source, FORMAT, CCQ2, layer, StoredPart("m", 8))
    assert torch.equal(found.dequantize(), slow(stored, 8, 512)[:, 64:300])
    assert isinstance(found, OpaqueWeight)
    assert (found.encoding, found.n, found.k) == ("ccq2:window", 8, 236)
    with pytest.raises(CannotEncode, match="ccq2:window"):
        FORMAT.encode(found, CCQ2)


@pytest.mark.parametrize("k", [64, 192, 100, 4, 320])
def test_odd_number_of_groups_is_refused_because_kernels_count_from_other_rows(k: int) -> None:
    """One kernel takes the parity of a group from the first expert's rows: with 192 columns every other expert is read wrong."""
    tensor = FORMAT.tensors(CCQ2)[0]
    assert tensor.match((k // 4, 8), {"N": 8, "K": k}) is None
    assert tensor.match((32, 8), {"N": 8, "K": 128}) is not None


@pytest.mark.parametrize(("slope", "offset"), [(129.0, 10.5), (128.5, -1.0), (float("nan"), 0.0), (128.0, float("inf"))])
def test_code_beyond_15_bits_is_refused_because_kernels_disagree(slope: float, offset: float) -> None:
    """255 * 129 + 10.5 is 32905: one kernel keeps codes in int16, the other in int32."""
    stored = random_file(2, 128)
    stored["quant_weight"][0, 1], stored["quant_weight"][1, 1] = 255, 0
    stored["code_scale"], stored["code_zp"] = torch.tensor([128.0, slope]), torch.tensor([0.0, offset])
    with pytest.raises(DecodeError, match="column 1"):
        decode(stored, 2, 128)


def test_slope_beyond_15_bits_is_taken_where_no_byte_reaches_it() -> None:
    stored = random_file(1, 128)
    stored["quant_weight"].clamp_(max=200)
    stored["code_scale"] = torch.tensor([150.0])
    assert torch.equal(decode(stored, 1, 128).dequantize(), slow(stored, 1, 128))


def test_super_scale_that_is_not_finite_is_refused() -> None:
    stored = random_file(2, 128)
    stored["super_scales"][1] = float("nan")
    with pytest.raises(DecodeError, match="super_scales"):
        decode(stored, 2, 128)


def test_super_scales_under_their_other_name() -> None:
    stored = random_file(3, 128)
    quant = LayerQuant(CCQ2.scheme, "ccq2", (("super_scales", "super_scale"),))
    renamed = {"super_scale" if name == "super_scales" else name: t for name, t in stored.items()}
    assert {t.name for t in FORMAT.tensors(quant)} == renamed.keys()
    weight = FORMAT.decode(renamed, quant, 3, 128)
    assert torch.equal(weight.dequantize(), slow(stored, 3, 128))
    assert FORMAT.encode(weight, quant).keys() == renamed.keys()


def test_stored_tensors_come_back() -> None:
    stored = random_file(6, 256)
    weight = decode(stored, 6, 256)
    assert FORMAT.quant_for_scheme(weight) == CCQ2
    again = FORMAT.encode(weight, CCQ2)
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)


@pytest.mark.parametrize(("low", "high"), [(120.0, 8.0), (0.3, 0.5), (1.0, 2.0)])
def test_bytes_come_back_from_the_values(low: float, high: float) -> None:
    """Flat maps give several bytes one code; then the lowest of them comes back, and decodes to the same."""
    stored = random_file(6, 256)
    stored["code_scale"] = torch.rand(6, generator=torch.Generator().manual_seed(3)) * high + low
    code = ccq.codes(stored["quant_weight"], stored["code_scale"], stored["code_zp"])
    values = torch.stack([ccq.values(code, j) for j in range(4)], 1).flatten(0, 1).t()
    found = ccq.encode(values, stored["code_scale"], stored["code_zp"])
    assert torch.equal(ccq.codes(found, stored["code_scale"], stored["code_zp"]), code)
    if low >= 1.0:
        assert torch.equal(found, stored["quant_weight"])
    else:
        assert bool((found <= stored["quant_weight"]).all())


def test_values_that_are_no_neighbours_are_refused() -> None:
    values = torch.zeros(1, 4, dtype=torch.int32)
    values[0, 1] = 5  # 37 = 0b100101 begins with 100, and 32 = 0b100000 ends with 000.
    with pytest.raises(CannotEncode, match="wint4"):
        ccq.encode(values, torch.tensor([128.0]), torch.tensor([0.0]))


def test_code_without_a_byte_is_refused() -> None:
    with pytest.raises(CannotEncode, match="no byte"):
        ccq.encode(torch.tensor([[-32, -32, -32, -31]]), torch.tensor([128.0]), torch.tensor([0.0]))


@pytest.mark.parametrize("name", ["W4A16_g128", "W8A16", "Wfp8A16"])
def test_other_weights_are_refused_with_what_to_write_instead(name: str) -> None:
    weight = random_weight(QuantScheme.parse(name), 128, 128)
    for quant in (CCQ2, CCQ25):
        with pytest.raises(CannotEncode, match="write wint4 instead"):
            FORMAT.encode(weight, quant)


def words(n: int, k: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(-(2**15), 2**15, (10 * k // 64, n), generator=generator, dtype=torch.int16)
    return {"quant_weight": stored, "weight_scale": torch.rand(n, generator=generator).half()}


def slow_words(stored: dict[str, Tensor], n: int, k: int, *, zero: int = 4) -> Tensor:
    weight = torch.empty(n, k)
    for row in range(n):
        for group in range(k // 64):
            column = [int(w) & 0xFFFF for w in stored["quant_weight"][10 * group : 10 * group + 10, row]]
            scale = f32((column[9] & 0x1FFF) * float(stored["weight_scale"][row].float()))
            for j in range(63):
                shift = (13, 11, 9, 6, 4, 2, 0)[j % 7]
                weight[row, 64 * group + j] = f32(((column[j // 7] >> shift & 7) - zero) * scale)
            weight[row, 64 * group + 63] = f32(((column[9] >> 13) - zero) * scale)
    return weight


def test_golden_word_of_wint25() -> None:
    """0xB6C5 holds 1, 2, -1, -1, 0, -3, 1."""
    stored = {"quant_weight": torch.zeros(10, 1, dtype=torch.int16), "weight_scale": torch.ones(1)}
    stored["quant_weight"][0, 0] = 0xB6C5 - 2**16
    stored["quant_weight"][9, 0] = 1 | 6 << 13 if (1 | 6 << 13) < 2**15 else (1 | 6 << 13) - 2**16
    found = FORMAT.decode(stored, CCQ25, 1, 64).dequantize()
    assert found[0, :7].tolist() == [1, 2, -1, -1, 0, -3, 1]
    assert float(found[0, 63]) == 2


@pytest.mark.parametrize(("n", "k"), [(1, 64), (5, 192), (3, 128)])
def test_every_weight_of_wint25_is_that_of_the_slow_decoder(n: int, k: int) -> None:
    stored = words(n, k)
    weight = FORMAT.decode(stored, CCQ25, n, k)
    assert isinstance(weight, QuantWeight)
    assert torch.equal(weight.dequantize(), slow_words(stored, n, k))
    assert not torch.equal(weight.dequantize(), slow_words(stored, n, k, zero=3))


def test_wint25_is_cut_anywhere() -> None:
    stored = words(9, 256)
    source = MemorySource({f"m.{name}": t for name, t in stored.items()})
    layer = LayerSpec("m", "experts", 4, 256, columns=(30, 200))
    cut = decode_part(source, FORMAT, CCQ25, layer, StoredPart("m", 4, rows=(3, 7), stored_n=9))
    assert torch.equal(cut.dequantize(), slow_words(stored, 9, 256)[3:7, 30:200])
