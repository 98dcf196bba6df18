"""What calls from torch into C kernels share: pointers, names of dtypes, registration of operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Float dtypes as ``enum kind`` of ``vec.h`` numbers them."""

_library = torch.library.Library("qplug", "FRAGMENT")


def operation(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register ``qplug::<schema>`` with its implementation on the CPU and its shapes; returns the operation, ready to call.

    A name that is registered already stays as it is.
    """
    name = schema.partition("(")[0]
    namespace = torch.ops.qplug
    if not hasattr(namespace, name):
        _library.define(schema)
        _library.impl(name, run, "CPU")
        torch.library.register_fake(f"qplug::{name}", fake, lib=_library)
    return getattr(namespace, name).default


def plain(x: Tensor) -> bool:
    """Whether an operation on ``x`` may be called without the dispatcher, which takes longer than a call from Python into C: no compiler,
    mode, subclass or gradient needs to see it."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and not x.requires_grad
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
    )


def address(tensor: Tensor | None) -> int | None:
    """Pointer to the data, None for none."""
    return None if tensor is None else tensor.data_ptr()


def bias_kind(bias: Tensor | None) -> int:
    """``enum kind`` of a bias, 0 for none."""
    return 0 if bias is None else KINDS[bias.dtype]
