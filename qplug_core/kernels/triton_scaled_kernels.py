# mypy: ignore-errors
# Triton's language is not Python's types: these functions are compiled, never called.
"""Products of 8-bit codes in Triton, and the quantization of activations. The layout is in ``triton_scaled.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_parts import round_even


@triton.jit(do_not_specialize=["m", "stored_stride"])
def quantize_rows(
    codes, scales, zeros, x, scale, zero, m, k, width, x_stride, code_stride, stored_stride,
    KIND: tl.constexpr, SYMMETRIC: tl.constexpr, DIVISOR: tl.constexpr, LOWEST: tl.constexpr, BOUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, g): codes and scale of the columns ``g * width`` and on of token i, in float32.

    ``codes [m, code_stride]``: zero beyond the columns of x. ``scales [groups, m]``, ``zeros [m]`` float32. ``scale``, ``zero``: the stored
    ones, or None; ``stored_stride`` apart from token to token, 0 for one of all. ``KIND``: int8, fp8, or fnuz, whose codes are of half
    the value with twice the scale, which is the same number.
    DIVISOR: of amax; LOWEST: the lowest integer code; BOUND: amax is at most this, 0 for none.
    """
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    start = group * width
    stop = tl.where(group == tl.num_programs(1) - 1, code_stride, start + width)
    r = tl.arange(0, BLOCK)
    row = x + token * x_stride
    high = tl.zeros((BLOCK,), tl.float32)
    low = tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for at in range(start, stop, BLOCK):
        inside = (at + r < stop) & (at + r < k)
        value = tl.load(row + at + r, mask=inside, other=0.0).to(tl.float32)
        bad |= (value != value).to(tl.int32)
        high = tl.maximum(high, value)
        low = tl.minimum(low, value)
    top = tl.max(high, 0)
    bottom = tl.min(low, 0)
    z = 0.0
    if scale is not None:
        s = tl.load(scale + token * stored_stride)
        if zero is not None:
            z = tl.load(zero + token * stored_stride)
    elif SYMMETRIC:
        amax = tl.maximum(top, -bottom)
        if BOUND > 0:
            amax = tl.minimum(amax, BOUND)
        s = tl.div_rn(amax, DIVISOR)
    else:
        s = tl.div_rn(top - bottom, DIVISOR)
    divisor = tl.where(s == 0.0, 1.0, s)
    if scale is None and not SYMMETRIC:
        z = round_even(-128.0 - tl.div_rn(bottom, divisor))
        z = tl.minimum(tl.maximum(z, -128.0), 127.0)
    for at in range(start, stop, BLOCK):
        value = tl.load(row + at + r, mask=(at + r < stop) & (at + r < k), other=0.0).to(tl.float32)
        scaled = tl.div_rn(value, tl.zeros((BLOCK,), tl.float32) + divisor)
        if KIND == "int8":
            scaled = tl.minimum(tl.maximum(scaled + z, -512.0), 512.0)
            code = tl.minimum(tl.maximum(round_even(scaled), LOWEST), 127.0)
        else:
            code = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
            if KIND == "fnuz":
                code = code * 0.5
        tl.store(codes + token * code_stride + at + r, code.to(codes.dtype.element_ty), mask=at + r < stop)
    if KIND == "fnuz":
        s = s * 2.0
    # A NaN has no integer code: the scale says it, and the whole result of the token is NaN, as it must be.
    s = tl.where(tl.max(bad, 0) > 0, float("nan"), s)
    tl.store(scales + group.to(tl.int64) * m + token, s)
    if zeros is not None:
        tl.store(zeros + token, z)


@triton.jit(do_not_specialize=["m", "splits", "scale_stride"])
def scaled_gemm(
    y, x, x_scales, x_zeros, w, w_scales, sums, bias, m, n, k, splits, scale_stride,
    ACC: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``y [m, n]``, or with SPLIT float32 partial sums ``[splits, m, n]``, of 8-bit codes ``x [m, k]`` and ``w [n, k]``, k a multiple of BK.

    Computed transposed, for few tokens. GROUP 0: ``x_scales [m]`` and ``w_scales [n]`` multiply at the end, and the zero points of
    tokens meet the sums of codes of rows; otherwise ``x_scales [groups, scale_stride]`` and ``w_scales [groups, n / ROWS]`` multiply each
    partial sum.
    """
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    rk = tl.arange(0, BK)
    share = tl.cdiv(k // BK, splits) * BK
    first = tl.program_id(2) * share
    # Rows and tokens beyond the end repeat the last: their sums are not stored, and no load needs a mask.
    wp = w + tl.minimum(rn, n - 1).to(tl.int64)[:, None] * k + rk[None, :]
    xp = x + tl.minimum(rm, m - 1).to(tl.int64)[None, :] * k + rk[:, None]
    ns = tl.cdiv(n, ROWS)
    acc = tl.zeros((BN, BM), ACC if GROUP == 0 else tl.float32)
    for at in range(first, tl.minimum(first + share, k), BK):
        wt = tl.load(wp + at)
        xt = tl.load(xp + at)
        if GROUP == 0:
            # Hopper adds FP8 products with 14 bits; every BK columns the sum moves to float32.
            acc = tl.dot(wt, xt, acc, max_num_imprecise_acc=BK, out_dtype=ACC)
        else:
            group = at // GROUP
            part = tl.dot(wt, xt, out_dtype=ACC).to(tl.float32)
            ws = tl.load(w_scales + group * ns + rn // ROWS, mask=rn < n, other=0.0)
            xs = tl.load(x_scales + group.to(tl.int64) * scale_stride + rm, mask=rm < m, other=0.0)
            acc += part * ws[:, None] * xs[None, :]
    total = acc.to(tl.float32)
    if GROUP == 0:
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
