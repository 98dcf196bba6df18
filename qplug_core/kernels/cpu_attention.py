"""Attention of one new token on x86 CPUs, over 16-bit, float32 or quantized keys and values where they lie: ``qplug::attention``."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ..device import Device
from ..support import Refusal
from . import builder
from .torch_c import KINDS, address, operation, plain


def refusals(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, depth: int) -> list[Refusal]:
    """Why the kernel does not take these tensors, which are shaped as :func:`attention` says; ``depth``: channels of a value."""
    found = list(_missing())
    if q.device.type != "cpu":
        found.append(Refusal("device", str(q.device), "a CPU"))
    if q.dtype not in KINDS or {k.dtype, v.dtype} not in ({q.dtype}, {torch.uint8}):
        found.append(
            Refusal("dtype", f"{q.dtype} beside {k.dtype} and {v.dtype}", "float32, bfloat16 or float16 throughout")
        )
    if q.shape[2] != 1 or q.shape[1] % k.shape[1] or q.shape[3] % 16 or depth % 16:
        found.append(Refusal("shape", f"queries {list(q.shape)}", "one token, heads of a multiple of 16 channels"))
    if mask is not None and (mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[-1] != k.shape[2]):
        found.append(Refusal("op", f"a mask of {mask.dtype} {list(mask.shape)}", "booleans [B, H, 1, T]"))
    return found


@functools.cache
def _missing() -> tuple[Refusal, ...]:
    """Why the kernel does not run on this machine."""
    return tuple(builder.refusals("attention", Device.cpu()))


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    held: int,
    depth: int,
    scaling: float,
) -> Tensor:
    b, h, _, dk = q.shape
    q, heads = q.contiguous(), k.shape[1]
    out = q.new_empty((b, 1, h, depth))
    k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (k, v))
    size, ks, vs = k.element_size(), k.stride(), v.stride()
    ms = (0, 0, 0, 0) if mask is None else mask.expand(b, h, 1, -1).stride()
    failed = _function()(
        out.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), address(mask), address(k_scale), address(v_scale),
        b, heads, h // heads, k.shape[2], dk, depth, ks[0] * size, ks[1] * size, ks[2] * size, vs[0] * size, vs[1] * size, vs[2] * size,
        ms[0], ms[1], ms[3], 0 if k_scale is None else k_scale.numel(), 0 if v_scale is None else v_scale.numel(),
        KINDS[q.dtype], held or KINDS[q.dtype], held != 0 and k_scale is None, scaling, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for {h} heads of {dk} and {depth} channels")
    return out


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    held: int,
    depth: int,
    scaling: float,
) -> Tensor:
    return q.new_empty((q.shape[0], 1, q.shape[1], depth))


@functools.cache
def _function() -> ctypes._NamedFuncPointer:
    function = builder.library("attention").qplug_attention
    function.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_long] * 17 + [ctypes.c_int] * 3 + [ctypes.c_float, ctypes.c_int]
    return function


_operation = operation(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? k_scale, Tensor? v_scale, int held, int depth, float scaling) -> Tensor",
    _run,
    _fake,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    depth: int,
    held: int = 0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attention of one token of each sequence: ``[B, 1, H, depth]``.

    q
        ``[B, H, 1, D]`` float32, bfloat16 or float16.
    k, v
        ``[B, HKV, T, D]`` and ``[B, HKV, T, depth]`` of the same dtype, H a multiple of HKV; with ``held`` (:data:`cpu_kv_cache.HELD`) rows of
        bytes. Views into a larger storage are read where they lie.
    mask
        bool, broadcast to ``[B, H, 1, T]``; False hides a token.
    k_scale, v_scale
        float32 ``[1]`` or ``[HKV]``, both, of codes that no scale follows.
    """
    call = _run if plain(q) else _operation
    y: Tensor = call(q, k, v, mask, k_scale, v_scale, held, depth, scaling)
    return y
