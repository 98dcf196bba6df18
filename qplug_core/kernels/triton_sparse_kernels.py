# mypy: ignore-errors
# Triton's language is not Python's types: these functions are compiled, never called.
"""Products of 2:4 sparse weights and 8-bit activation codes in Triton. The layout is in ``triton_sparse.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_experts_kernels import _expert


@triton.jit(do_not_specialize=["m", "count", "splits"])
def sparse_gemm(
    y, x, x_scales, x_zeros, values, places, w_scales, sums, bias, ends, m, n, units, count, splits,
    SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """``y [m, n]``, or with SPLIT float32 partial sums ``[splits, m, n]``, of codes ``x [m, units * 256]`` int8 or FP8, in packed order;
    with ``ends``, of experts.

    Transposed as all products here. A part of the dense weight, one of every four columns, is made in registers from the two values that
    are kept of each four, so that memory holds 5 bits of 8 and the matrix unit multiplies dense tiles.
    """
    S: tl.constexpr = 32
    dtype: tl.constexpr = x.dtype.element_ty
    ACC: tl.constexpr = tl.int32 if dtype == tl.int8 else tl.float32
    if ends is not None:
        expert, skip, m = _expert(ends, count, BM, E)
        if expert >= count:
            return
        y += skip * n
        x += skip * units * (8 * S)
        x_scales += skip
        values += expert * n * units * (4 * S)
        places += expert * n * units * S
        w_scales += expert * n
        if x_zeros is not None:
            x_zeros += skip
            sums += expert * n
        if bias is not None:
            bias += expert * n
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    r = tl.arange(0, S)
    share = tl.cdiv(units, splits)
    first = tl.program_id(2) * share
    # Rows and tokens beyond the end repeat the last: their sums are not stored, and no load needs a mask.
    row = tl.minimum(rn, n - 1).to(tl.int64)[:, None] * units
    tokens = tl.minimum(rm, m - 1).to(tl.int64)[None, :] * units * (8 * S)
    acc = tl.zeros((BN, BM), ACC)
    for u in range(first, tl.minimum(first + share, units)):
        both = tl.load(places + (row + u) * S + r[None, :])
        for half in tl.static_range(2):
            left = tl.load(values + (row + u) * (4 * S) + half * 2 * S + r[None, :])
            right = tl.load(values + (row + u) * (4 * S) + (half * 2 + 1) * S + r[None, :])
            for j in tl.static_range(4):
                w = tl.where(((both >> (4 * half)) & 3) == j, left, tl.where(((both >> (4 * half + 2)) & 3) == j, right, 0))
                xt = tl.load(x + tokens + (u * (8 * S) + (half * 4 + j) * S + r)[:, None])
                # Hopper adds FP8 products with 14 bits; after every part the sum moves to float32.
                acc = tl.dot(w.to(tl.uint8).to(dtype, bitcast=True), xt, acc, max_num_imprecise_acc=S, out_dtype=ACC)
    total = acc.to(tl.float32)
    # One condition is settled at compile time and one is not, so that they cannot be joined.
    if x_zeros is not None:  # noqa: SIM102
        if tl.program_id(2) == 0:
            zero = tl.load(x_zeros + rm, mask=rm < m, other=0.0)
            total -= tl.load(sums + rn, mask=rn < n, other=0).to(tl.float32)[:, None] * zero[None, :]
    total *= tl.load(w_scales + rn, mask=rn < n, other=0.0)[:, None]
    total *= tl.load(x_scales + rm, mask=rm < m, other=0.0)[None, :]
    if bias is not None and not SPLIT:
        total += tl.load(bias + rn, mask=rn < n, other=0.0).to(tl.float32)[:, None]
    if SPLIT:
        y += tl.program_id(2).to(tl.int64) * m * n
    inside = (rn[:, None] < n) & (rm[None, :] < m)
    tl.store(y + rm[None, :].to(tl.int64) * n + rn[:, None], total.to(y.dtype.element_ty), mask=inside)
