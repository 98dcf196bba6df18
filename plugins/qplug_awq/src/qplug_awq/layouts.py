"""The four storage variants of AWQ: which tensors each has, and codes, scales and zero points to and from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qplug_core.axes import FLOATS, StoredTensor
from qplug_core.config import LayerQuant
from qplug_core.errors import CannotEncode, DecodeError
from qplug_core.packing import pack, transposed, unpack
from qplug_core.scheme import TensorQuant

from .packing import (
    ROWS,
    STRIDE,
    TILE,
    UNIT,
    marlin_scale_order,
    pack_gemm,
    pack_gemv_fast,
    pack_marlin,
    unpack_gemm,
    unpack_gemv_fast,
    unpack_marlin,
)

WORDS = (1, 2, 4, 8)
"""Multiples that words of zero points are padded to, by one producer or another."""


class Grid(NamedTuple):
    """A layer as all layouts see it: ``codes [N, K]`` uint8, ``scales [N, G]``, ``zeros [N, G]`` uint8 (None: symmetric)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


class Layout(ABC):
    """One storage variant. ``decode`` is given a window that its tensors can be cut at."""

    @abstractmethod
    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The tensors of weights of ``quant``."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> Grid:
        """Codes of ``n`` rows and ``k`` columns."""

    @abstractmethod
    def encode(self, grid: Grid, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`.

        :raises CannotEncode: for shapes and widths that the layout does not have.
        """


class Gemm(Layout):
    """Packed along N. The layout that every reader knows."""

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """See :class:`Layout`."""
        part = part_of(quant)
        groups = f"ceil(K/{part.block[1]})" if part.block[1] else "1"
        # Eight codes are permuted together, so 8 bits cannot be cut at one word of four.
        words = "N/8" if part.bits == 4 else "2*N/8"
        return (
            StoredTensor("qweight", ("K", words), ("I32",)),
            StoredTensor("qzeros", (groups, words), ("I32",)),
            StoredTensor("scales", (groups, "N"), FLOATS),
        )

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> Grid:
        """See :class:`Layout`."""
        bits = part_of(quant).bits
        codes, zeros = unpack_gemm(tensors["qweight"], bits), unpack_gemm(tensors["qzeros"], bits)
        return Grid(codes, transposed(tensors["scales"]), zeros)

    def encode(self, grid: Grid, quant: LayerQuant) -> dict[str, Tensor]:
        """See :class:`Layout`."""
        part = part_of(quant)
        _check_shape("awq_gemm", grid.codes, 8, 1)
        assert grid.zeros is not None
        return {
            "qweight": pack_gemm(grid.codes, part.bits),
            "qzeros": pack_gemm(grid.zeros, part.bits),
            "scales": transposed(grid.scales),
        }


class Gemv(Layout):
    """Packed along K, with room for whole words of zero points in every row."""

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """See :class:`Layout`."""
        group = part_of(quant).block[1]
        zeros = [("N", axis) for axis in _padded(group, 1)]
        scales = [("N", axis) for axis in _padded(group, 8)]
        exact = ("N", f"ceil(K/{group})" if group else "1")
        return (
            StoredTensor("qweight", ("N", "K/8"), ("I32",)),
            StoredTensor("qzeros", zeros[0], ("I32",), alt=tuple(zeros[1:])),
            StoredTensor("scales", scales[0], FLOATS, alt=(*scales[1:], exact)),
        )

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> Grid:
        """See :class:`Layout`."""
        groups = _groups(quant, k)
        codes = unpack(tensors["qweight"].contiguous(), 4)
        zeros = unpack(tensors["qzeros"].contiguous(), 4)[:, :groups]
        return Grid(codes, tensors["scales"][:, :groups].contiguous(), zeros.contiguous())

    def encode(self, grid: Grid, quant: LayerQuant) -> dict[str, Tensor]:
        """See :class:`Layout`."""
        _check_bits("awq_gemv", quant)
        _check_shape("awq_gemv", grid.codes, 1, 8)
        assert grid.zeros is not None
        room = _room(grid, quant)
        return {
            "qweight": pack(grid.codes.contiguous(), 4),
            "qzeros": pack(_filled(grid.zeros, room), 4),
            "scales": _filled(grid.scales, room),
        }


class GemvFast(Layout):
    """Four rows interleaved, with zero points already multiplied by their scales.

    The integer zero point is the one whose product with the scale, rounded to the dtype of the file, is what the file holds.
    """

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """See :class:`Layout`."""
        group = part_of(quant).block[1]
        shapes = [(axis, "N") for axis in (*_padded(group, 8), f"ceil(K/{group})" if group else "1")]
        return (
            StoredTensor("qweight", (f"N/{ROWS}", f"{STRIDE}*K/{STRIDE}"), ("I16",)),
            StoredTensor(_zeros_name(quant), shapes[0], FLOATS, alt=tuple(shapes[1:])),
            StoredTensor("scales", shapes[0], FLOATS, alt=tuple(shapes[1:])),
        )

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> Grid:
        """See :class:`Layout`."""
        groups = _groups(quant, k)
        scales, scaled = transposed(tensors["scales"][:groups]), transposed(tensors[_zeros_name(quant)][:groups])
        zeros = torch.round(-scaled.float() / scales.float().masked_fill(scales == 0, 1.0)).clamp(0, 15)
        wrong = (-(scales.float() * zeros)).to(scaled.dtype) != scaled
        if bool(wrong.any()):
            row, group = (int(i) for i in wrong.nonzero()[0])
            raise DecodeError(
                f"{_zeros_name(quant)} of row {row}, group {group} is {float(scaled[row, group]):g} with a scale of "
                f"{float(scales[row, group]):g}; minus the scale times a zero point from 0 to 15 was needed, so fetch the file "
                "again or quantize with another version"
            )
        return Grid(unpack_gemv_fast(tensors["qweight"]), scales, zeros.to(torch.uint8))

    def encode(self, grid: Grid, quant: LayerQuant) -> dict[str, Tensor]:
        """See :class:`Layout`."""
        _check_bits("awq_gemv_fast", quant)
        _check_shape("awq_gemv_fast", grid.codes, ROWS, STRIDE)
        assert grid.zeros is not None
        room = _room(grid, quant)
        scaled = (-(grid.scales.float() * grid.zeros.float())).to(grid.scales.dtype)
        lost = ~torch.isfinite(scaled) | ((grid.scales == 0) & (grid.zeros != 0))
        if bool(lost.any()):
            raise CannotEncode(
                "a scale times its zero point overflows or vanishes; awq_gemv_fast stores that product, so store awq_gemm"
            )
        return {
            "qweight": pack_gemv_fast(grid.codes),
            _zeros_name(quant): transposed(_filled(scaled, room)),
            "scales": transposed(_filled(grid.scales, room)),
        }


class Marlin(Layout):
    """Symmetric codes permuted for tensor cores. A cut of a permuted matrix is none, so it is read whole."""

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """See :class:`Layout`."""
        group = part_of(quant).block[1]
        groups = f"ceil(K/{group})" if group else "1"
        return (
            StoredTensor("qweight", (f"K/{TILE}", f"{2 * UNIT}*N/{UNIT}"), ("I32",), local=False),
            StoredTensor("scales", (groups, "N"), FLOATS, local=False),
        )

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> Grid:
        """See :class:`Layout`."""
        scales = tensors["scales"]
        order = marlin_scale_order(_groups(quant, k) > 1)
        plain = torch.empty_like(scales)
        plain.view(-1, len(order))[:, order] = scales.reshape(-1, len(order))
        return Grid(transposed(unpack_marlin(tensors["qweight"])), transposed(plain), None)

    def encode(self, grid: Grid, quant: LayerQuant) -> dict[str, Tensor]:
        """See :class:`Layout`."""
        part = part_of(quant)
        _check_bits("awq_marlin", quant)
        if not part.symmetric:
            raise CannotEncode("zero points were given; awq_marlin stores symmetric weights, so store awq_gemm")
        _check_shape("awq_marlin", grid.codes, UNIT, TILE)
        order = marlin_scale_order(grid.scales.shape[1] > 1)
        scales = transposed(grid.scales)
        permuted = scales.view(-1, len(order))[:, order].reshape(scales.shape)
        return {"qweight": pack_marlin(transposed(grid.codes)), "scales": permuted}


LAYOUTS: dict[str, Layout] = {
    "awq_gemm": Gemm(),
    "awq_gemv": Gemv(),
    "awq_gemv_fast": GemvFast(),
    "awq_marlin": Marlin(),
}
"""By the name that rules carry."""


def words_multiple(group: int) -> int:
    """The multiple of words that zero points of groups of ``group`` columns are padded to, for kernels that load 128 columns."""
    return {64: 2, 32: 4, 16: 8}.get(group, 1)


def _padded(group: int, values: int) -> list[str]:
    """Axes of a padded row of groups, ``values`` to a word of eight: the producer's own rounding first, then all others."""
    own = words_multiple(group)
    multiples = dict.fromkeys((own, *WORDS))
    if not group:
        return [str(m * values) for m in multiples]
    return [f"{m * values}*ceil(K/{8 * m * group})" for m in multiples]


def part_of(quant: LayerQuant) -> TensorQuant:
    """The weights of a quantized layer."""
    part = quant.scheme.weight
    assert part is not None, "a layer that stays 16 bit has no AWQ tensors"
    return part


def _groups(quant: LayerQuant, k: int) -> int:
    group = part_of(quant).block[1]
    return -(-k // group) if group else 1


def _room(grid: Grid, quant: LayerQuant) -> int:
    """Groups that a row has room for."""
    multiple = 8 * words_multiple(part_of(quant).block[1] or grid.codes.shape[1])
    return -(-grid.scales.shape[1] // multiple) * multiple


def _filled(values: Tensor, width: int) -> Tensor:
    """``[N, G]`` as ``[N, width]``, with zeros behind."""
    out = torch.zeros(values.shape[0], width, dtype=values.dtype)
    out[:, : values.shape[1]] = values
    return out


def _zeros_name(quant: LayerQuant) -> str:
    return str(quant.opt("zeros", "qzeros"))


def _check_bits(layout: str, quant: LayerQuant) -> None:
    if part_of(quant).bits != 4:
        raise CannotEncode(f"{part_of(quant).bits} bits were given; {layout} stores 4, so store awq_gemm")


def _check_shape(layout: str, codes: Tensor, rows: int, columns: int) -> None:
    n, k = codes.shape
    if n % rows or k % columns:
        raise CannotEncode(
            f"a weight [{n}, {k}] was given; {layout} packs {rows} rows and {columns} columns at a time, so choose another "
            "layout or format for this layer"
        )
