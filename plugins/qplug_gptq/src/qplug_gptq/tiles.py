"""The order in which Marlin stores codes and scales: tiles of 16 x 16, permuted for the fragments of a tensor core.

A unit is 16 rows of K by 64 columns of N: four tiles, 1024 codes. Thread t of 32 (column t // 4, rows from 2 * (t % 4)) takes, from
each tile and each 8-column half, rows r, r + 1, r + 8 and r + 9; then every 8 codes (4 of 8 bits) are interleaved, so that
one mask extracts pairs. The layout of 2:4 sparse weights takes other columns in the same rows. Source: Frantar et al.,
"MARLIN", arXiv:2408.11743, section 3.2, and the fragments of ``mma.m16n8k16`` in NVIDIA's PTX manual.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qplug_core.packing import pack, transposed, unpack

TILE = 16
UNIT = 64
"""Columns of N that are permuted together."""

INTERLEAVE = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}


@functools.cache
def code_order(bits: int, sparse: bool) -> Tensor:
    """LongTensor ``[1024]``: which code of a unit, counted as ``[tile, K, N]``, stands at each place."""
    order = []
    for thread in range(32):
        column, row = thread // 4, 2 * (thread % 4)
        taken = []
        for half in range(2):
            for r in (row, row + 1, row + 8, row + 9):
                if sparse:
                    taken.append(256 * (column // 2) + TILE * r + 8 * (column % 2) + 4 * half)
                else:
                    taken.append(TILE * r + column + 8 * half)
        for j in range(4):
            order += [place + (j if sparse else 256 * j) for place in taken]
    run = INTERLEAVE[bits]
    return torch.tensor(order).view(-1, len(run))[:, torch.tensor(run)].reshape(-1)


@functools.cache
def scale_order(grouped: bool, sparse: bool) -> Tensor:
    """LongTensor ``[64]`` or ``[32]``: which scale of a run of columns stands at each place."""
    if sparse:
        return torch.tensor([8 * i + j for i in range(8) for j in ((0, 4, 1, 5, 2, 6, 3, 7) if grouped else range(8))])
    if grouped:
        return torch.tensor([i + 8 * j for i in range(8) for j in range(8)])
    return torch.tensor([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])


def codes(words: Tensor, bits: int, sparse: bool = False) -> Tensor:
    """uint8 codes ``[N, K]`` of int32 words ``[K/16, N*16*bits/32]``; K counts stored codes, half of the columns where ``sparse``."""
    order = code_order(bits, sparse)
    flat = unpack(words.contiguous(), bits).view(-1, order.numel())
    tiles = torch.empty_like(flat)
    tiles[:, order] = flat
    rows = words.shape[0]
    # [K/16, N/16, 16 of K, 16 of N]
    return tiles.view(rows, -1, TILE, TILE).permute(1, 3, 0, 2).reshape(-1, rows * TILE)


def words(codes: Tensor, bits: int, sparse: bool = False) -> Tensor:
    """The inverse of :func:`codes`."""
    n, k = codes.shape
    tiles = codes.view(n // TILE, TILE, k // TILE, TILE).permute(2, 0, 3, 1).reshape(k // TILE, n * TILE)
    order = code_order(bits, sparse)
    return pack(tiles.view(-1, order.numel())[:, order].reshape(k // TILE, n * TILE), bits)


def scales(stored: Tensor, sparse: bool = False) -> Tensor:
    """Scales ``[N, G]`` of stored ones ``[G, N]``, of all groups of the layer: one group has another order than several."""
    order = scale_order(stored.shape[0] > 1, sparse)
    flat = stored.reshape(-1, order.numel())
    plain = torch.empty_like(flat)
    plain[:, order] = flat
    return transposed(plain.view(stored.shape))


def stored_scales(scales: Tensor, sparse: bool = False) -> Tensor:
    """The inverse of :func:`scales`."""
    order = scale_order(scales.shape[1] > 1, sparse)
    plain = transposed(scales)
    return plain.reshape(-1, order.numel())[:, order].reshape(plain.shape)
