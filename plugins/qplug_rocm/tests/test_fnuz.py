"""e4m3fn and e4m3fnuz, over every byte."""

from __future__ import annotations

import math

import pytest
import torch
from qplug_rocm.fnuz import fp8_max, from_fnuz, needs_fnuz, to_fnuz

from qplug_core.device import Device
from qplug_core.errors import DecodeError

BYTES = torch.arange(256, dtype=torch.uint8)


def value(byte: int, fnuz: bool) -> float:
    """By the definition: sign, four bits of exponent, three of mantissa."""
    sign, power, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if byte == 0x80 and fnuz:
        return math.nan
    if power == 15 and mantissa == 7 and not fnuz:
        return math.nan
    bias = 8 if fnuz else 7
    return sign * math.ldexp(1 + mantissa / 8, power - bias) if power else sign * math.ldexp(mantissa / 8, 1 - bias)


def test_torch_reads_both_by_the_definition() -> None:
    for kind, fnuz in ((torch.float8_e4m3fn, False), (torch.float8_e4m3fnuz, True)):
        expected = torch.tensor([value(b, fnuz) for b in range(256)])
        torch.testing.assert_close(BYTES.view(kind).float(), expected, rtol=0, atol=0, equal_nan=True)


def test_golden_bytes() -> None:
    assert [value(b, True) for b in (0x7F, 0x7E, 0x38, 0x01)] == [240.0, 224.0, 0.5, 2.0**-10]
    assert [value(b, False) for b in (0x7E, 0x01, 0x38, 0x08)] == [448.0, 2.0**-9, 1.0, 0.015625]


@pytest.mark.parametrize("scale", [1.0, 0.0123, 2.0**-120, 3.1e37])
def test_every_byte_to_fnuz_is_the_same_number(scale: float) -> None:
    codes, scales = to_fnuz(BYTES.view(torch.float8_e4m3fn), torch.tensor([scale]))
    assert codes.dtype == torch.float8_e4m3fnuz
    mine = codes.float().double() * scales.double()
    theirs = BYTES.view(torch.float8_e4m3fn).float().double() * torch.tensor([scale]).double()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def test_triton_10745_nan_stays_nan_and_minus_zero_is_zero() -> None:
    codes, _ = to_fnuz(BYTES.view(torch.float8_e4m3fn), torch.tensor([1.0]))
    data = codes.view(torch.uint8)
    assert data[0x80].item() == 0
    assert [data[0x7F].item(), data[0xFF].item()] == [0x80, 0x80]
    assert codes.float().isnan().sum().item() == 2
    same = [b for b in range(256) if b not in (0x80, 0x7F, 0xFF)]
    assert data[same].tolist() == same
    back, _ = from_fnuz(BYTES[None].view(torch.float8_e4m3fnuz)[:, 0x80:0x81], torch.ones(1, 1))
    assert back.float().isnan().all()


def test_a_missing_conversion_is_a_factor_of_two() -> None:
    """sglang 29590 and vLLM: the same bytes under the same scale are half, and -0 is NaN."""
    wrong = BYTES.view(torch.float8_e4m3fnuz).float()
    right = BYTES.view(torch.float8_e4m3fn).float()
    finite = ~(wrong.isnan() | right.isnan()) & (right != 0)
    assert torch.equal(wrong[finite] * 2, right[finite])
    assert int((wrong.isnan() & ~right.isnan()).sum()) == 1


@pytest.mark.parametrize("byte", range(256))
def test_every_byte_from_fnuz_is_the_same_number(byte: int) -> None:
    codes = torch.full((1, 4), byte, dtype=torch.uint8).view(torch.float8_e4m3fnuz)
    found, scales = from_fnuz(codes, torch.tensor([[0.0123]]))
    assert found.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(
        found.float().double() * scales.double(),
        codes.float().double() * torch.tensor(0.0123).double(),
        rtol=0,
        atol=0,
        equal_nan=True,
    )


def test_only_blocks_with_240_keep_their_scale() -> None:
    data = torch.tensor([[0x7F, 0x38, 0x40, 0x40], [0x01, 0x38, 0x7E, 0xC0]], dtype=torch.uint8)
    found, scales = from_fnuz(data, torch.tensor([[1.0, 4.0], [1.0, 4.0]]), (1, 2))
    assert scales.tolist() == [[1.0, 2.0], [0.5, 2.0]]
    spread = scales.repeat_interleave(2, 1)
    assert torch.equal(
        found.float() * spread, data.view(torch.float8_e4m3fnuz).float() * torch.tensor([[1.0, 1.0, 4.0, 4.0]])
    )


@pytest.mark.parametrize("block", [(0, 0), (1, 0), (2, 3)])
def test_random_codes_in_blocks(block: tuple[int, int]) -> None:
    data = torch.randint(0x10, 0x7F, (4, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data[1, 2] = 0xFF
    grid = (-(-4 // (block[0] or 4)), -(-7 // (block[1] or 7)))
    scales = torch.rand(grid, generator=torch.Generator().manual_seed(1))
    found, after = from_fnuz(data, scales, block)

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(block[0] or 4, 0).repeat_interleave(block[1] or 7, 1)[:4, :7].double()

    assert torch.equal(found.float() * spread(after), data.view(torch.float8_e4m3fnuz).float() * spread(scales))


def test_240_beside_the_smallest_values_is_refused() -> None:
    with pytest.raises(DecodeError, match="1 values beside a 240"):
        from_fnuz(torch.tensor([[0x7F, 0x01]], dtype=torch.uint8), torch.ones(1, 1))


def test_scales_that_cannot_be_doubled_or_halved_are_refused() -> None:
    with pytest.raises(DecodeError, match="not finite"):
        to_fnuz(BYTES.view(torch.float8_e4m3fn), torch.tensor([60000.0], dtype=torch.float16))
    with pytest.raises(DecodeError, match="not exact"):
        from_fnuz(torch.zeros(1, 1, dtype=torch.uint8), torch.tensor([[2.0**-149]]))


@pytest.mark.parametrize(
    ("device", "fnuz"),
    [
        ("gfx942", True),
        ("mi300x", True),
        ("mi325x", True),
        ("gfx950", False),
        ("mi355x", False),
        ("gfx1201", False),
        ("gfx90a", False),
        ("sm_90", False),
    ],
)
def test_sglang_30900_only_gfx942_has_the_smaller_range(device: str, fnuz: bool) -> None:
    """One engine clamped activations to 224 on gfx950, where 448 is the bound."""
    found = Device.from_name(device)
    assert needs_fnuz(found) == fnuz
    assert fp8_max(found) == (240.0 if fnuz else 448.0)
    assert fp8_max(found) == torch.finfo(torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn).max
