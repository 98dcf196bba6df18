# mypy: ignore-errors
# Triton's language is not Python's types: these functions are compiled, never called.
"""Products of microscaled FP4 and FP8 on matrix units that take block scales, in Triton. The layout is in ``triton_microscaled.py``.

Computed transposed, as ``triton_weight_only_kernels.py``: on sm_100 the weights must fill a side of 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_experts_kernels import _expert
from .triton_parts import e2m1, scale_values


@triton.jit
def _nearest(x):
    """Codes uint8 of the FP4 e2m1 numbers nearest to float32 x: ties take the even code, and beyond 6 it is 6."""
    a = tl.abs(x)
    low = (a > 0.25).to(tl.uint8) + (a >= 0.75).to(tl.uint8) + (a > 1.25).to(tl.uint8) + (a >= 1.75).to(tl.uint8)
    high = (a > 2.5).to(tl.uint8) + (a >= 3.5).to(tl.uint8) + (a > 5.0).to(tl.uint8)
    return (low + high) | ((x < 0.0).to(tl.uint8) << 3)


@triton.jit
def _power(amax, RULE: tl.constexpr, FP4: tl.constexpr):
    """E8M0 bytes int32 of block extremes float32, by the rules of ``qplug_core/reference/activation.py``."""
    safe = tl.where(amax == 0.0, 1.0, amax)
    if RULE == "ceil":
        safe = tl.div_rn(safe, tl.zeros_like(safe) + (6.0 if FP4 else 448.0))
    elif RULE == "even" or RULE == "ct":
        leading = (safe.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        safe += leading * (0.0625 if RULE == "even" and not FP4 else 0.25)
    bits = safe.to(tl.int32, bitcast=True)
    byte = bits >> 23
    if RULE == "ceil" or RULE == "up":
        byte += ((bits & 0x7FFFFF) != 0).to(tl.int32)
    if RULE != "ceil":
        byte -= 2 if FP4 else 8
    return tl.where(amax == 0.0, 0, tl.minimum(tl.maximum(byte, 0), 254))


@triton.jit(do_not_specialize=["k", "outer_stride"])
def microscale_rows(
    codes, scales, x, outer, k, columns, x_stride, outer_stride,
    G: tl.constexpr, FP4: tl.constexpr, RULE: tl.constexpr, DIVIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, j): codes and scales of the columns ``j * BLOCK`` and on of token i, in float32.

    ``codes [m, columns]`` FP8, or two FP4 to a byte ``[m, columns / 2]``, zero beyond the ``k`` columns of x; ``scales [m, columns / G]``.
    ``outer``: the stored float32 scale of two-level scales, ``outer_stride`` apart from token to token, or None for E8M0 scales by RULE.
    """
    token = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    at = start + tl.arange(0, BLOCK)
    value = tl.load(x + token * x_stride + at, mask=at < k, other=0.0).to(tl.float32)
    value = tl.reshape(value, (BLOCK // G, G))
    bad = tl.max((value != value).to(tl.int32), 1) > 0
    amax = tl.max(tl.where(value == value, tl.abs(value), 0.0), 1)
    if outer is not None:
        o = tl.zeros_like(amax) + tl.load(outer + token * outer_stride)
        inner = tl.div_rn(amax, tl.zeros_like(amax) + 6.0)
        inner = inner * o if DIVIDE else tl.div_rn(inner, o)
        inner = tl.where(bad, float("nan"), tl.minimum(tl.maximum(inner, 0.001953125), 448.0))
        stored = inner.to(tl.float8e4nv)
        factor = tl.div_rn(stored.to(tl.float32), o) if DIVIDE else stored.to(tl.float32) * o
    else:
        byte = _power(amax, RULE, FP4)
        factor = tl.where(amax == 0.0, 1.0, scale_values(byte, "e8m0"))
        # The scale carries what no code of FP4 can say.
        stored = tl.where(bad | (amax == float("inf")), 255, byte).to(tl.uint8)
    scaled = tl.div_rn(value, tl.zeros_like(value) + factor[:, None])
    group = start // G + tl.arange(0, BLOCK // G)
    tl.store(scales + token * (columns // G) + group, stored, mask=group < columns // G)
    if FP4:
        low, high = tl.split(tl.reshape(_nearest(scaled), (BLOCK // 2, 2)))
        pair = start // 2 + tl.arange(0, BLOCK // 2)
        tl.store(codes + token * (columns // 2) + pair, low | (high << 4), mask=pair < columns // 2)
    else:
        code = tl.minimum(tl.maximum(tl.reshape(scaled, (BLOCK,)), -448.0), 448.0)
        tl.store(codes + token * columns + at, code.to(tl.float8e4nv), mask=at < columns)


@triton.jit(do_not_specialize=["m", "splits"])
def microscaled_gemm(
    y, x, x_scales, codes, scales, row, bias, m, n, columns, splits,
    G: tl.constexpr, X: tl.constexpr, W: tl.constexpr, WIDEN: tl.constexpr, SPLIT: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``y [m, n]``, or with SPLIT float32 partial sums ``[splits, m, n]``: program (i, j, s) does BN rows, BM tokens, every s-th share of K.

    X, W: ``e2m1``, two to a byte, or ``e4m3``; ``x [m, columns]``, ``codes [n, columns]``, scales of both ``[., columns / G]``; ``row [n]``
    float32. WIDEN: FP4 weights become FP8 in registers, for units that do not mix the two.
    """
    XP: tl.constexpr = 2 if X == "e2m1" else 1
    WP: tl.constexpr = 2 if W == "e2m1" else 1
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    rw = tl.arange(0, BK // WP)
    rx = tl.arange(0, BK // XP)
    rg = tl.arange(0, BK // G)
    share = tl.cdiv(columns // BK, splits)
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, columns // BK)
    # Rows and tokens beyond the end repeat the last: their sums are not stored, and no load needs a mask.
    rows = tl.minimum(rn, n - 1).to(tl.int64)
    tokens = tl.minimum(rm, m - 1).to(tl.int64)
    acc = tl.zeros((BN, BM), tl.float32)
    for u in range(first, last):
        w = tl.load(codes + rows[:, None] * (columns // WP) + (u * (BK // WP) + rw)[None, :])
        xt = tl.load(x + tokens[None, :] * (columns // XP) + (u * (BK // XP) + rx)[:, None])
        sw = tl.load(scales + rows[:, None] * (columns // G) + (u * (BK // G) + rg)[None, :])
        sx = tl.load(x_scales + tokens[:, None] * (columns // G) + (u * (BK // G) + rg)[None, :])
        if WIDEN:
            wide = tl.reshape(tl.join(e2m1(w & 15), e2m1(w >> 4)), (BN, BK)).to(tl.float8e4nv)
            acc = tl.dot_scaled(wide, sw, "e4m3", xt, sx, X, acc)
        else:
            acc = tl.dot_scaled(w, sw, W, xt, sx, X, acc)
    if row is not None:
        acc *= tl.load(row + rn, mask=rn < n, other=0.0)[:, None]
    if bias is not None and not SPLIT:
        acc += tl.load(bias + rn, mask=rn < n, other=0.0).to(tl.float32)[:, None]
    if SPLIT:
        y += tl.program_id(2).to(tl.int64) * m * n
    inside = (rn[:, None] < n) & (rm[None, :] < m)
    tl.store(y + rm[None, :].to(tl.int64) * n + rn[:, None], acc.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def microscaled_experts(
    y, x, x_scales, codes, scales, row, bias, ends, count, n, columns,
    G: tl.constexpr, X: tl.constexpr, W: tl.constexpr, WIDEN: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """``y [T, n]`` of ``x [T, columns]``, with E in front of what belongs to weights; the others as in :func:`microscaled_gemm`."""
    expert, skip, m = _expert(ends, count, BM, E)
    if expert >= count:
        return
    codes += expert * n * (columns // (2 if W == "e2m1" else 1))
    scales += expert * n * (columns // G)
    if row is not None:
        row += expert * n
    if bias is not None:
        bias += expert * n
    microscaled_gemm(
        y + skip * n, x + skip * (columns // (2 if X == "e2m1" else 1)), x_scales + skip * (columns // G), codes, scales, row, bias,
        m, n, columns, 1, G, X, W, WIDEN, False, BN, BM, BK,
    )  # fmt: skip
