# mypy: ignore-errors
# Triton's language is not Python's types: these functions are compiled, never called.
"""Weight-only products in Triton: codes of 2, 3, 4 or 8 bits times 16-bit activations. The layout is in ``triton_weight_only.py``.

The product is computed transposed, ``y^T = W x^T``: weights fill the wide side of a matrix instruction, so that few tokens waste little
of it, and on Hopper decoded weights go from registers into wgmma. Scales multiply float32 partial sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_parts import field, scale_values, weight_values


@triton.jit
def _zero(zeros, group, rn, n, ROWS: tl.constexpr, ns, OFFSET: tl.constexpr):
    """float32 zero points ``[BN, 1]`` of a group; without stored ones the middle of the range."""
    if zeros is None:
        zero = tl.full((1, 1), OFFSET, tl.float32)
    else:
        zero = tl.load(zeros + group * ns + rn // ROWS, mask=rn < n, other=0.0).to(tl.float32)[:, None]
    return zero


@triton.jit
def _bytes(codes, at, S: tl.constexpr, BITS: tl.constexpr):
    """The bytes of one unit of ``BN`` rows: for 3 bits three blocks of S, otherwise one, given three times."""
    r = tl.arange(0, S)
    low = tl.load(codes + at + r[None, :])
    high, ones = low, low
    if BITS == 3:
        high = tl.load(codes + at + S + r[None, :])
        ones = tl.load(codes + at + 2 * S + r[None, :])
    return low, high, ones


@triton.jit(do_not_specialize=["m", "splits"])
def weight_only_gemm(
    y, x, codes, scales, zeros, row, table, order, bias, m, n, k, units, splits, x_stride, code_stride,
    KIND: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    S: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """``y [m, n]``, or with SPLIT float32 partial sums ``[splits, m, n]``: program (i, j, s) does BN rows, BM tokens, every s-th share of units."""
    P: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    U: tl.constexpr = S * P
    UB: tl.constexpr = U * BITS // 8
    # One scale for whole units, or one for each part of a unit.
    WHOLE: tl.constexpr = GROUP > 0 and GROUP % U == 0
    dtype: tl.constexpr = x.dtype.element_ty
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    share = tl.cdiv(units, splits)
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, units)
    ns = tl.cdiv(n, ROWS)
    # Rows beyond the end repeat the last one: their sums are not stored, and no load needs a mask.
    at = tl.minimum(rn, n - 1).to(tl.int64)[:, None] * code_stride
    tokens = tl.minimum(rm, m - 1).to(tl.int64)[None, :] * x_stride
    acc = tl.zeros((BN, BM), tl.float32)
    zero = _zero(zeros, 0, rn, n, ROWS, ns, OFFSET)
    for u in range(first, last):
        low, high, ones = _bytes(codes, at + u * UB, S, BITS)
        if WHOLE:
            part = tl.zeros((BN, BM), tl.float32)
            zero = _zero(zeros, u * U // GROUP, rn, n, ROWS, ns, OFFSET)
        for i in tl.static_range(P):
            rk = u * U + i * S + tl.arange(0, S)
            if order is None:
                xt = tl.load(x + tokens + rk[:, None], mask=rk[:, None] < k, other=0.0)
            else:
                column = tl.load(order + rk)
                xt = tl.load(x + tokens + column[:, None], mask=column[:, None] >= 0, other=0.0)
            if GROUP > 0 and not WHOLE:
                group = (u * U + i * S) // GROUP
                zero = _zero(zeros, group, rn, n, ROWS, ns, OFFSET)
                w = weight_values(field(low, high, ones, i, BITS), zero, table, KIND, BITS, dtype)
                s = scale_values(tl.load(scales + group * ns + rn // ROWS, mask=rn < n, other=0), SCALE)
                acc += tl.dot(w, xt) * s[:, None]
            else:
                w = weight_values(field(low, high, ones, i, BITS), zero, table, KIND, BITS, dtype)
                if GROUP == 0:
                    acc = tl.dot(w, xt, acc)
                else:
                    part = tl.dot(w, xt, part)
        if WHOLE:
            s = scale_values(tl.load(scales + (u * U // GROUP) * ns + rn // ROWS, mask=rn < n, other=0), SCALE)
            acc += part * s[:, None]
    if row is not None:
        acc = acc * tl.load(row + rn, mask=rn < n, other=0.0)[:, None]
    if bias is not None and not SPLIT:
        acc += tl.load(bias + rn, mask=rn < n, other=0.0).to(tl.float32)[:, None]
    inside = (rn[:, None] < n) & (rm[None, :] < m)
    if SPLIT:
        y += tl.program_id(2).to(tl.int64) * m * n
    tl.store(y + rm[None, :].to(tl.int64) * n + rn[:, None], acc.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["total", "splits"])
def sum_splits(y, parts, bias, total, n, splits, BLOCK: tl.constexpr):
    """``y [total]``: the sums over the first axis of ``parts [splits, total]`` float32, always in the same order, plus ``bias [n]``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    acc = tl.zeros((BLOCK,), tl.float32)
    for s in range(splits):
        acc += tl.load(parts + s * total.to(tl.int64) + at, mask=inside, other=0.0)
    if bias is not None:
        acc += tl.load(bias + at % n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["start"])
def weight_only_dequantize(
    w, codes, scales, zeros, row, table, order, start, stop, n, columns, code_stride,
    KIND: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    S: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows ``start`` to ``stop`` of the weight in ``w [stop - start, columns]``, 16 bit, in packed order; padding is zero."""
    P: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    U: tl.constexpr = S * P
    rn = start + tl.program_id(0) * BN + tl.arange(0, BN)
    u = tl.program_id(1)
    ns = tl.cdiv(n, ROWS)
    at = tl.minimum(rn, n - 1).to(tl.int64)[:, None] * code_stride
    low, high, ones = _bytes(codes, at + u * (U * BITS // 8), S, BITS)
    for i in tl.static_range(P):
        rk = u * U + i * S + tl.arange(0, S)
        group = 0 if GROUP == 0 else (u * U + i * S) // GROUP
        zero = _zero(zeros, group, rn, n, ROWS, ns, OFFSET)
        v = weight_values(field(low, high, ones, i, BITS), zero, table, KIND, BITS, w.dtype.element_ty).to(tl.float32)
        if GROUP > 0:
            v = v * scale_values(tl.load(scales + group * ns + rn // ROWS, mask=rn < n, other=0), SCALE)[:, None]
        if row is not None:
            v = v * tl.load(row + rn, mask=rn < n, other=0.0)[:, None]
        if order is not None:
            v = tl.where((tl.load(order + rk) >= 0)[None, :], v, 0.0)
        inside = (rn[:, None] < stop) & (rk[None, :] < columns)
        tl.store(w + (rn - start).to(tl.int64)[:, None] * columns + rk[None, :], v.to(w.dtype.element_ty), mask=inside)
