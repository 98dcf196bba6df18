# mypy: ignore-errors
# Triton's language is not Python's types: these functions are compiled, never called.
"""Products of WINT2 weights, a convolutional code, and 16-bit activations in Triton. The layout is in ``triton_wint2.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from qplug_core.kernels.triton_experts_kernels import _expert


@triton.jit(do_not_specialize=["m", "count", "splits"])
def wint2_gemm(
    y, x, codes, local, row, slope, offset, bias, ends, m, n, k, count, splits, x_stride,
    SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """``y [m, n]``, or with SPLIT float32 partial sums ``[splits, m, n]``, transposed as all products here; with ``ends``, of sorted experts.

    ``x [m, k]``: of each 64 columns first those of the first value of a byte, then of the second. ``codes [n, k / 4]`` uint8, ``local``
    ``[k / 128, n]`` uint8, the rest float32 ``[n]``. To be compiled without fused multiply-add, which another code might come out of.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    if ends is not None:
        expert, skip, m = _expert(ends, count, BM, E)
        if expert >= count:
            return
        y += skip * n
        x += skip * x_stride
        codes += expert * n * (k // 4)
        local += expert * n * (k // 128)
        row += expert * n
        slope += expert * n
        offset += expert * n
        if bias is not None:
            bias += expert * n
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    r = tl.arange(0, 16)
    groups = k // 64
    share = tl.cdiv(groups, splits)
    first = tl.program_id(2) * share
    # Rows and tokens beyond the end repeat the last: their sums are not stored, and no load of theirs needs a mask.
    held = tl.minimum(rn, n - 1)
    at = held.to(tl.int64)[:, None] * (k // 4)
    tokens = tl.minimum(rm, m - 1).to(tl.int64)[None, :] * x_stride
    by = tl.load(slope + held)[:, None]
    plus = tl.load(offset + held)[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for g in range(first, tl.minimum(first + share, groups)):
        byte = tl.load(codes + at + g * 16 + r[None, :])
        code = tl.floor(byte.to(tl.float32) * by + plus + 0.5).to(tl.int32)
        part = tl.zeros((BN, BM), tl.float32)
        for j in tl.static_range(4):
            value = ((code >> (9 - 3 * j)) & 63) - 32
            xt = tl.load(x + tokens + (g * 64 + j * 16 + r)[:, None])
            part = tl.dot(value.to(tl.float32).to(dtype), xt, part)
        pair = tl.load(local + (g // 2) * n + held).to(tl.int32)
        scale = tl.where(g % 2 == 0, pair >> 4, pair & 15)
        acc += part * scale.to(tl.float32)[:, None]
    acc *= tl.load(row + held)[:, None]
    if bias is not None and not SPLIT:
        acc += tl.load(bias + held).to(tl.float32)[:, None]
    if SPLIT:
        y += tl.program_id(2).to(tl.int64) * m * n
    inside = (rn[:, None] < n) & (rm[None, :] < m)
    tl.store(y + rm[None, :].to(tl.int64) * n + rn[:, None], acc.to(y.dtype.element_ty), mask=inside)
