"""HQQ's packing: the rows of a matrix in equal runs, one above the other in the bits of each word, the first run highest.

``[L, C]`` codes of 4 and 2 bits become ``[L/2, C]`` and ``[L/4, C]`` uint8, of 3 bits ``[ceil(L/10), C]`` int32 with rows of
zeros behind the last. 5, 6 and 8 bits are not packed.
"""

from __future__ import annotations

import torch
from torch import Tensor

RUNS = {2: 4, 3: 10, 4: 2, 5: 1, 6: 1, 8: 1}
"""Runs in one word, by bits."""


def word_bytes(bits: int) -> int:
    """Bytes of one word: uint8, or int32 for 3 bits."""
    return 4 if bits == 3 else 1


def unpack(words: Tensor, bits: int, rows: int) -> Tensor:
    """uint8 codes ``[rows, C]`` of words ``[R, C]``."""
    runs, height = RUNS[bits], words.shape[0]
    if runs == 1:
        return words
    out = torch.empty(runs * height, words.shape[1], dtype=torch.uint8)
    for i in range(runs):
        out[i * height : (i + 1) * height] = (words >> bits * (runs - 1 - i)) & (2**bits - 1)
    return out[:rows]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Words of uint8 codes ``[L, C]``; the inverse of :func:`unpack`."""
    runs = RUNS[bits]
    if runs == 1:
        return codes.contiguous()
    height = -(-codes.shape[0] // runs)
    words = torch.zeros(height, codes.shape[1], dtype=torch.int32 if bits == 3 else torch.uint8)
    for i in range(runs):
        run = codes[i * height : (i + 1) * height]
        words[: len(run)] |= run.to(words.dtype) << bits * (runs - 1 - i)
    return words
