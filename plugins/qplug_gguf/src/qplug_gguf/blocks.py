"""Blocks: how each GGUF type lays out B consecutive values of one row in T bytes.

All types but those of the IQ1, IQ2 and IQ3 families are affine, or a codebook times a scale: value = code * scale - shift. The
products of a super-block's factor and a block's small integer are made in float32, in the order of llama.cpp's own dequantization,
so ``dequantize()`` of the decoded weight has the bits of ``gguf.quants.dequantize``.
Layouts: ggml-common.h and ggml-quants.c of llama.cpp; the gguf package's quants.py is the definition tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

QK_K = 256
"""Values of a super-block."""


@dataclass(frozen=True)
class Fields:
    """Decoded blocks of a matrix: codes ``[n, b, B]`` uint8 (signed codes plus ``BlockType.zero``), scales and shift ``[n, b, groups]``."""

    codes: Tensor
    scales: Tensor
    shift: Tensor | None = None


@dataclass(frozen=True)
class BlockType:
    """One GGUF type.

    values, nbytes
        B and T.
    scheme
        Numbers and group size.
    unpack
        uint8 ``[n, b, T]`` to :class:`Fields`.
    zero
        Code of the value 0 where codes are signed: subtracted from unsigned ones.
    pack
        The inverse of ``unpack``, where a decoded weight still has all that the bytes said.
    """

    name: str
    values: int
    nbytes: int
    scheme: str
    unpack: Callable[[Tensor], Fields]
    zero: int = 0
    pack: Callable[[Fields], Tensor] | None = None


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte ``start`` of every block, ``[n, b, 1]``."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16)


def _shifted(packed: Tensor, runs: int, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Fields of bytes ``[n, b, runs * width]``: of each run of bytes, all fields at the first shift, then at the next: ``[n, b, -1]``."""
    n, b, length = packed.shape
    out = torch.empty(n, b, runs, len(shifts), length // runs, dtype=torch.uint8)
    bytes_ = packed.reshape(n, b, runs, length // runs)
    for i, shift in enumerate(shifts):
        torch.bitwise_right_shift(bytes_, shift, out=out[..., i, :])
    return out.bitwise_and_(mask).view(n, b, -1)


def _nibbles(packed: Tensor, runs: int = 1) -> Tensor:
    return _shifted(packed, runs, (0, 4), 15)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 ``[n, b, 32]`` below 16 as bytes ``[n, b, 16]``: the first half in the low nibbles."""
    return codes[..., :16] | codes[..., 16:] << 4


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


# Blocks of 32 with a float16 scale: d (2 bytes), then m (2) where there is a minimum, then high bits, then codes.


def _unpack_q4_0(blocks: Tensor) -> Fields:
    return Fields(_nibbles(blocks[..., 2:]), _half(blocks, 0))


def _pack_q4_0(fields: Fields) -> Tensor:
    return torch.cat([_bytes(fields.scales), _pack_nibbles(fields.codes)], dim=-1)


def _unpack_q4_1(blocks: Tensor) -> Fields:
    return Fields(_nibbles(blocks[..., 4:]), _half(blocks, 0), -_half(blocks, 2))


def _pack_q4_1(fields: Fields) -> Tensor:
    assert fields.shift is not None
    return torch.cat([_bytes(fields.scales), _bytes(-fields.shift), _pack_nibbles(fields.codes)], dim=-1)


def _fifth_bits(stored: Tensor) -> Tensor:
    """Bit 4 of 32 codes, in place, from 4 bytes ``[n, b, 4]``: code i has bit i of the little-endian word."""
    bits = stored[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(-2) << 4


def _pack_fifth_bits(codes: Tensor) -> Tensor:
    bits: Tensor = (codes >> 4).unflatten(-1, (4, 8)) << torch.arange(8, dtype=torch.uint8)
    return bits.sum(-1, dtype=torch.uint8)


def _unpack_q5_0(blocks: Tensor) -> Fields:
    return Fields(_nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6]), _half(blocks, 0))


def _pack_q5_0(fields: Fields) -> Tensor:
    low = _pack_nibbles(fields.codes & 15)
    return torch.cat([_bytes(fields.scales), _pack_fifth_bits(fields.codes), low], dim=-1)


def _unpack_q5_1(blocks: Tensor) -> Fields:
    return Fields(_nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8]), _half(blocks, 0), -_half(blocks, 2))


def _pack_q5_1(fields: Fields) -> Tensor:
    assert fields.shift is not None
    low, high = _pack_nibbles(fields.codes & 15), _pack_fifth_bits(fields.codes)
    return torch.cat([_bytes(fields.scales), _bytes(-fields.shift), high, low], dim=-1)


def _unpack_q8_0(blocks: Tensor) -> Fields:
    return Fields(blocks[..., 2:] ^ 128, _half(blocks, 0))


def _pack_q8_0(fields: Fields) -> Tensor:
    return torch.cat([_bytes(fields.scales), fields.codes ^ 128], dim=-1)


# Super-blocks of 256: float16 factors times small integers for each group of 16 or 32.


def _unpack_q2_k(blocks: Tensor) -> Fields:
    """scales and minima (16 bytes of two nibbles), codes (64), d, dmin."""
    small = blocks[..., :16]
    scales = _half(blocks, 80).float() * (small & 15).float()
    shift = _half(blocks, 82).float() * (small >> 4).float()
    return Fields(_shifted(blocks[..., 16:80], 2, (0, 2, 4, 6), 3), scales, shift)


def _unpack_q3_k(blocks: Tensor) -> Fields:
    """high bits (32 bytes), low bits (64), 16 scales of 6 bits (12), d. Stored scales are 32 too large."""
    high = _shifted(blocks[..., :32], 1, tuple(range(8)), 1)
    low = _shifted(blocks[..., 32:96], 2, (0, 2, 4, 6), 3)
    small = _nibbles(blocks[..., 96:104]) | _shifted(blocks[..., 104:108], 1, (0, 2, 4, 6), 3) << 4
    return Fields(low | high << 2, _half(blocks, 108).float() * (small.float() - 32))


def _scale_min(packed: Tensor) -> tuple[Tensor, Tensor]:
    """8 scales and 8 minima of 6 bits, float32 ``[n, b, 8]``, from 12 bytes: the first four whole, high bits of the others above them."""
    first, second, third = packed.unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([first & 63, third & 15 | first >> 2 & 48], dim=-1)
    minima = torch.cat([second & 63, third >> 4 | second >> 2 & 48], dim=-1)
    return scales.float(), minima.float()


def _unpack_q4_k(blocks: Tensor) -> Fields:
    """d, dmin, scales and minima (12 bytes), codes (128)."""
    scales, minima = _scale_min(blocks[..., 4:16])
    codes = _nibbles(blocks[..., 16:], 4)
    return Fields(codes, _half(blocks, 0).float() * scales, _half(blocks, 2).float() * minima)


def _unpack_q5_k(blocks: Tensor) -> Fields:
    """d, dmin, scales and minima (12 bytes), high bits (32), low bits (128)."""
    scales, minima = _scale_min(blocks[..., 4:16])
    codes = _nibbles(blocks[..., 48:], 4) | _shifted(blocks[..., 16:48], 1, tuple(range(8)), 1) << 4
    return Fields(codes, _half(blocks, 0).float() * scales, _half(blocks, 2).float() * minima)


def _unpack_q6_k(blocks: Tensor) -> Fields:
    """low bits (128 bytes), high bits (64), 16 signed scales (16), d."""
    codes = _nibbles(blocks[..., :128], 2) | _shifted(blocks[..., 128:192], 2, (0, 2, 4, 6), 3) << 4
    small = blocks[..., 192:208].contiguous().view(torch.int8)
    return Fields(codes, _half(blocks, 208).float() * small.float())


def _unpack_iq4_xs(blocks: Tensor) -> Fields:
    """d, high bits of 8 scales (2 bytes), low bits (4), codes (128). Stored scales are 32 too large."""
    low = (blocks[..., 4:8, None] >> torch.tensor([0, 4], dtype=torch.uint8) & 15).flatten(-2)
    high = (blocks[..., 2:4, None] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8) & 3).flatten(-2)
    scales = _half(blocks, 0).float() * ((low | high << 4).float() - 32)
    return Fields(_nibbles(blocks[..., 8:], 8), scales)


TYPES = {
    block.name: block
    for block in (
        BlockType("q4_0", 32, 18, "W4A16_g32", _unpack_q4_0, 8, _pack_q4_0),
        BlockType("q4_1", 32, 20, "W4A16_g32_asym", _unpack_q4_1, 0, _pack_q4_1),
        BlockType("q5_0", 32, 22, "W5A16_g32", _unpack_q5_0, 16, _pack_q5_0),
        BlockType("q5_1", 32, 24, "W5A16_g32_asym", _unpack_q5_1, 0, _pack_q5_1),
        BlockType("q8_0", 32, 34, "W8A16_g32", _unpack_q8_0, 128, _pack_q8_0),
        BlockType("iq4_nl", 32, 18, "Wiq4nlA16", _unpack_q4_0, 0, _pack_q4_0),
        BlockType("q2_k", QK_K, 84, "W2A16_g16_asym", _unpack_q2_k),
        BlockType("q3_k", QK_K, 110, "W3A16_g16", _unpack_q3_k, 4),
        BlockType("q4_k", QK_K, 144, "W4A16_g32_asym", _unpack_q4_k),
        BlockType("q5_k", QK_K, 176, "W5A16_g32_asym", _unpack_q5_k),
        BlockType("q6_k", QK_K, 210, "W6A16_g16", _unpack_q6_k, 32),
        BlockType("iq4_xs", QK_K, 136, "Wiq4nlA16", _unpack_iq4_xs),
    )
}
"""Types by layout name, which is the GGUF name in lower case."""
