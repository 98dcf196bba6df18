"""The orders in which FastDeploy stores the codes of a weight ``[N, K]``, and back.

Paddle quantizes a weight ``[K, N]`` and then permutes the codes for the tensor cores that will read them; a checkpoint holds
the permuted bytes under the shape ``[N, K]`` (INT8) or ``[N/2, K]`` (INT4). The rules are restated from Paddle's
``weight_quantize_kernel_gpu_impl.h``:

======= ================================================================================================ ====================
order   bytes                                                                                            codes
======= ================================================================================================ ====================
(none)  sm_75 to sm_90: rows in pairs (INT4: fours) that alternate every 64 columns, columns permuted    plus 128, or plus 8
        within 16 (INT4: 32), then the nibbles of each 32-bit word
sm70    ``[K, N]``: rows permuted within 4; INT4: two rows in one byte, nibbles permuted within 8         plus 128, or plus 8
nk      ``[N, K]``, or ``[N/2, K]`` with the even row in the low nibble: what Paddle leaves on ROCm        signed, or plus 8
kn      ``[K, N]``, or ``[K/2, N]`` with the even column in the low nibble: before any permutation         signed
======= ================================================================================================ ====================
"""

from __future__ import annotations

import torch
from torch import Tensor

from qplug_core.packing import pack, transposed, unpack

BYTES = (0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)
"""Place of column k within 16 columns of INT8, for sm_75 to sm_90."""
PAIRS = (0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)
"""Place of byte b (columns 2b and 2b + 1) within 32 columns of INT4, for sm_75 to sm_90."""
QUADS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Place of four columns within 32 of W4A8; and the nibble that comes to place i of a word (W4A8: the place of nibble i)."""
TILE = 64
"""Columns after which the next row of a pair or four begins."""


def _places() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Nibble of the stored row at which column k of 32 lies: of INT4, and of W4A8."""
    int4, w4a8 = [], []
    for k in range(32):
        place = 2 * PAIRS[k // 2] + k % 2
        int4.append(place // 8 * 8 + QUADS.index(place % 8))
        place = 4 * QUADS[k // 4] + k % 4
        w4a8.append(place // 8 * 8 + QUADS[place % 8])
    return tuple(int4), tuple(w4a8)


NIBBLES, NIBBLES_W4A8 = _places()
UNITS8 = {"": (2, TILE), "_sm70": (4, 1), "_nk": (1, 1), "_kn": (1, 1)}
UNITS4 = {"": (4, TILE), "_sm70": (8, 1), "_nk": (2, 1), "_kn": (1, 2)}
"""Rows and columns by order, of which N and K are multiples."""


def read8(stored: Tensor, order: str, n: int, k: int) -> Tensor:
    """int8 codes ``[N, K]`` of stored bytes in the order ``""``, ``"_sm70"``, ``"_nk"`` or ``"_kn"``."""
    data = stored.view(torch.uint8)
    match order:
        case "_nk":
            return data.view(torch.int8)
        case "_kn":
            return transposed(data).view(torch.int8)
        case "_sm70":
            columns = data.reshape(k, n // 4, 4)[..., [0, 2, 1, 3]].reshape(k, n)
            return transposed(columns).bitwise_xor_(128).view(torch.int8)
    rows = _untiled(data, n, k, 2, TILE)
    return _gathered(rows, BYTES).bitwise_xor_(128).view(torch.int8)


def write8(codes: Tensor, order: str) -> Tensor:
    """The inverse of :func:`read8`: int8 bytes ``[N, K]`` (``[K, N]`` for ``"_kn"``)."""
    n, k = codes.shape
    data = codes.contiguous().view(torch.uint8)
    match order:
        case "_nk":
            return data.clone().view(torch.int8)
        case "_kn":
            return transposed(data).view(torch.int8)
        case "_sm70":
            columns = transposed(data).reshape(k, n // 4, 4)[..., [0, 2, 1, 3]].reshape(n, k)
            return columns.bitwise_xor(128).view(torch.int8)
    return _tiled(_scattered(data, BYTES), 2, TILE).bitwise_xor_(128).view(torch.int8)


def read4(stored: Tensor, order: str, n: int, k: int) -> Tensor:
    """int8 codes ``[N, K]`` of stored bytes in one of the orders of :func:`read8`, or ``"w4a8"``."""
    data = stored.contiguous().view(torch.uint8)
    match order:
        case "_nk":
            return _signed(transposed(unpack(transposed(data.reshape(n // 2, k)), 4)), biased=True)
        case "_kn":
            return _signed(unpack(transposed(data), 4), biased=False)
        case "_sm70":
            nibbles = unpack(data.reshape(k, n // 2), 4)
            inverse = tuple(QUADS.index(i) for i in range(8))
            return _signed(transposed(_gathered(nibbles, inverse)), biased=True)
    nibbles = unpack(_untiled(data, n, k // 2, 4, TILE // 2), 4)
    w4a8 = order == "w4a8"
    return _signed(_gathered(nibbles, NIBBLES_W4A8 if w4a8 else NIBBLES), biased=not w4a8)


def write4(codes: Tensor, order: str) -> Tensor:
    """The inverse of :func:`read4`: int8 bytes ``[N/2, K]`` (``[K/2, N]`` for ``"_kn"`` and ``"w4a8"``)."""
    n, k = codes.shape
    data = codes.contiguous().view(torch.uint8)
    nibbles = data.bitwise_and(15) if order in ("_kn", "w4a8") else data.add(8).bitwise_and_(15)
    match order:
        case "_nk":
            return transposed(pack(transposed(nibbles), 4, torch.uint8)).view(torch.int8)
        case "_kn":
            return transposed(pack(nibbles, 4, torch.uint8)).view(torch.int8)
        case "_sm70":
            inverse = tuple(QUADS.index(i) for i in range(8))
            return pack(_scattered(transposed(nibbles), inverse), 4, torch.int8).reshape(n // 2, k)
    w4a8 = order == "w4a8"
    rows = pack(_scattered(nibbles, NIBBLES_W4A8 if w4a8 else NIBBLES), 4, torch.uint8)
    return _tiled(rows, 4, TILE // 2).view(torch.int8).reshape((k // 2, n) if w4a8 else (n // 2, k))


def _untiled(data: Tensor, n: int, width: int, rows: int, tile: int) -> Tensor:
    """Rows ``[N, width]`` of bytes that were stored ``rows`` at a time, ``tile`` bytes of each in turn."""
    return data.reshape(n // rows, width // tile, rows, tile).transpose(1, 2).reshape(n, width)


def _tiled(data: Tensor, rows: int, tile: int) -> Tensor:
    n, width = data.shape
    return data.reshape(n // rows, rows, width // tile, tile).transpose(1, 2).reshape(n, width)


def _gathered(values: Tensor, places: tuple[int, ...]) -> Tensor:
    """``[R, L]`` whose value i, within each run, is found at ``places[i]``."""
    rows, length = values.shape
    return values.view(rows, -1, len(places))[..., list(places)].reshape(rows, length)


def _scattered(values: Tensor, places: tuple[int, ...]) -> Tensor:
    rows, length = values.shape
    return values.reshape(rows, -1, len(places))[..., [places.index(i) for i in range(len(places))]].reshape(rows, length)


def _signed(nibbles: Tensor, biased: bool) -> Tensor:
    """int8 of nibbles: two's complement, or plus 8."""
    values = nibbles if biased else nibbles.bitwise_xor(8)
    return values.sub(8).view(torch.int8)
