"""Keys and values into a quantized KV cache on GPUs, in Triton: the operation ``qplug::triton_kv_store``.

FP8 e4m3 and e5m2, and INT8, with one stored scale, one for each head, or a float32 scale for each token and head behind the codes of its
row. The bytes are those of :class:`~qplug_core.reference.kv_cache.CacheCoder`; FP8 is encoded by its bits, so that GPUs without
FP8 units keep the same bytes. Into rows in order, or into the slots of a paged cache.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from ..reference.kv_cache import CacheCoder
from ..scheme import NUMBER_TYPES
from ..support import Refusal
from .triton_launch import DTYPES, CompileCase, operation, target_of

KINDS = {"int8": "int8", "fp8_e4m3": "e4m3", "fp8_e5m2": "e5m2"}
WIDEST = 256
"""Channels of a head, at most."""
ELEMENTS = 2048
"""Elements of one program, at most."""


def refusals(coder: CacheCoder, depth: int, dtype: torch.dtype) -> list[Refusal]:
    """Why this operation does not keep what ``coder`` keeps for heads of ``depth`` channels."""
    kv, found = coder.kv, []
    if kv.dtype not in KINDS or not kv.symmetric or kv.scale_dtype != "float":
        found.append(Refusal("scheme", f"a KV cache of {kv.dtype}", f"symmetric {', '.join(KINDS)} with float scales"))
    if kv.rule or kv.dynamic == "local" or (kv.dynamic and coder.scale is not None):
        found.append(Refusal("rule", "scales of two levels, or stored magnitudes", "plain scales"))
    if (coder.scale is not None and coder.scale.ndim > 1) or kv.block[1]:
        found.append(
            Refusal("scheme", "scales of parts of a head", "one scale for all, for a head, or for a token and head")
        )
    if depth % 16 or depth > WIDEST:
        found.append(Refusal("shape", f"heads of {depth} channels", f"a multiple of 16, at most {WIDEST}"))
    if str(dtype).removeprefix("torch.") not in DTYPES:
        found.append(Refusal("dtype", f"keys and values in {dtype}", "bfloat16 or float16"))
    return found


def takes(coder: CacheCoder, x: Tensor) -> bool:
    """Whether :func:`store` keeps ``x [B, H, T, D]`` here: on a GPU, or interpreted, with Triton."""
    if not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") or importlib.util.find_spec("triton") is None:
        return False
    return not refusals(coder, x.shape[3], x.dtype)


def store(coder: CacheCoder, x: Tensor, to: Tensor, slots: Tensor | None = None) -> None:
    """``x [B, H, T, D]`` into ``to``, uint8 ``[B, H, T', width(D)]`` by any strides whose last is 1; ``slots [T]`` int64 says where tokens go.

    A paged cache ``[blocks, size, H, width]`` is ``cache.flatten(0, 1).transpose(0, 1)[None]``. Tokens with a slot below 0 are not kept.
    """
    scale = None
    if not coder.kv.dynamic:
        assert coder.scale is not None
        scale = coder.scale.to(x.device, x.dtype).float().reshape(-1)
    x = x if x.stride(-1) == 1 else x.contiguous()
    kv_store(x, to, scale, slots, KINDS[coder.kv.dtype])


def _run(x: Tensor, to: Tensor, scale: Tensor | None, slots: Tensor | None, kind: str) -> None:
    target_of(x)
    if not x.numel():
        return
    from .triton_kv_cache_kernels import kv_store as kernel

    batch, heads, tokens, depth = x.shape
    scales = None if scale is not None else to[..., depth:].view(torch.float32)
    wide = 1 << (depth - 1).bit_length()
    rows = min(1 << (heads - 1).bit_length(), ELEMENTS // wide)
    c, s = to.stride(), (0, 0, 0) if scales is None else scales.stride()
    kernel[(tokens, -(-heads // rows), batch)](
        to, scales, x, scale, slots, tokens, heads, depth, x.stride(0), x.stride(2), x.stride(1), c[0], c[2], c[1], s[0], s[2], s[1],
        0 if scale is None or scale.numel() == 1 else 1, KIND=kind, LARGEST=NUMBER_TYPES[_number(kind)].largest, H=rows, D=wide, num_warps=4,
    )  # fmt: skip


def _number(kind: str) -> str:
    return next(name for name, word in KINDS.items() if word == kind)


def _fake(x: Tensor, to: Tensor, scale: Tensor | None, slots: Tensor | None, kind: str) -> None:
    return None


kv_store = operation("triton_kv_store(Tensor x, Tensor(a!) to, Tensor? scale, Tensor? slots, str kind) -> ()", _run, _fake)


def compile_cases(subset: str) -> list[CompileCase]:
    """What the compile matrix compiles, the same on every architecture: each type with stored and with computed scales."""
    found = []
    for kind, number in (("e4m3", "fp8_e4m3"), ("int8", "int8"), ("e5m2", "fp8_e5m2"))[: 1 if subset == "ci" else None]:
        for stored in (False, True):
            for depth, dtype, slots in ((128, "bfloat16", True), (64, "float16", False))[: 1 if subset == "ci" else None]:
                types = {"codes": "*u8", "scales": "*fp32", "x": DTYPES[dtype], "scale": "*fp32", "slots": "*i64"}
                absent = {"scales" if stored else "scale": None, **({} if slots else {"slots": None})}
                constants = {
                    "KIND": kind,
                    "LARGEST": NUMBER_TYPES[number].largest,
                    "H": ELEMENTS // depth,
                    "D": depth,
                    **absent,
                }
                found.append(
                    CompileCase(
                        f"kv_store {kind} {'stored' if stored else 'computed'} {depth} {dtype}",
                        "qplug_core.kernels.triton_kv_cache_kernels:kv_store", {k: v for k, v in types.items() if k not in absent}, constants,
                        {"num_warps": 4}, unaligned=("tokens", "heads", "c_batch", "c_token", "c_head", "s_batch", "s_token", "s_head", "head_step"),
                    )
                )  # fmt: skip
    return found
