"""Random weights of any scheme: what benchmarks and the conformance kit feed to formats and kernels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .quantizer import codebook_of
from .scheme import NUMBER_TYPES, QuantScheme
from .weight import QuantWeight, code_dtype


def random_weight(
    scheme: QuantScheme,
    n: int,
    k: int,
    generator: torch.Generator | None = None,
    *,
    scale_dtype: torch.dtype = torch.float32,
    zeros: tuple[int, int] | None = None,
) -> QuantWeight:
    """A weight ``[n, k]`` with random codes, scales of one order of magnitude, and every field that ``scheme`` needs.

    ``scale_dtype``: of stored float scales. ``zeros``: the range ``(low, high)`` of zero points, both ends included;
    ``(0, 2**bits - 1)`` where it is not said. With act order, every group has its share of columns, in random order.

    :raises ValueError: for a scheme that is no affine weight (``ccq2``), or that has no weight part.
    """
    part = scheme.weight
    if part is None or part.dtype == "ccq2":
        raise ValueError(f"scheme {scheme} has no weights that random codes could be drawn for")
    bn, bk = part.block
    grid = (-(-n // bn) if bn else 1, -(-k // bk) if bk else 1)
    high = 2**part.bits - 1
    integer_zeros = None
    if not part.symmetric:
        low, top = zeros or (0, high)
        integer_zeros = torch.randint(low, top + 1, grid, generator=generator, dtype=torch.int16)
    index = None
    if scheme.act_order and bk and grid[1] > 1:
        positions = torch.arange(k, dtype=torch.int32) // bk
        index = positions[torch.randperm(k, generator=generator)]
    # With one group there is no order: the hub's weight says so.
    scheme = replace(scheme, act_order=index is not None)
    codes = _codes(part.dtype, part.symmetric, (n, k), generator)
    if scheme.sparsity:
        # Two of every four columns are zero; every number type has its zero as a byte of zeros.
        bits = torch.int16 if codes.itemsize == 2 else torch.uint8
        codes.view(bits)[:, torch.arange(k) % 4 >= 2] = 0
    act = scheme.act
    act_scale = act_zero = None
    if act is not None and act.dynamic is not True:
        act_scale = torch.rand((), generator=generator) * 0.02 + 0.01
        act_zero = torch.tensor(-7, dtype=torch.int16) if not act.symmetric else None
    return QuantWeight(
        scheme,
        codes,
        _scales(part.scale_dtype, grid, scale_dtype, generator),
        part.block,
        zeros=integer_zeros,
        global_scale=torch.tensor(0.037) if part.scale_dtype == "e4m3" else None,
        group_index=index,
        codebook=codebook_of(part.dtype),
        act_scale=act_scale,
        act_zero=act_zero,
    )


def _codes(dtype: str, symmetric: bool, shape: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    number = NUMBER_TYPES[dtype]
    if number.kind == "float":
        values = torch.randn(shape, generator=generator).clamp(-3, 3) * (number.largest / 4)
        return values.to(code_dtype(dtype, symmetric))
    codes = torch.randint(0, 2**number.bits, shape, generator=generator, dtype=torch.uint8)
    if number.kind == "int" and symmetric:
        # In uint8 this wraps round, which is the two's complement that is wanted.
        return codes.sub_(2 ** (number.bits - 1)).view(torch.int8)
    return codes


def _scales(kind: str, grid: tuple[int, int], dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    if kind == "e8m0":
        return torch.randint(118, 126, grid, generator=generator, dtype=torch.uint8)
    values = torch.rand(grid, generator=generator) + 0.5
    return values.mul_(16).to(torch.float8_e4m3fn) if kind == "e4m3" else values.mul_(0.01).to(dtype)
