# mypy: ignore-errors
# Triton's language is not Python's types: these functions are compiled, never called.
"""Products of all experts of a layer in one launch each, in Triton: tokens sorted by expert, packed tensors with E in front.

A program looks up which expert its block of tokens belongs to, moves every pointer there, and is a program of the plain kernel from then on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_mixed_kernels import mixed_gemm
from .triton_scaled_kernels import scaled_gemm
from .triton_weight_only_kernels import weight_only_gemm


@triton.jit
def _expert(ends, count, BM: tl.constexpr, E: tl.constexpr):
    """Of this program's block of tokens: its expert (``count`` or more where there is none), and its first and last row.

    Blocks are counted expert by expert, and an expert without tokens has none. ``ends [count]`` int64: where the rows of each end. E: a
    power of two, at least count.
    """
    i = tl.arange(0, E)
    block = tl.program_id(1)
    stop = tl.load(ends + i, mask=i < count, other=0).to(tl.int32)
    start = tl.load(ends + i - 1, mask=(i > 0) & (i < count), other=0).to(tl.int32)
    blocks = tl.where(i < count, tl.cdiv(stop - start, BM), 0)
    before = tl.cumsum(blocks, 0)
    expert = tl.sum((before <= block).to(tl.int32), 0)
    row = tl.sum(tl.where(i == expert, start + (block - before + blocks) * BM, 0), 0)
    last = tl.sum(tl.where(i == expert, stop, 0), 0)
    # The plain kernel counts rows from the first block on, so pointers stand that far before the row.
    skip = (row - block * BM).to(tl.int64)
    return expert.to(tl.int64), skip, last - row + block * BM


@triton.jit(do_not_specialize=["count"])
def weight_only_experts(
    y, x, codes, scales, zeros, row, table, order, bias, ends, count, n, k, units, x_stride, code_stride,
    codes_e, grid_e, order_e,
    KIND: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    S: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """``y [T, n]`` of ``x [T, k]``; the others as in :func:`.weight_only_gemm`. ``codes_e``, ``grid_e``, ``order_e``: elements of one expert."""
    expert, skip, m = _expert(ends, count, BM, E)
    if expert >= count:
        return
    codes += expert * codes_e
    if scales is not None:
        scales += expert * grid_e
    if zeros is not None:
        zeros += expert * grid_e
    if row is not None:
        row += expert * n
    if table is not None:
        table += expert * 16
    if order is not None:
        order += expert * order_e
    if bias is not None:
        bias += expert * n
    weight_only_gemm(
        y + skip * n, x + skip * x_stride, codes, scales, zeros, row, table, order, bias, m, n, k, units, 1, x_stride, code_stride,
        KIND, BITS, OFFSET, SCALE, GROUP, ROWS, S, False, BN, BM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def mixed_experts(
    y, x, x_scales, codes, scales, zeros, row, bias, ends, count, n, units, x_stride, code_stride, codes_e, grid_e,
    KIND: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    S: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """``y [T, n]`` of ``x [T, x_stride]``; the others as in :func:`.mixed_gemm`. ``codes_e``, ``grid_e``: elements of one expert."""
    expert, skip, m = _expert(ends, count, BM, E)
    if expert >= count:
        return
    codes += expert * codes_e
    if scales is not None:
        scales += expert * grid_e
    if zeros is not None:
        zeros += expert * grid_e
    if row is not None:
        row += expert * n
    if bias is not None:
        bias += expert * n
    mixed_gemm(
        y + skip * n, x + skip * x_stride, x_scales + skip, codes, scales, zeros, row, bias, m, n, units, 1, x_stride, code_stride,
        KIND, BITS, OFFSET, SCALE, GROUP, ROWS, S, False, BN, BM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "scale_stride"])
def scaled_experts(
    y, x, x_scales, x_zeros, w, w_scales, sums, bias, ends, count, n, k, scale_stride, codes_e, grid_e,
    ACC: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """``y [T, n]`` of codes ``x [T, k]``; the others as in :func:`.scaled_gemm`. ``codes_e``, ``grid_e``: elements of one expert."""
    expert, skip, m = _expert(ends, count, BM, E)
    if expert >= count:
        return
    w += expert * codes_e
    w_scales += expert * grid_e
    if x_zeros is not None:
        x_zeros += skip
    if sums is not None:
        sums += expert * n
    if bias is not None:
        bias += expert * n
    scaled_gemm(
        y + skip * n, x + skip * k, x_scales + skip, x_zeros, w, w_scales, sums, bias, m, n, k, 1, scale_stride,
        ACC, GROUP, ROWS, False, BN, BM, BK,
    )  # fmt: skip
