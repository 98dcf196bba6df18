"""CCQ, the convolutional code of WINT2 (arXiv:2507.07145): four weights in one byte, decoded and encoded.

A byte u stands for a code c of 15 bits, by an affine map of its column of the stored matrix (a row of the weight)::

    c = floor(u * code_scale + code_zp + 0.5)           in float32, each operation rounded

Its four 6-bit windows, at bits 9, 6, 3 and 0, are the four weights plus 32. Neighbouring windows share three bits, so not every
four values have a code: those whose low three bits are the next one's high three have exactly one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from qplug_core.errors import CannotEncode, DecodeError

SHIFTS = (9, 6, 3, 0)
GROUP = 64
"""Columns of the weight that share a local scale of 4 bits."""
LIMIT = 2**15
CHUNK = 2**20
"""Stored bytes that are decoded at once; temporaries are some 20 bytes for each."""


def codes(stored: Tensor, code_scale: Tensor, code_zp: Tensor) -> Tensor:
    """int32 codes ``[R, N]`` of bytes uint8 ``[R, N]``; scale and offset are float32 ``[N]``."""
    return torch.floor(stored.float() * code_scale + code_zp + 0.5).to(torch.int32)


def values(code: Tensor, window: int) -> Tensor:
    """Weight 0, 1, 2 or 3 of each code, int32 from -32 to 31."""
    return code.bitwise_right_shift(SHIFTS[window]).bitwise_and_(63).sub_(32)


def check(stored: Tensor, code_scale: Tensor, code_zp: Tensor) -> None:
    """Check that every byte that occurs has a code of 15 bits.

    :raises DecodeError: where one has not: there the kernels that read this code differ from each other.
    """
    data = stored.view(torch.uint8)
    ends = torch.stack([data.amin(0), data.amax(0)]).float()
    found = torch.floor(ends * code_scale.float().reshape(1, -1) + code_zp.float().reshape(1, -1) + 0.5)
    inside = (found >= 0) & (found < LIMIT)
    if not bool(inside.all()):
        column = int(torch.nonzero(~inside)[0, 1])
        raise DecodeError(
            f"bytes of column {column} give codes {float(found[0, column]):.0f} to {float(found[1, column]):.0f}; 0 to {LIMIT - 1} was "
            "needed, because beyond that FastDeploy's own kernels disagree, so fetch or quantize the file again"
        )


def decode(stored: dict[str, Tensor], n: int, k: int) -> Tensor:
    """float32 weight ``[N, K]`` of the tensors of :class:`~qplug_int8.paddle.wint2.CCQFormat`, a chunk at a time.

    ``w = (local scale * super scale) * value``, in this order.
    """
    weight = torch.empty(n, k, dtype=torch.float32, device=stored["quant_weight"].device)
    for start, data, scales in _chunks(stored, n):
        code = codes(data, stored["code_scale"].float().reshape(-1), stored["code_zp"].float().reshape(-1))
        for window in range(4):
            columns = slice(4 * start + window, 4 * (start + len(data)), 4)
            weight[:, columns] = (scales.repeat_interleave(GROUP // 4, 0) * values(code, window)).t()
    return weight


def local_scales(stored: Tensor) -> Tensor:
    """uint8 ``[2*R, N]`` of bytes ``[R, N]``: the high nibble belongs to the even group."""
    data = stored.view(torch.uint8)
    return torch.stack([data.bitwise_right_shift(4), data.bitwise_and(15)], 1).flatten(0, 1)


def _chunks(stored: dict[str, Tensor], n: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First stored row, bytes, and float32 scales ``[groups, N]``: pieces of whole scale bytes."""
    data, local = stored["quant_weight"].view(torch.uint8), stored["weight_scale"]
    outer = stored["super_scales"].float().reshape(-1)
    step = max(1, CHUNK // (32 * max(n, 1)))
    for first in range(0, len(local), step):
        rows = data[32 * first : 32 * (first + step)]
        yield 32 * first, rows, local_scales(local[first : first + step]).float() * outer


def encode(weights: Tensor, code_scale: Tensor, code_zp: Tensor) -> Tensor:
    """Bytes uint8 ``[K/4, N]`` of values int ``[N, K]`` from -32 to 31: the inverse of decoding, without the scales.

    Where a map is so flat that several bytes have one code, the lowest of them is taken.

    :raises CannotEncode: where four values are not neighbours in the code, or no byte maps to their code.
    """
    windows = [(weights.t()[j::4] + 32).to(torch.int32) for j in range(4)]
    for left, right in pairwise(windows):
        broken = (left & 7) != (right >> 3)
        if bool(broken.any()) or bool(((left | right) & ~63).any()):
            raise CannotEncode(
                f"{int(broken.sum())} pairs of values do not share three bits, which the 2-bit code demands; WINT2 is no format to convert "
                "to, so write wint4 instead"
            )
    wanted = sum((w & (63 if j == 0 else 7)) << SHIFTS[j] for j, w in enumerate(windows))
    scale, offset = code_scale.float().reshape(1, -1), code_zp.float().reshape(1, -1)
    guess = ((wanted - offset) / scale).round()
    found = torch.full_like(guess, -1.0)
    # Rounding moves the guess by a step at most, times how flat the map is.
    reach = int(torch.ceil(1.0 / scale.abs().min()).clamp(1, 255)) + 1
    for shift in range(reach, -reach - 1, -1):
        byte = (guess + shift).clamp(0, 255)
        found = torch.where(torch.floor(byte * scale + offset + 0.5) == wanted, byte, found)
    if bool((found < 0).any()):
        raise CannotEncode(
            f"{int((found < 0).sum())} codes have no byte under code_scale and code_zp; WINT2 is no format to convert to, so write wint4 "
            "instead"
        )
    return found.to(torch.uint8)
