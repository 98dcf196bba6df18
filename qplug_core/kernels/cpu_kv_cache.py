"""Keys and values to the bytes of a quantized cache and back on x86 CPUs, bit-equal to :class:`~qplug_core.reference.kv_cache.CacheCoder`."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..device import Device
from ..reference.kv_cache import CacheCoder
from ..scheme import NUMBER_TYPES
from ..support import Refusal
from . import builder
from .torch_c import KINDS, address

HELD = {"int8": 5, "int4": 6, "fp8_e4m3": 7}
"""``enum held`` of ``kv_cache.h``."""


@dataclass(frozen=True)
class Rows:
    """How the C kernels see what a coder keeps.

    ``held``: number of the code type; ``scale``: float32 ``[1]`` or ``[H]``, or None where a float32 scale follows the codes of each row.
    """

    held: int
    scale: Tensor | None
    divisor: float

    @property
    def scales(self) -> int:
        """How many scales are stored."""
        return 0 if self.scale is None else self.scale.numel()


def refusals(coder: CacheCoder, depth: int, dtype: torch.dtype, device: torch.device) -> list[Refusal]:
    """Why the rows of ``coder`` for heads of ``depth`` channels take the torch path."""
    kv, found = coder.kv, [] if device.type == "cpu" else [Refusal("device", str(device), "a CPU")]
    found += _missing()
    if kv.dtype not in HELD or not kv.symmetric or kv.scale_dtype == "e4m3" or kv.rule:
        found.append(Refusal("scheme", f"a KV cache of {kv}", f"symmetric {', '.join(HELD)} with float scales"))
    if (coder.scale is not None and coder.scale.ndim > 1) or kv.block[1] > 1 or (kv.dynamic and coder.scale is not None):
        found.append(
            Refusal("scheme", "scales of parts of a head", "one scale for all, for a head, or for a token and head")
        )
    if depth % 16 or dtype not in KINDS:
        found.append(
            Refusal("shape", f"heads of {depth} channels in {dtype}", "a multiple of 16, float32, bfloat16 or float16")
        )
    return found


@functools.cache
def _missing() -> tuple[Refusal, ...]:
    """Why the kernels do not run on this machine."""
    return tuple(builder.refusals("kv_cache", Device.cpu()))


def rows_of(coder: CacheCoder, dtype: torch.dtype) -> Rows:
    """What the C kernels are told of a coder that :func:`refusals` says nothing against. Stored scales are rounded to ``dtype``."""
    scale = (
        None if coder.kv.dynamic or coder.scale is None else coder.scale.to("cpu", dtype).float().reshape(-1).contiguous()
    )
    return Rows(HELD[coder.kv.dtype], scale, NUMBER_TYPES[coder.kv.dtype].largest)


def encode(rows: Rows, x: Tensor, to: Tensor) -> None:
    """``x [B, H, T, D]`` into ``to``, uint8 ``[B, H, T, width(D)]``; the last dimension of either is contiguous."""
    _run(rows, to, x if x.stride(3) == 1 else x.contiguous(), 0)


def decode(rows: Rows, data: Tensor, depth: int, dtype: torch.dtype) -> Tensor:
    """Bytes ``[B, H, T, width(depth)]`` as ``[B, H, T, depth]`` in ``dtype``."""
    out = torch.empty((*data.shape[:3], depth), dtype=dtype)
    _run(rows, data, out, 1)
    return out


def _run(rows: Rows, data: Tensor, x: Tensor, back: int) -> None:
    size = x.element_size()
    r, s = data.stride(), x.stride()
    _function()(
        data.data_ptr(), x.data_ptr(), address(rows.scale), *x.shape, r[0], r[1], r[2], s[0] * size, s[1] * size, s[2] * size,
        rows.scales, KINDS[x.dtype], rows.held, rows.divisor, back, torch.get_num_threads(),
    )  # fmt: skip


@functools.cache
def _function() -> ctypes._NamedFuncPointer:
    function = builder.library("kv_cache").qplug_kv_rows
    function.restype = None
    function.argtypes = (
        [ctypes.c_void_p] * 3 + [ctypes.c_long] * 11 + [ctypes.c_int] * 2 + [ctypes.c_float] + [ctypes.c_int] * 2
    )
    return function
