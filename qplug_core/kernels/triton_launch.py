"""What launches of Triton kernels share: the processor, registration of operations, compile cases. Imports no Triton."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..device import Device
from ..errors import NoKernel
from ..support import Refusal
from .triton_tables import Tile, tile_for

DTYPES = {"float16": "*fp16", "bfloat16": "*bf16"}
"""Activation dtypes by the name that Triton's signatures have for pointers to them."""
POINTERS = {
    torch.uint8: "*u8", torch.int8: "*i8", torch.int32: "*i32", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
}  # fmt: skip
"""Triton's name of pointers to tensors of a dtype."""
INTERPRETED = "interpreter"
"""The architecture of tensors on the CPU, where ``TRITON_INTERPRET=1`` runs kernels in Python."""


@dataclass(frozen=True)
class Target:
    """What a launch looks at: the architecture as :class:`~qplug_core.device.Device` names it, its processors (SMs, CUs), and the bytes of
    shared memory that one block may use, 0 where unknown."""

    arch: str
    processors: int
    shared: int = 0


@dataclass(frozen=True)
class CompileCase:
    """One binary that a kernel may need: what the compile matrix compiles, and what it must find in it.

    function
        ``package.module:name`` of the ``@triton.jit`` function.
    types
        Triton types of arguments, ``*fp16``, ``i32``; what is neither here nor in ``constants`` is a 32-bit integer.
    constants
        Arguments that are part of the binary, None for an absent pointer.
    options
        ``num_warps`` and the like.
    matrix
        The operand type that its matrix instructions must have: ``f16``, ``bf16``, ``i8``, ``fp8``, and with block
        scales ``nvf4``, ``mxf4``, ``mxf8``; empty where it multiplies none.
    spill
        Bytes of spilled registers for each thread that are allowed: a few words outside of the loop cost nothing.
    unaligned
        Integer arguments of which no divisibility may be assumed.
    """

    name: str
    function: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    matrix: str = ""
    spill: int = 32
    unaligned: tuple[str, ...] = ()


_library = torch.library.Library("qplug", "FRAGMENT")


def operation(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register ``qplug::<schema>`` for GPUs, NVIDIA's and AMD's, and for the interpreter on the CPU; returns it, ready to call.

    A name that is registered already stays as it is.
    """
    name = schema.partition("(")[0]
    namespace = torch.ops.qplug
    if not hasattr(namespace, name):
        _library.define(schema)
        for key in ("CUDA", "CPU"):
            _library.impl(name, run, key)
        torch.library.register_fake(f"qplug::{name}", fake, lib=_library)
    return getattr(namespace, name).default


def target_of(x: Tensor) -> Target:
    """Where a kernel on ``x`` runs.

    :raises NoKernel: for a tensor on the CPU, unless Triton's interpreter is on.
    """
    if x.is_cuda:
        return _gpu(x.device.index or 0)
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise NoKernel("a Triton kernel was given a tensor on the CPU; move it to a GPU, or choose a CPU kernel")
    return Target(INTERPRETED, 4)


@functools.cache
def _gpu(index: int) -> Target:
    found = torch.cuda.get_device_properties(index)
    arch = getattr(found, "gcnArchName", "").partition(":")[0] if torch.version.hip else f"sm_{found.major}{found.minor}"
    shared = getattr(found, "shared_memory_per_block_optin", 0) or getattr(found, "shared_memory_per_block", 0)
    return Target(arch, found.multi_processor_count, shared)


def tile_of(family: str, target: Target, like: str, bits: int, tokens: int, n: int, k: int, kind: str = "") -> Tile | None:
    """:func:`.triton_tables.tile_for` on ``target``; ``like``: the architecture whose tiles the interpreter takes."""
    if target.arch == INTERPRETED:
        return tile_for(family, like, bits, tokens, n, k, kind=kind)
    return tile_for(family, target.arch, bits, tokens, n, k, kind=kind, processors=target.processors, shared=target.shared)


def rows_of(x: Tensor) -> Tensor:
    """``x [*, K]`` as ``[M, K]`` whose rows are contiguous each; a copy only where they are not."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def refusals(device: Device, dtype: str) -> list[Refusal]:
    """What no Triton kernel takes: devices that are no GPU with matrix units, and other than 16-bit activations."""
    found = []
    if not (device.matches("sm_80+") or device.vendor == "amd"):
        found.append(Refusal("device", str(device), "an NVIDIA GPU from sm_80 on, or an AMD GPU", "choose another device"))
    if dtype not in DTYPES:
        found.append(Refusal("dtype", f"{dtype} activations", "bfloat16 or float16", "load with dtype='bfloat16'"))
    return found
