"""The e4m3fnuz numbers of gfx942 (MI300): exact conversion from and to e4m3fn. gfx950, RDNA4 and NVIDIA have e4m3fn and need none.

Both have a sign, four bits of exponent and three of mantissa. The bias is 7 in e4m3fn and 8 in e4m3fnuz, so of the same byte
the fnuz value is half, with three exceptions (OCP 8-bit Floating Point 1.0, 4.1; AMD CDNA3 ISA, 7.2):

============== ========================= ======================
byte           e4m3fn                    e4m3fnuz
============== ========================= ======================
0x80           -0.0                      NaN, the only one
0x7F, 0xFF     NaN                       240, -240
all others     v                         v / 2
============== ========================= ======================
"""

from __future__ import annotations

import torch
from torch import Tensor

from qplug_core.device import Device
from qplug_core.errors import DecodeError


def needs_fnuz(device: Device) -> bool:
    """True where the matrix units of ``device`` multiply e4m3fnuz and not e4m3fn."""
    return "fp8_fnuz" in device.features


def fp8_max(device: Device) -> float:
    """The largest FP8 value that activations are scaled to: 240 for e4m3fnuz, else 448.

    Some engines clamp to 224 on gfx942 (and did on gfx950 too): that loses a bit of range, and is another function.
    """
    return 240.0 if needs_fnuz(device) else 448.0


def to_fnuz(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3fn ``codes`` (any shape) as float8_e4m3fnuz of the same shape, and ``scales`` doubled: the same numbers.

    -0 becomes 0, NaN stays NaN. A stored activation scale is doubled likewise, by whoever holds it.

    :raises DecodeError: where a doubled scale is not finite in its dtype.
    """
    data = codes.view(torch.uint8)
    converted = torch.where(data == 0x80, torch.zeros_like(data), data)
    converted = torch.where((data & 0x7F) == 0x7F, torch.full_like(data, 0x80), converted)
    doubled = scales * 2
    if not bool(torch.isfinite(doubled).all()) and bool(torch.isfinite(scales).all()):
        raise DecodeError(
            f"a scale of {float(scales.max())} was found; twice that is not finite in {scales.dtype}, so store scales in float32"
        )
    return converted.view(torch.float8_e4m3fnuz), doubled


def from_fnuz(codes: Tensor, scales: Tensor, block: tuple[int, int] = (1, 0)) -> tuple[Tensor, Tensor]:
    """e4m3fnuz ``codes [N, K]`` (or their bytes) as float8_e4m3fn, and scales ``[N/bn, K/bk]``: the same numbers.

    A block without 240 keeps its bytes and has its scale halved. A block with 240, whose byte is NaN in e4m3fn, keeps its scale
    and has its values written anew, which e4m3fn can up to 448.

    :raises DecodeError: for a block with 240 beside odd multiples of 2**-10, which no one scale holds in e4m3fn, and for a
        scale that cannot be halved.
    """
    data = codes.contiguous().view(torch.uint8)
    extreme = (data & 0x7F) == 0x7F
    same = torch.where(data == 0x80, torch.full_like(data, 0x7F), data)
    halved = scales / 2
    if not bool((halved * 2 == scales)[~scales.isnan()].all()):
        raise DecodeError(
            f"a scale of {float(scales.min())} was found; half of it is not exact in {scales.dtype}, so store scales in float32"
        )
    if not bool(extreme.any()):
        return same.view(torch.float8_e4m3fn), halved
    values = data.view(torch.float8_e4m3fnuz).float()
    anew = values.to(torch.float8_e4m3fn)
    kept = _any_in_block(extreme, block, scales.shape)
    where = _spread(kept, block, data.shape)
    lost = where & (anew.float() != values) & ~values.isnan()
    if bool(lost.any()):
        raise DecodeError(
            f"{int(lost.sum())} values beside a 240 of their block are odd multiples of 2**-10; e4m3fn holds both under no one scale, so "
            "convert the checkpoint with scales for smaller blocks"
        )
    merged = torch.where(where, anew.view(torch.uint8), same)
    return merged.view(torch.float8_e4m3fn), torch.where(kept, scales, halved)


def _any_in_block(found: Tensor, block: tuple[int, int], grid: torch.Size) -> Tensor:
    """bool ``[N/bn, K/bk]``: whether a block of ``found [N, K]`` has a True."""
    n, k = found.shape
    bn, bk = block[0] or n, block[1] or k
    padded = torch.nn.functional.pad(found, (0, grid[1] * bk - k, 0, grid[0] * bn - n))
    return padded.view(grid[0], bn, grid[1], bk).any(3).any(1)


def _spread(grid: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """A grid ``[N/bn, K/bk]`` as ``[N, K]``."""
    n, k = shape
    return grid.repeat_interleave(block[0] or n, 0).repeat_interleave(block[1] or k, 1)[:n, :k]
