"""The four orders in which AWQ files hold integer codes.

All of them are 4-bit or 8-bit fields from the low bits of a little-endian word upwards; they differ in which code is in which
field. Every ``unpack_*`` gives uint8 codes, every ``pack_*`` is its inverse.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qplug_core.kernels import cpu_packing
from qplug_core.packing import pack, transposed, unpack

GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Codes in the fields of gemm, from the low bits upwards."""
ROWS = 4
"""Rows that gemv_fast interleaves."""
STRIDE = 64
"""Columns of one interleaved tile of gemv_fast."""
TILE = 16
"""Extent of one tile of Marlin along both axes."""
UNIT = 64
"""Columns (rows of the weight) over which Marlin permutes a row of tiles."""


def unpack_gemm(words: Tensor, bits: int) -> Tensor:
    """``[N, R]`` of int32 ``[R, N*bits/32]``: eight fields hold codes 0, 2, 4, 6, 1, 3, 5, 7 of eight.

    8 bits keep that order of eight, over two words, as RTP-LLM reads them. Words are transposed, not codes: there are fewer.
    """
    if bits == 4 and cpu_packing.available(words):
        return cpu_packing.unpack_awq(words, GEMM_ORDER)
    rows, count = words.shape
    data = transposed(words).view(torch.uint8).view(count * 4 // bits, bits // 4, rows, 4)
    codes = torch.empty(data.shape[0], 8, rows, dtype=torch.uint8)
    for code, word, byte, shift in _gemm_fields(bits):
        torch.bitwise_right_shift(data[:, word, :, byte], shift, out=codes[:, code])
    if bits == 4:
        codes.bitwise_and_(15)
    return codes.view(-1, rows)


def pack_gemm(codes: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`unpack_gemm`; N is a multiple of 8."""
    n, rows = codes.shape
    eights = codes.reshape(n // 8, 8, rows)
    data = torch.zeros(n // 8, bits // 4, rows, 4, dtype=torch.uint8)
    for code, word, byte, shift in _gemm_fields(bits):
        data[:, word, :, byte].bitwise_or_(torch.bitwise_left_shift(eights[:, code], shift))
    return transposed(data.view(torch.int32).view(-1, rows))


def _gemm_fields(bits: int) -> list[tuple[int, int, int, int]]:
    """Code of eight, word, byte of the word and shift of the byte, of every field in turn."""
    starts = [divmod(field * bits, 32) for field in range(8)]
    return [(code, word, *divmod(bit, 8)) for code, (word, bit) in zip(GEMM_ORDER, starts, strict=True)]


def unpack_gemv_fast(words: Tensor) -> Tensor:
    """``[N, K]`` of int16 ``[N/4, K]``: TinyChat's second layout.

    A tile is 4 rows of 64 columns, row after row, four codes to an int16. Within 32 columns of a row, field ``8a + 4q + p``
    holds column ``8p + 2a + q``.
    """
    tiles, k = words.shape
    fields = unpack(words.contiguous(), 4).view(tiles, k // STRIDE, ROWS, STRIDE)
    rows = fields.transpose(1, 2).reshape(tiles * ROWS, k // 32, 4, 2, 4)
    return rows.permute(0, 1, 4, 2, 3).reshape(tiles * ROWS, k)


def pack_gemv_fast(codes: Tensor) -> Tensor:
    """The inverse of :func:`unpack_gemv_fast`; N is a multiple of 4, K of 64."""
    n, k = codes.shape
    rows = codes.reshape(n, k // 32, 4, 4, 2).permute(0, 1, 3, 4, 2).reshape(n // ROWS, ROWS, k // STRIDE, STRIDE)
    return pack(rows.transpose(1, 2).reshape(n // ROWS, ROWS * k), 4, torch.int16)


def unpack_marlin(words: Tensor) -> Tensor:
    """``[K, N]`` of int32 ``[K/16, 2*N]``: tiles of 16 x 16, in which 1024 codes of four tiles are permuted for tensor cores."""
    strips = words.shape[0]
    fields = unpack(words.contiguous(), 4).view(-1, TILE * UNIT)
    codes = torch.empty_like(fields)
    codes[:, _marlin_order()] = fields
    tiles = codes.view(strips, -1, TILE, TILE)
    return tiles.transpose(1, 2).reshape(strips * TILE, -1)


def pack_marlin(codes: Tensor) -> Tensor:
    """The inverse of :func:`unpack_marlin`; K is a multiple of 16, N of 64."""
    k, n = codes.shape
    tiles = codes.reshape(k // TILE, TILE, n // TILE, TILE).transpose(1, 2).reshape(-1, TILE * UNIT)
    return pack(tiles[:, _marlin_order()].reshape(k // TILE, TILE * n), 4)


def marlin_scale_order(grouped: bool) -> Tensor:
    """Columns that Marlin's scales are taken from, of 64 for group scales and of 32 for one scale for each row."""
    if grouped:
        return torch.arange(64).view(8, 8).t().reshape(-1)
    return torch.tensor([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])


@functools.cache
def _marlin_order() -> Tensor:
    """Position among 1024 codes of four tiles of the code in each field.

    Thread t of 32 takes column t/4 and rows 2(t%4), +1, +8, +9 of both halves of a tile, from each of four tiles; the eight of a
    word are then in the order 0, 2, 4, 6, 1, 3, 5, 7 (the operand of mma.m16n8k16).
    """
    order = []
    for thread in range(32):
        column, row = thread // 4, 2 * (thread % 4)
        for tile in range(4):
            eight = [
                tile * TILE * TILE + r * TILE + column + 8 * half
                for half in (0, 1)
                for r in (row, row + 1, row + 8, row + 9)
            ]
            order += [eight[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    return torch.tensor(order)
