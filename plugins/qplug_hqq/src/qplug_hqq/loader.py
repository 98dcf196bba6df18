"""The HQQ checkpoint format: stored tensors, decode, encode.

Of one layer ``[N, K]`` with groups of ``g`` weights, G = N*K/g of them (see :mod:`qplug_hqq.packing` for words of less than 8 bits):

============ ============ ============= ==============================================================================
W_q          [G, g]       uint8, int32  codes, packed along G; seen as a 16- or 32-bit float where ``view_as_float``
scale, zero  [G, 1]       float         ``w = (q - zero) * scale``; zero points are in general no integers
============ ============ ============= ==============================================================================

With ``axis`` 0 they are ``[g, G]``, packed along g, and ``[1, G]``: columns of the flat weight cut into g pieces, so that a group
holds every G-th weight. Beside them lie up to 16 small tensors that say the same as the config, and are checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qplug_core.axes import FLOATS, StoredTensor
from qplug_core.config import LayerQuant, QuantizationConfig
from qplug_core.errors import CannotEncode, DecodeError
from qplug_core.format import CheckpointFormat
from qplug_core.scheme import TensorQuant
from qplug_core.weight import OpaqueWeight, QuantWeight

from .config import NBITS, parse, write
from .packing import RUNS, pack, unpack, word_bytes

if TYPE_CHECKING:
    from qplug_core.source import Source

NUMBERS = {"nbits": ("I32", "F32"), "group_size": ("I32",), "axis": ("I32",)}
FLAGS = (
    "view_as_float", "quant_scale", "quant_zero", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
    "optimize", "round_zero",
)  # fmt: skip
TEXTS = {"packing": (7,), "unpack_view_dtype": (11,), "compute_dtype": (13, 14)}
"""Lengths of texts that are stored one character to a byte: ``4bit_u8``, ``torch.uint8``, ``torch.float16``."""


class HQQFormat(CheckpointFormat):
    """One layout. Options, each left out where it is the default: ``axis`` 0, ``view_as_float`` True."""

    name = "hqq"

    def parse(self, source: Source) -> QuantizationConfig:
        """See :func:`qplug_hqq.config.parse`."""
        return parse(source)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The tensors of the table above. Words that hold weights from far apart are read whole."""
        part = _part(quant)
        runs, group = RUNS[part.bits], _group(quant)
        flat = quant.opt("axis", 1) == 0
        groups, width = (f"N*K/{group}", str(group)) if group else ("N", "K")
        rows = f"N*K/{group * runs}" if group else f"N/{runs}"
        if part.bits == 3:
            rows = f"ceil(N*K/{group * runs})" if group else f"ceil(N/{runs})"
        if flat:
            rows, width = str(-(-group // runs)), groups
        scale = ("1", groups) if flat else (groups, "1")
        shapes = [(rows, width)]
        dtypes: tuple[str, ...] = ("I32",) if part.bits == 3 else ("U8",)
        if quant.opt("view_as_float"):
            dtypes = FLOATS
            shapes = [(rows, _resized(width, word_bytes(part.bits), size)) for size in (2, 4)]
        return (
            StoredTensor("W_q", shapes[0], dtypes, alt=tuple(shapes[1:]), local=runs == 1 and not flat),
            StoredTensor("scale", scale, FLOATS),
            StoredTensor("zero", scale, FLOATS),
            StoredTensor("shape", ("2",), ("I64",), optional=True, meta=True),
            *(StoredTensor(name, (), dtypes, optional=True, meta=True) for name, dtypes in NUMBERS.items()),
            *(StoredTensor(name, (), ("U8",), optional=True, meta=True) for name in FLAGS),
            *(_text(name, lengths) for name, lengths in TEXTS.items()),
        )

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight | OpaqueWeight:
        """Codes uint8 ``[N, K]``; zero points int16 where all of them are integers, else as stored.

        Groups that end inside of a row are refined until none does. Groups along axis 0 are no blocks, so that such a weight
        stays as it is stored.

        :raises DecodeError: where the small tensors contradict the config, or scales are quantized themselves.
        """
        part = _part(quant)
        _check(tensors, quant, n, k)
        words, scale, zero = (tensors[name] for name in ("W_q", "scale", "zero"))
        if quant.opt("view_as_float"):
            words = words.view(torch.int32 if part.bits == 3 else torch.uint8)
        if quant.opt("axis", 1) == 0:
            stored = {"W_q": words, "scale": scale, "zero": zero}
            return OpaqueWeight(quant.scheme, f"hqq_axis0_{part.bits}", stored, n, k, _Axis0(part.bits, _group(quant)))
        group = _group(quant) or k
        codes = unpack(words, part.bits, n * k // group).reshape(n, k)
        zero = _integers(zero)
        if k % group:
            width = gcd(k, group)
            owner = torch.arange(n * k // width) * width // group
            scale, zero = scale.view(-1)[owner], zero.view(-1)[owner]
            part = replace(part, block=(1, width))
        scheme = replace(quant.scheme, weight=part)
        return QuantWeight(scheme, codes, scale.reshape(n, -1), part.block, zeros=zero.reshape(n, -1))

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`, with all that HQQLinear stores.

        :raises CannotEncode: for anything but one matrix with zero points and whole groups along K.
        """
        weight = _storable(weight)
        part = _part(quant)
        if weight.scheme != quant.scheme or quant.opts:
            raise CannotEncode(
                f"{weight.scheme} was given; the layer is to be stored as {quant.scheme} with groups along axis 1"
            )
        group = part.block[1] or weight.k
        if weight.k % group:
            raise CannotEncode(
                f"{weight.k} columns in groups of {group} were given; HQQ has no group that is smaller, so choose a size that divides"
            )
        count = weight.n * weight.k // group
        if part.bits in (2, 4) and count % RUNS[part.bits]:
            raise CannotEncode(
                f"{count} groups were given; HQQ packs {RUNS[part.bits]} of {part.bits} bits into one, so choose a smaller group size"
            )
        assert weight.zeros is not None
        scales = weight.scales.reshape(count, 1).contiguous()
        zeros = weight.zeros.reshape(count, 1)
        stored = zeros if zeros.is_floating_point() else zeros.to(scales.dtype)
        back = _integers(stored)
        if back.dtype != zeros.dtype or not torch.equal(back, zeros):
            raise CannotEncode(
                f"zero points {zeros.dtype} beside scales {scales.dtype} were given, which would be read as {back.dtype} or rounded; give "
                "those that are all integers as int16, and scales as float32"
            )
        numbers = {"nbits": part.bits, "group_size": group, "axis": 1}
        flags = {name: name in ("encoded_state_dict", "stores_quant_config", "channel_wise", "optimize") for name in FLAGS}
        texts = {
            "packing": "3bit_32" if part.bits == 3 else f"{8 // RUNS[part.bits]}bit_u8",
            "unpack_view_dtype": "torch.int32" if part.bits == 3 else "torch.uint8",
            "compute_dtype": str(scales.dtype),
        }
        return {
            "W_q": pack(weight.codes.reshape(count, group), part.bits),
            "scale": scales,
            "zero": stored.contiguous(),
            "shape": torch.tensor([weight.n, weight.k]),
            **{name: torch.tensor(value, dtype=torch.int32) for name, value in numbers.items()},
            **{name: torch.tensor(int(value), dtype=torch.uint8) for name, value in flags.items()},
            **{name: torch.tensor(list(text.encode()), dtype=torch.uint8) for name, text in texts.items()},
        }

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """The one layout, groups along axis 1.

        :raises CannotEncode: for a weight that HQQ has no numbers for.
        """
        return LayerQuant(_storable(weight).scheme, "hqq")

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """See :func:`qplug_hqq.config.write`."""
        return write(layers)


class _Axis0:
    """The decoder of a weight with groups along axis 0; equal ones compare equal, so that a layer can be loaded again."""

    def __init__(self, bits: int, group: int) -> None:
        self.bits, self.group = bits, group

    def __call__(self, stored: dict[str, Tensor], n: int, k: int) -> Tensor:
        codes = unpack(stored["W_q"], self.bits, self.group).float()
        return ((codes - stored["zero"].float()) * stored["scale"].float()).reshape(n, k)


def _part(quant: LayerQuant) -> TensorQuant:
    part = quant.scheme.weight
    assert part is not None, "a layer that stays 16 bit has no HQQ tensors"
    return part


def _group(quant: LayerQuant) -> int:
    """Weights that share a scale; 0 for those of a row."""
    return _part(quant).block[quant.opt("axis", 1)]


def _resized(axis: str, old: int, new: int) -> str:
    """An axis of elements of ``old`` bytes, seen in elements of ``new`` bytes."""
    shared = gcd(old, new)
    if axis.isdigit():
        return str(int(axis) * old // new)
    name, _, unit = axis.partition("/")
    times = f"{old // shared}*" if old > shared else ""
    return f"{times}{name}/{int(unit or 1) * (new // shared)}"


def _text(name: str, lengths: tuple[int, ...]) -> StoredTensor:
    shapes = [(str(length),) for length in lengths]
    return StoredTensor(name, shapes[0], ("U8",), optional=True, alt=tuple(shapes[1:]), meta=True)


def _check(tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> None:
    """Hold what a layer says of itself against the config."""
    for name in ("quant_scale", "quant_zero"):
        if bool(tensors.get(name, False)):
            raise DecodeError(
                f"{name} is true: scales or zero points are quantized themselves, which HQQ dropped in version 0.2; quantize again"
            )
    part = _part(quant)
    nbits = tensors.get("nbits")
    if nbits is not None and NBITS.get(round(float(nbits), 2)) != part.bits:
        raise DecodeError(f"nbits is {float(nbits):g} and the config says {part.bits}; correct the quant_config")
    group = _group(quant)
    shape = tensors.get("shape")
    rows, columns = (n, k) if shape is None else map(int, shape)
    # Only groups of whole rows can be cut along K, so elsewhere the layer has exactly k columns.
    if rows < n or columns < k or (group and columns != k):
        raise DecodeError(
            f"shape is {[rows, columns]} and the model needs [{n}, {k}]; the file belongs to another model, so fetch it again"
        )
    for name, value in (("axis", quant.opt("axis", 1)), ("group_size", group or columns)):
        if name in tensors and int(tensors[name]) != value:
            raise DecodeError(f"{name} is {int(tensors[name])} and the config says {value}; correct the quant_config")


def _integers(zero: Tensor) -> Tensor:
    """Zero points as int16 where all are integers, which more kernels take; else as they are."""
    if not zero.is_floating_point() or bool(((zero != zero.round()) | (zero.abs() > 2**15 - 1)).any()):
        return zero
    return zero.to(torch.int16)


def _storable(weight: QuantWeight | OpaqueWeight) -> QuantWeight:
    """``weight``, where every field of it has a tensor."""
    if isinstance(weight, OpaqueWeight) or weight.experts is not None:
        what = f"{weight.encoding}" if isinstance(weight, OpaqueWeight) else "a stack of experts"
        raise CannotEncode(
            f"{what} was given; HQQ is written as one matrix with groups along axis 1, so dequantize it first"
        )
    part = weight.scheme.weight
    known = part is not None and part.dtype.startswith("int") and part.bits in RUNS and part.block[0] == 1
    if (
        not known
        or weight.zeros is None
        or weight.scheme.act is not None
        or weight.scheme.act_order
        or weight.scheme.sparsity
    ):
        raise CannotEncode(
            f"scheme {weight.scheme} was given; HQQ stores W2A16 to W8A16 (without 7) by group or channel with zero points, so "
            "choose another format"
        )
    if extra := weight.tensors().keys() - {"codes", "scales", "zeros"}:
        raise CannotEncode(
            f"a weight with {', '.join(sorted(extra))} was given; HQQ has no tensor for it, so choose another format"
        )
    return weight
