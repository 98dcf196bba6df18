"""The permuted orders, against the index arithmetic of Paddle's kernels, one code at a time."""

from __future__ import annotations

import pytest
import torch
from qplug_int8.paddle.orders import read4, read8, write4, write8
from torch import Tensor


def codes(bits: int, n: int, k: int, seed: int = 0) -> Tensor:
    top = 2 ** (bits - 1)
    return torch.randint(-top, top, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def int8_sm80(q: Tensor) -> list[int]:
    """Where the kernel writes the code of row n, column k, with its bias."""
    n_count, k_count = q.shape
    out = [-1] * (n_count * k_count)
    for n in range(n_count):
        for k in range(k_count):
            low, high = k % 16 - k % 16 // 8 * 8, k % 16 // 8
            place = low + high + (high + 1) % 2 * (k % 16) + low * high + k // 16 * 16
            out[place % 64 + place // 64 * 128 + 64 * (n % 2) + k_count * 2 * (n // 2)] = (int(q[n, k]) + 128) % 256
    return out


def int4_sm80(q: Tensor) -> list[int]:
    """Bytes of column pairs are permuted first, then the nibbles of each word are dealt out: evens, then odds."""
    n_count, k_count = q.shape
    out = [0] * (n_count * k_count // 2)
    for n in range(n_count):
        for b in range(k_count // 2):
            low, high = b % 8 - b % 8 // 4 * 4, b % 8 // 4
            place = (low + high + (high + 1) % 2 * (b % 8) + low * high) % 8 * 2 + b % 16 // 8 + b // 16 * 16
            byte = (int(q[n, 2 * b]) & 15) | (int(q[n, 2 * b + 1]) & 15) << 4
            out[place % 32 + place // 32 * 128 + 32 * (n % 4) + k_count * 2 * (n // 4)] = byte
    for i in range(0, len(out), 4):
        lows = [((out[i + j] & 15) + 8) & 15 for j in range(4)]
        highs = [((out[i + j] >> 4) + 8) & 15 for j in range(4)]
        out[i : i + 4] = [values[j] | values[j + 2] << 4 for values in (lows, highs) for j in (0, 1)]
    return out


def int4_w4a8(q: Tensor) -> list[int]:
    n_count, k_count = q.shape
    out = [0] * (n_count * k_count // 2)
    places = (0, 2, 4, 6, 1, 3, 5, 7)
    for n in range(n_count):
        for g in range(k_count // 4):
            unit = places[g % 8] + g % 16 // 8 * 8 + n % 4 * 16 + g // 16 * 64 + n // 4 * k_count
            for j in (0, 1):
                out[2 * unit + j] = (int(q[n, 4 * g + 2 * j]) & 15) | (int(q[n, 4 * g + 2 * j + 1]) & 15) << 4
    for i in range(0, len(out), 4):
        word = sum(byte << 8 * j for j, byte in enumerate(out[i : i + 4]))
        dealt = sum((word >> 4 * j & 15) << 4 * places[j] for j in range(8))
        out[i : i + 4] = [dealt >> 8 * j & 255 for j in range(4)]
    return out


def int8_sm70(q: Tensor) -> list[int]:
    rows = q.shape[0]
    out = [0] * q.numel()
    for k in range(q.shape[1]):
        for n in range(rows):
            inside = n % 4 ^ 3 if n % 4 in (1, 2) else n % 4
            out[k * rows + n // 4 * 4 + inside] = (int(q[n, k]) + 128) % 256
    return out


def int4_sm70(q: Tensor) -> list[int]:
    nibbles = [0] * q.numel()
    for k in range(q.shape[1]):
        for n in range(q.shape[0]):
            place = next(i for i in range(8) if i % 4 * 2 + i // 4 == n % 8)
            nibbles[k * q.shape[0] + n // 8 * 8 + place] = (int(q[n, k]) + 8) & 15
    return [low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)]


@pytest.mark.parametrize(("n", "k"), [(8, 64), (16, 192), (24, 320)])
@pytest.mark.parametrize(
    ("bits", "order", "slow"),
    [(8, "", int8_sm80), (8, "_sm70", int8_sm70), (4, "", int4_sm80), (4, "_sm70", int4_sm70), (4, "w4a8", int4_w4a8)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_order_is_that_of_paddles_kernel(bits: int, order: str, slow: object, n: int, k: int) -> None:
    q = codes(bits, n, k)
    written = write8(q, order) if bits == 8 else write4(q, order)
    assert written.view(torch.uint8).reshape(-1).tolist() == slow(q)  # type: ignore[operator]
    read = read8(written, order, n, k) if bits == 8 else read4(written, order, n, k)
    assert torch.equal(read, q)


@pytest.mark.parametrize("order", ["", "_sm70", "_nk", "_kn"])
@pytest.mark.parametrize("bits", [8, 4])
def test_one_order_is_not_another(bits: int, order: str) -> None:
    q = codes(bits, 64, 64)
    read, write = (read8, write8) if bits == 8 else (read4, write4)
    written = write(q, order)
    others = [o for o in ("", "_sm70", "_nk", "_kn") if o != order]
    assert not any(torch.equal(read(written.reshape(shape(bits, o)), o, 64, 64), q) for o in others)


def shape(bits: int, order: str) -> tuple[int, int]:
    return (64, 64) if bits == 8 else (32, 64)


def test_first_word_of_int4_holds_every_eighth_column() -> None:
    """Paddle's kernel says of itself: from 0 1 2 3 4 5 6 7 to 0 8 16 24 1 9 17 25."""
    seen = []
    for k in (0, 8, 16, 24, 1, 9, 17, 25):
        q = torch.zeros(4, 64, dtype=torch.int8)
        q[0, k] = 7
        word = int.from_bytes(write4(q, "").view(torch.uint8).reshape(-1)[:4].tolist(), "little")
        seen.append([word >> 4 * i & 15 for i in range(8)].index(15))
    assert seen == list(range(8))


def test_int4_pairs_have_the_even_column_in_the_low_nibble() -> None:
    stored = torch.tensor([[0x10], [0x32], [-0x66]], dtype=torch.int8)  # 0x9A
    assert read4(stored, "_kn", 1, 6).tolist() == [[0, 1, 2, 3, -6, -7]]


def test_int4_pairs_of_rocm_are_rows_with_a_bias() -> None:
    assert read4(torch.tensor([[-0x66]], dtype=torch.int8), "_nk", 2, 1).tolist() == [[2], [1]]
