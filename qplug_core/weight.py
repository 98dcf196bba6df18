"""QuantWeight, the hub: the one value in which every format and every kernel meet.

``dequantize()`` is the only definition of correct. Sharding, fusing and stacking are operations on this value and
are written here, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .errors import SplitRequired
from .scheme import NUMBER_TYPES, QuantScheme

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 4-bit float e2m1 by code; bit 3 is the sign (OCP Microscaling Formats 1.0, table 4)."""

ROW_CHUNK = 512


@dataclass(eq=False)
class QuantWeight:
    """One quantized weight ``[N, K]``, or a stack of E of them ``[E, N, K]``, as plain codes.

    ========== ================= ================================= ==================================================
    field      shape             dtype                             meaning
    ========== ================= ================================= ==================================================
    codes      [*E, N, K]        int8 | uint8 | float8 | 16 bit    int8 if symmetric, uint8 with zeros or a codebook
    scales     [*E, N/bn, K/bk]  as stored                         quotients rounded up; E8M0 scales as their bytes, uint8
    zeros      like scales       int16 | float                     subtracted from codes before scaling
    shift      like scales       float                             subtracted after scaling, in units of the weight
    global_scale [*E] | [*E,N,1] float32                           multiplies the scales, or divides if ``global_div``
    group_index [*E, K]          int32                             scale column of each k (act order)
    codebook   [2**bits]         float32                           value of each code
    pre_scale  [*E, K]           float                             multiplies x before its quantization
    act_shift  [*E, K]           float                             subtracted from x before ``pre_scale`` (OmniQuant)
    act_scale  [*E]              float32                           static activation scale; a divisor if ``act_div``
    act_zero   [*E]              int16                             static activation zero point
    ========== ================= ================================= ==================================================

    The value of a weight is ``(codes - zeros) * scale - shift`` where scale is ``scales`` times (or divided by)
    ``global_scale``. ``block`` (bn, bk) is the extent that shares one scale, 0 for the whole.
    """

    scheme: QuantScheme
    codes: Tensor
    scales: Tensor
    block: tuple[int, int]
    zeros: Tensor | None = None
    shift: Tensor | None = None
    global_scale: Tensor | None = None
    global_div: bool = False
    group_index: Tensor | None = None
    codebook: Tensor | None = None
    pre_scale: Tensor | None = None
    act_shift: Tensor | None = None
    act_scale: Tensor | None = None
    act_div: bool = False
    act_zero: Tensor | None = None

    @property
    def n(self) -> int:
        """Rows, out features."""
        return self.codes.shape[-2]

    @property
    def k(self) -> int:
        """Columns, in features."""
        return self.codes.shape[-1]

    @property
    def experts(self) -> int | None:
        """Length of the stack, None for a plain matrix."""
        return self.codes.shape[0] if self.codes.ndim == 3 else None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as held here (codes are one byte each, whatever their width)."""
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensor fields that are present, by name."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def to(self, device: torch.device | str) -> QuantWeight:
        """The same weight on another device."""
        return self.with_tensors({name: t.to(device) for name, t in self.tensors().items()})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> QuantWeight:
        """The same weight with some tensor fields replaced, by name."""
        changes: dict[str, Any] = dict(tensors)
        return replace(self, **changes)

    def scale_values(self) -> Tensor:
        """Scales as float32 with the global scale applied, in the shape of ``scales``."""
        assert self.scheme.weight is not None
        scales = decode_scales(self.scales, self.scheme.weight.scale_dtype)
        if self.global_scale is None:
            return scales
        factor = self.global_scale.float()
        while factor.ndim < scales.ndim:
            factor = factor.unsqueeze(-1)
        return scales / factor if self.global_div else scales * factor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``[*E, N, K]``: computed in float32, rounded once to ``dtype``. ``pre_scale`` is not folded in."""
        out = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        scales = self.scale_values()
        for start in range(0, self.n, ROW_CHUNK):
            rows = slice(start, min(start + ROW_CHUNK, self.n))
            out[..., rows, :] = self._dequantize_rows(rows, scales)
        return out

    def dequantize_rows(self, rows: Tensor) -> Tensor:
        """float32 rows ``[*rows, K]`` of a plain matrix, for embeddings; ``rows`` is a LongTensor of any shape."""
        flat = rows.reshape(-1)
        scales = self._expand(self.scale_values(), flat)
        values = self._values(self.codes[flat])
        if self.zeros is not None:
            values = values - self._expand(self.zeros, flat).float()
        values = values * scales
        if self.shift is not None:
            values = values - self._expand(self.shift, flat).float()
        return values.reshape(*rows.shape, self.k)

    def _values(self, codes: Tensor) -> Tensor:
        if self.codebook is None:
            return codes.float()
        return self.codebook.to(codes.device)[codes.long()]

    def _expand(self, grid: Tensor, rows: slice | Tensor) -> Tensor:
        """A tensor shaped like ``scales`` as ``[*E, len(rows), K]`` (or broadcastable to it)."""
        bn, bk = self.block
        if bn == 1:
            grid = grid[..., rows, :]
        elif bn:
            index = (
                torch.arange(rows.start, rows.stop, device=grid.device) if isinstance(rows, slice) else rows.to(grid.device)
            )
            grid = grid[..., index // bn, :]
        if self.group_index is not None:
            index = self.group_index.long()
            if index.ndim == 1:
                return grid[..., index]
            return grid.gather(-1, index[:, None, :].expand(-1, grid.shape[-2], -1))
        if bk and grid.shape[-1] > 1:
            grid = grid.repeat_interleave(bk, dim=-1)[..., : self.k]
        return grid

    def _dequantize_rows(self, rows: slice, scales: Tensor) -> Tensor:
        values = self._values(self.codes[..., rows, :])
        if self.zeros is not None:
            values = values - self._expand(self.zeros, rows).float()
        values = values * self._expand(scales, rows)
        if self.shift is not None:
            values = values - self._expand(self.shift, rows).float()
        return values

    def narrow(self, n: tuple[int, int] | None = None, k: tuple[int, int] | None = None) -> QuantWeight:
        """The window of rows ``n`` and columns ``k`` (half open), exactly; grids are refined where the cut needs it."""
        n0, n1 = n or (0, self.n)
        k0, k1 = k or (0, self.k)
        if not (0 <= n0 <= n1 <= self.n and 0 <= k0 <= k1 <= self.k):
            raise IndexError(f"window N[{n0}:{n1}], K[{k0}:{k1}] lies outside of a weight [{self.n}, {self.k}]")
        bn, bk = self.block
        if bn and (n0 % bn or (n1 % bn and n1 != self.n)):
            bn = math.gcd(bn, n0, n1)
        if bk and self.group_index is None and (k0 % bk or (k1 % bk and k1 != self.k)):
            bk = math.gcd(bk, k0, k1)
        weight = self.regroup(bn, bk)
        row_cut = slice(n0 // bn, -(-n1 // bn)) if bn else slice(None)
        column_cut = slice(None) if self.group_index is not None or not bk else slice(k0 // bk, -(-k1 // bk))

        def grid(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[..., row_cut, column_cut]

        def columns(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[..., k0:k1]

        global_scale = weight.global_scale
        if global_scale is not None and global_scale.ndim >= 2 and global_scale.shape[-2] == self.n:
            global_scale = global_scale[..., n0:n1, :]
        return replace(
            weight,
            codes=weight.codes[..., n0:n1, k0:k1],
            scales=weight.scales[..., row_cut, column_cut],
            zeros=grid(weight.zeros),
            shift=grid(weight.shift),
            global_scale=global_scale,
            group_index=columns(weight.group_index),
            pre_scale=columns(weight.pre_scale),
            act_shift=columns(weight.act_shift),
        )

    def regroup(self, bn: int, bk: int) -> QuantWeight:
        """The same weight with scale blocks ``(bn, bk)`` that divide the present ones; exact, by repetition."""
        if (bn, bk) == self.block:
            return self

        def refine(grid: Tensor | None) -> Tensor | None:
            if grid is None:
                return None
            grid = _repeat(grid, -2, self.block[0], bn, self.n)
            return grid if self.group_index is not None else _repeat(grid, -1, self.block[1], bk, self.k)

        scales = refine(self.scales)
        assert scales is not None
        assert self.scheme.weight is not None
        scheme = replace(self.scheme, weight=replace(self.scheme.weight, block=(bn, bk)))
        return replace(
            self, scheme=scheme, scales=scales, zeros=refine(self.zeros), shift=refine(self.shift), block=(bn, bk)
        )

    def expert(self, index: int) -> QuantWeight:
        """Matrix ``index`` of a stack."""
        shared = {"codebook"}
        cut = {name: t if name in shared else t[index] for name, t in self.tensors().items()}
        return self.with_tensors(cut)

    def equal(self, other: QuantWeight) -> bool:
        """Bit equality of every field."""
        mine, theirs = self.tensors(), other.tensors()
        flags = ("scheme", "block", "global_div", "act_div")
        return (
            all(getattr(self, f) == getattr(other, f) for f in flags)
            and mine.keys() == theirs.keys()
            and all(_same_bits(mine[name], theirs[name]) for name in mine)
        )


@dataclass(eq=False)
class OpaqueWeight:
    """The escape hatch: a weight ``[N, K]`` in an encoding that is not affine (convolutional codes, super-blocks).

    ``tensors`` are as stored; ``decoder(tensors, n, k)`` gives float32 ``[N, K]``. Kernels that know ``encoding``
    read the tensors, every other device takes the reference path through ``dequantize``.
    """

    scheme: QuantScheme
    encoding: str
    stored: dict[str, Tensor]
    n: int
    k: int
    decoder: Callable[[dict[str, Tensor], int, int], Tensor]
    group_index: Tensor | None = None
    pre_scale: Tensor | None = None
    act_shift: Tensor | None = None
    act_scale: Tensor | None = None
    act_div: bool = False
    act_zero: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.nbytes for t in self.stored.values())

    @property
    def experts(self) -> int | None:
        """Opaque weights are single matrices; a stack of them is a list."""
        return None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``[N, K]``, rounded once to ``dtype``."""
        return self.decoder(self.stored, self.n, self.k).to(dtype)

    def dequantize_rows(self, rows: Tensor) -> Tensor:
        """float32 rows ``[*rows, K]``."""
        return self.dequantize()[rows]

    def narrow(self, n: tuple[int, int], k: tuple[int, int]) -> OpaqueWeight:
        """The window of rows ``n`` and columns ``k`` (half open). The bytes stay whole, so kernels see another encoding."""
        if (n, k) == ((0, self.n), (0, self.k)):
            return self
        height, width, decoder = self.n, self.k, self.decoder

        def window(stored: dict[str, Tensor], rows: int, columns: int) -> Tensor:
            return decoder(stored, height, width)[n[0] : n[0] + rows, k[0] : k[0] + columns]

        held = {name: getattr(self, name) for name in ("group_index", "pre_scale", "act_shift")}
        cut = {name: value[..., slice(*k)] for name, value in held.items() if value is not None}
        name = f"{self.encoding}:window"
        return replace(self, encoding=name, n=n[1] - n[0], k=k[1] - k[0], decoder=window, **cut)

    def to(self, device: torch.device | str) -> OpaqueWeight:
        """The same weight on another device."""
        return replace(self, stored={name: t.to(device) for name, t in self.stored.items()})


def decode_scales(scales: Tensor, scale_dtype: str) -> Tensor:
    """Stored scales as float32. E8M0 bytes b mean 2**(b - 127), and 255 is NaN (OCP Microscaling Formats 1.0, 5.4.1)."""
    if scale_dtype != "e8m0":
        return scales.float()
    if scales.dtype != torch.uint8:
        return scales.float()
    exponents = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - 127)
    return exponents.masked_fill(scales == 255, float("nan"))


def concat(weights: Sequence[QuantWeight], by_row: bool = False) -> QuantWeight:
    """Weights stacked along N (fused qkv, gate_up), exactly.

    Blocks are refined to a common extent and tensor scales widened to rows; nothing is requantized. ``by_row``: a global scale
    is held for each row though all are equal, so that no shape depends on values, which another load may change.

    :raises SplitRequired: where one weight cannot say the same: another scheme, another act order, another static
        activation scale, another ``pre_scale``.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    for other in weights[1:]:
        _check_fusable(first, other)
    widened = [_widen(w) for w in weights]
    heights = [w.n for w in widened]
    starts = [sum(heights[:i]) for i in range(len(heights))]
    bn = math.gcd(*(w.block[0] for w in widened), *starts[1:])
    columns = [w.block[1] or w.k for w in widened]
    bk = 0 if all(w.block[1] == 0 for w in widened) else math.gcd(*columns)
    if first.group_index is not None:
        bk = first.block[1]
    common = [w.regroup(bn, bk) for w in widened]

    def join(name: str) -> Tensor | None:
        values = [getattr(w, name) for w in common]
        return None if values[0] is None else _cat_rows(values)

    scales = join("scales")
    codes = join("codes")
    assert scales is not None
    assert codes is not None
    global_scale = _join_global(common, by_row)
    return replace(
        common[0], codes=codes, scales=scales, zeros=join("zeros"), shift=join("shift"), global_scale=global_scale
    )


def without_act(weight: QuantWeight | OpaqueWeight) -> QuantWeight | OpaqueWeight:
    """The same weight for 16-bit activations: their scale and zero point are dropped, ``pre_scale`` and ``act_shift`` stay."""
    return replace(weight, scheme=weight.scheme.without_act(), act_scale=None, act_div=False, act_zero=None)


def stack(weights: Sequence[QuantWeight]) -> QuantWeight:
    """E plain weights of one shape as one stack ``[E, N, K]``.

    :raises SplitRequired: where schemes, blocks or the set of present fields differ.
    """
    first = weights[0]
    names = first.tensors().keys()
    for other in weights[1:]:
        if other.scheme != first.scheme or other.block != first.block or other.tensors().keys() != names:
            raise SplitRequired(
                f"experts of scheme {first.scheme} and {other.scheme} were found; one stack needs one scheme, so run them one by one"
            )
    shared = {"codebook"}
    joined = {name: _stack([w.tensors()[name] for w in weights]) for name in names - shared}
    return first.with_tensors(joined)


def _check_fusable(a: QuantWeight, b: QuantWeight) -> None:
    def refuse(what: str) -> None:
        raise SplitRequired(f"the parts differ in {what}; one fused weight needs one, so they run as separate weights")

    plain_a = replace(a.scheme, weight=replace(a.scheme.weight, block=(1, 0))) if a.scheme.weight else a.scheme
    plain_b = replace(b.scheme, weight=replace(b.scheme.weight, block=(1, 0))) if b.scheme.weight else b.scheme
    if plain_a != plain_b:
        refuse(f"scheme ({a.scheme} and {b.scheme})")
    if a.codes.dtype != b.codes.dtype or a.scales.dtype != b.scales.dtype or a.k != b.k:
        refuse("shape or dtype")
    for name in ("zeros", "shift", "global_scale"):
        if (getattr(a, name) is None) != (getattr(b, name) is None):
            refuse(f"whether they have {name}")
    for name in ("group_index", "pre_scale", "act_shift", "act_scale", "act_zero", "codebook"):
        mine, theirs = getattr(a, name), getattr(b, name)
        if (mine is None) != (theirs is None) or (mine is not None and not _same_bits(mine, theirs)):
            refuse({"group_index": "act order"}.get(name, name))


def _widen(weight: QuantWeight) -> QuantWeight:
    """One scale row for each weight row where there was one for the whole tensor."""
    if weight.block[0]:
        return weight
    return weight.regroup(1, weight.block[1])


def _join_global(weights: Sequence[QuantWeight], by_row: bool) -> Tensor | None:
    first = weights[0].global_scale
    if first is None:
        return None
    values = [w.global_scale for w in weights]
    if not by_row and all(v is not None and v.shape == first.shape and _same_bits(v, first) for v in values):
        return first
    rows = []
    for weight, value in zip(weights, values, strict=True):
        assert value is not None
        rows.append(value if value.ndim >= 2 else value.reshape(*value.shape, 1, 1).expand(*value.shape, weight.n, 1))
    return torch.cat(rows, dim=-2)


def _repeat(grid: Tensor, dim: int, old: int, new: int, length: int) -> Tensor:
    """Refine one axis of a scale grid from blocks of ``old`` to blocks of ``new`` (0 is the whole length)."""
    if old == new:
        return grid
    if new == 0 or (old and old % new):
        raise ValueError(f"blocks of {old} cannot be refined to {new}")
    count = -(-length // new)
    if old == 0:
        shape = list(grid.shape)
        shape[dim] = count
        return grid.expand(shape)
    return grid.repeat_interleave(old // new, dim=dim).narrow(dim, 0, count)


def _as_bits(value: Tensor) -> Tensor:
    """A view that torch can compare and join: 8-bit floats lack eq and cat on some devices."""
    return value.contiguous().view(torch.uint8) if value.element_size() == 1 and value.is_floating_point() else value


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_as_bits(a), _as_bits(b))


def _cat_rows(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([_as_bits(v) for v in values], dim=-2).view(values[0].dtype)


def _stack(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([_as_bits(v) for v in values]).view(values[0].dtype)


def code_dtype(dtype: str, symmetric: bool) -> torch.dtype:
    """The torch dtype that holds codes of a number type."""
    if dtype == "fp8_e4m3":
        return torch.float8_e4m3fn
    if dtype == "fp8_e5m2":
        return torch.float8_e5m2
    if dtype == "fp16":
        return torch.bfloat16
    if NUMBER_TYPES[dtype].kind == "codebook" or not symmetric:
        return torch.uint8
    return torch.int8
