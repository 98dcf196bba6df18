# mypy: ignore-errors
# Triton's language is not Python's types: these functions are compiled, never called.
"""Products of narrow weights and 8-bit activation codes in Triton. The layout is in ``triton_mixed.py``.

Computed transposed, as ``triton_weight_only_kernels.py``; a weight becomes the 8-bit number of the same value, so that the matrix unit
for 8 bits multiplies it, and the scale of its group multiplies the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_parts import e2m1, integers, scale_values
from .triton_weight_only_kernels import _zero


@triton.jit
def _narrow(codes, zero, KIND: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Unsigned codes ``[BN, S]`` as int8 or FP8 of the same value, exact.

    ``KIND``: ``int``, less the zero points ``[BN, 1]``; ``real``, less the middle of the range for 8 bits, which leaves the rest of the
    zero points to :func:`_folded`; ``e2m1``.
    """
    if KIND == "e2m1":
        values = e2m1(codes).to(dtype)
    elif dtype == tl.int8:
        less = zero.to(tl.int16) if KIND == "int" else tl.full((1, 1), 128 if BITS == 8 else 0, tl.int16)
        values = (codes.to(tl.int16) - less).to(tl.int8)
    elif KIND == "int":
        values = integers(codes, zero, BITS, tl.float16).to(dtype)
    else:
        values = integers(codes, tl.full((1, 1), 0.0, tl.float32), BITS, tl.float16).to(dtype)
    return values


@triton.jit
def _folded(
    part,
    sums,
    zero,
    scales,
    group,
    rn,
    n,
    ROWS: tl.constexpr,
    ns,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """The sum of one group ``[BN, BM]`` as float32, less what zero points owe, times its scale."""
    total = part.to(tl.float32)
    if KIND == "real":
        total -= (zero - (128.0 if BITS == 8 else 0.0)) * sums.to(tl.float32)[None, :]
    if scales is not None:
        total *= scale_values(tl.load(scales + group * ns + rn // ROWS, mask=rn < n, other=0), SCALE)[:, None]
    return total


@triton.jit(do_not_specialize=["m", "splits"])
def mixed_gemm(
    y, x, x_scales, codes, scales, zeros, row, bias, m, n, units, splits, x_stride, code_stride,
    KIND: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    S: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """``y [m, n]``, or with SPLIT float32 partial sums ``[splits, m, n]``: program (i, j, s) does BN rows, BM tokens, every s-th share of units.

    ``x [m, x_stride]`` int8 or FP8, ``x_scales [m]`` float32; ``codes``, ``scales``, ``zeros``, ``row`` as in ``triton_weight_only.py``.
    """
    P: tl.constexpr = 8 // BITS
    U: tl.constexpr = S * P
    UB: tl.constexpr = U * BITS // 8
    # A group ends with a unit, with a part of one, or not before the row does.
    WHOLE: tl.constexpr = GROUP > 0 and GROUP % U == 0
    PARTS: tl.constexpr = GROUP > 0 and GROUP % U != 0
    dtype: tl.constexpr = x.dtype.element_ty
    ACC: tl.constexpr = tl.int32 if dtype == tl.int8 else tl.float32
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    share = tl.cdiv(units, splits)
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, units)
    ns = tl.cdiv(n, ROWS)
    r = tl.arange(0, S)
    # Rows and tokens beyond the end repeat the last: their sums are not stored, and no load needs a mask.
    at = tl.minimum(rn, n - 1).to(tl.int64)[:, None] * code_stride
    tokens = tl.minimum(rm, m - 1).to(tl.int64)[None, :] * x_stride
    acc = tl.zeros((BN, BM), tl.float32)
    part = tl.zeros((BN, BM), ACC)
    sums = tl.zeros((BM,), ACC)
    zero = _zero(zeros, 0, rn, n, ROWS, ns, OFFSET)
    for u in range(first, last):
        low = tl.load(codes + at + u * UB + r[None, :])
        if WHOLE:
            part = tl.zeros((BN, BM), ACC)
            sums = tl.zeros((BM,), ACC)
            zero = _zero(zeros, u * U // GROUP, rn, n, ROWS, ns, OFFSET)
        for i in tl.static_range(P):
            xt = tl.load(x + tokens + (u * U + i * S + r)[:, None])
            if PARTS:
                part = tl.zeros((BN, BM), ACC)
                sums = tl.zeros((BM,), ACC)
                zero = _zero(zeros, (u * U + i * S) // GROUP, rn, n, ROWS, ns, OFFSET)
            w = _narrow((low >> (i * BITS)) & ((1 << BITS) - 1), zero, KIND, BITS, dtype)
            # Hopper adds FP8 products with 14 bits; after every part the sum moves to float32.
            part = tl.dot(w, xt, part, max_num_imprecise_acc=S, out_dtype=ACC)
            if KIND == "real":
                sums += tl.sum(xt.to(ACC), 0)
            if PARTS:
                acc += _folded(part, sums, zero, scales, (u * U + i * S) // GROUP, rn, n, ROWS, ns, KIND, BITS, SCALE)
        if WHOLE:
            acc += _folded(part, sums, zero, scales, u * U // GROUP, rn, n, ROWS, ns, KIND, BITS, SCALE)
    if GROUP == 0:
        acc = _folded(part, sums, zero, None, 0, rn, n, ROWS, ns, KIND, BITS, SCALE)
    acc *= tl.load(x_scales + rm, mask=rm < m, other=0.0)[None, :]
    if row is not None:
        acc *= tl.load(row + rn, mask=rn < n, other=0.0)[:, None]
    if bias is not None and not SPLIT:
        acc += tl.load(bias + rn, mask=rn < n, other=0.0).to(tl.float32)[:, None]
    if SPLIT:
        y += tl.program_id(2).to(tl.int64) * m * n
    inside = (rn[:, None] < n) & (rm[None, :] < m)
    tl.store(y + rm[None, :].to(tl.int64) * n + rn[:, None], acc.to(y.dtype.element_ty), mask=inside)
