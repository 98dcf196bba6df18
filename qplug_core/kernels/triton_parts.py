# mypy: ignore-errors
# Triton's language is not Python's types: these functions are compiled, never called.
"""Device functions that Triton kernels are composed of: what the bits of a code mean, what the bits of a scale mean, stores.

Every conversion is exact: a code becomes the 16-bit float of the same value, and its scale multiplies the float32 partial sum. Branches
on constants end in one return, because Triton compiles what follows an early one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def field(low, high, ones, PART: tl.constexpr, BITS: tl.constexpr):
    """The codes of one part of a unit, unsigned, from its bytes ``[BN, S]``.

    8, 4, 2 bits: ``low`` holds 1, 2, 4 parts, the first in the lowest bits. 3 bits: ``low`` and ``high`` hold two bits of parts 0 to 3
    and 4 to 7, ``ones`` the third bit of all eight.
    """
    if BITS == 8:
        codes = low
    elif BITS == 3:
        two = ((low if PART < 4 else high) >> (2 * (PART % 4))) & 3
        codes = two | (((ones >> PART) & 1) << 2)
    else:
        codes = (low >> (PART * BITS)) & ((1 << BITS) - 1)
    return codes


@triton.jit
def integers(codes, zero, BITS: tl.constexpr, dtype: tl.constexpr):
    """``codes - zero`` as 16-bit floats: uint8 codes, ``zero`` a whole number, float32, a scalar or ``[BN, 1]``.

    No conversion from integers: the bits of a code below the leading bits of 1024 (float16) or 128 (bfloat16) are that float plus
    the code. Exact for differences up to 256.
    """
    wide = codes.to(tl.uint16)
    if dtype == tl.bfloat16 and BITS < 8:
        values = (wide | 0x4300).to(tl.bfloat16, bitcast=True) - (zero + 128.0).to(tl.bfloat16)
    else:
        values = ((wide | 0x6400).to(tl.float16, bitcast=True) - (zero + 1024.0).to(tl.float16)).to(dtype)
    return values


@triton.jit
def e4m3(codes):
    """float16 of FP8 e4m3fn bytes, exact. NaN bytes read as 480: packing moves them into the scale.

    The seven bits below the sign are those of a float16 that is 256 times too small, subnormal numbers among them.
    """
    wide = codes.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def e5m2(codes):
    """float16 of FP8 e5m2 bytes, exact: the upper byte of a float16."""
    return (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True)


@triton.jit
def e2m1(codes):
    """float16 of FP4 e2m1 codes 0 to 15, exact: the bits of a float16 that is 2**14 times too small."""
    wide = codes.to(tl.uint16)
    return (((wide & 0x8) << 12) | ((wide & 0x7) << 9)).to(tl.float16, bitcast=True) * 16384.0


@triton.jit
def looked_up(codes, table):
    """float32 values of 4-bit codes from a table of 16 in memory, without a gather: four levels of selections."""
    c = codes.to(tl.int32)
    b0, b1, b2, b3 = (c & 1) != 0, (c & 2) != 0, (c & 4) != 0, (c & 8) != 0
    low = tl.where(
        b2,
        tl.where(
            b1, tl.where(b0, tl.load(table + 7), tl.load(table + 6)), tl.where(b0, tl.load(table + 5), tl.load(table + 4))
        ),
        tl.where(b1, tl.where(b0, tl.load(table + 3), tl.load(table + 2)), tl.where(b0, tl.load(table + 1), tl.load(table))),
    )
    high = tl.where(
        b2,
        tl.where(
            b1,
            tl.where(b0, tl.load(table + 15), tl.load(table + 14)),
            tl.where(b0, tl.load(table + 13), tl.load(table + 12)),
        ),
        tl.where(
            b1, tl.where(b0, tl.load(table + 11), tl.load(table + 10)), tl.where(b0, tl.load(table + 9), tl.load(table + 8))
        ),
    )
    return tl.where(b3, high, low)


@triton.jit
def weight_values(codes, zero, table, KIND: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Codes ``[BN, S]`` uint8 as values in ``dtype``, without their scale.

    ``KIND``: ``int`` (whole zero points), ``real`` (zero points of any value), ``e4m3``, ``e5m2``, ``e2m1`` or ``table``.
    """
    if KIND == "int":
        values = integers(codes, zero, BITS, dtype)
    elif KIND == "real":
        values = codes.to(tl.float32) - zero
    elif KIND == "e4m3":
        values = e4m3(codes)
    elif KIND == "e5m2":
        values = e5m2(codes)
    elif KIND == "e2m1":
        values = e2m1(codes)
    else:
        values = looked_up(codes, table)
    return values.to(dtype)


@triton.jit
def scale_values(stored, SCALE: tl.constexpr):
    """Stored scales as float32. ``SCALE``: ``float`` (any float dtype), or bytes of ``e8m0`` or ``e4m3``.

    E8M0 byte b is 2**(b - 127), 255 is NaN (OCP Microscaling Formats 1.0, 5.4.1); byte 0 is subnormal in float32.
    """
    if SCALE == "e8m0":
        byte = stored.to(tl.int32)
        bits = tl.where(byte == 0, 0x00400000, tl.where(byte == 255, 0x7FC00000, byte << 23))
        values = bits.to(tl.float32, bitcast=True)
    elif SCALE == "e4m3":
        values = tl.where((stored & 0x7F) == 0x7F, float("nan"), e4m3(stored).to(tl.float32))
    else:
        values = stored.to(tl.float32)
    return values


@triton.jit
def round_even(x):
    """float32 to the nearest whole number, ties to even, for magnitudes below 2**22: beyond 2**23 a float32 has no fraction bits."""
    return (x + 12582912.0) - 12582912.0
