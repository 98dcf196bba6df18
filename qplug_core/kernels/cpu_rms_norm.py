"""RMSNorm of few rows on x86 CPUs, as Llama's: ``qplug::rms_norm``."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ..device import Device
from ..support import Refusal
from . import builder
from .torch_c import KINDS, operation, plain


def refusals(weight: Tensor) -> list[Refusal]:
    """Why the kernel does not take a norm with this weight ``[K]``."""
    found = builder.refusals("rms_norm", Device.cpu())
    if not weight.is_cpu or weight.dtype not in KINDS or weight.ndim != 1 or weight.shape[0] % 16:
        have = f"a weight {list(weight.shape)} of {weight.dtype} on {weight.device}"
        found.append(Refusal("shape", have, "a multiple of 16, float32, bfloat16 or float16, on a CPU"))
    return found


def _run(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    k = x.shape[-1]
    _function()(
        y.data_ptr(), x.data_ptr(), weight.data_ptr(), x.numel() // k, k, eps, KINDS[x.dtype], torch.get_num_threads()
    )
    return y


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@functools.cache
def _function() -> ctypes._NamedFuncPointer:
    function = builder.library("rms_norm").qplug_rms_norm
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 2 + [ctypes.c_float, ctypes.c_int, ctypes.c_int]
    return function


_operation = operation("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _run, _fake)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x [*, K]`` and contiguous ``weight [K]`` of one dtype to ``[*, K]``, rounded to it before the weight is multiplied in and after."""
    y: Tensor = (_run if plain(x) else _operation)(x, weight, eps)
    return y
