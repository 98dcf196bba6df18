"""Quantized layers as the 16-bit layers that they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...engine.modules import QuantEmbedding, QuantExperts, QuantLinear
from ...errors import UsageError
from ...method import HubMethod, QuantMethod
from ...weight import OpaqueWeight, QuantWeight
from .loading import plain_torch

if TYPE_CHECKING:
    from .loading import Loading


def dense_weight(method: QuantMethod, source: Any) -> Tensor:
    """float32 ``[N, K]`` such that the layer is ``x @ W.T``, but for the quantization of activations.

    :raises UsageError: for a method outside of the hub, and for a weight that shifts its input.
    """
    name = method.decision.layer.name
    if not isinstance(method, HubMethod):
        raise UsageError(f"{name} is a {type(method).__name__}, which does not say its weight; it stays quantized")
    pieces = []
    with plain_torch():
        for _, _, weight in method.weights(source):
            if isinstance(weight, Tensor):
                pieces.append(weight.float().cpu())
                continue
            if weight.act_shift is not None:
                raise UsageError(
                    f"{name} shifts its input before it multiplies, which no 16-bit weight does; it stays quantized"
                )
            pieces.append(_folded(weight))
    return torch.cat(pieces)


def _folded(weight: QuantWeight | OpaqueWeight) -> Tensor:
    dense = weight.dequantize().cpu()
    return dense if weight.pre_scale is None else dense * weight.pre_scale.float().cpu()


def dequantize_model(model: Any, loading: Loading, dtype: torch.dtype | None) -> Any:
    """``model`` with a plain layer in the place of each quantized one, in ``dtype``."""
    dtype = dtype or loading.dtype
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            model.set_submodule(name, dense_linear(module, loading.source, dtype))
        elif isinstance(module, QuantEmbedding):
            weight = dense_weight(module.method, loading.source).to(loading.device, dtype)
            model.set_submodule(name, nn.Embedding.from_pretrained(weight))
        elif isinstance(module, QuantExperts):
            model.set_submodule(name, _dense_experts(name, module, loading, dtype))
    return model


def dense_linear(module: QuantLinear, source: Any, dtype: torch.dtype) -> nn.Linear:
    """The linear layer that ``module`` stands for."""
    weight = dense_weight(module.method, source).to(getattr(module.method, "device", "cpu"), dtype)
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        linear.bias = module.bias
    return linear


def _dense_experts(name: str, module: QuantExperts, loading: Loading, dtype: torch.dtype) -> Any:
    original = module.original
    up, down = (torch.stack([dense_weight(m, loading.source) for m in group]) for group in (module.up, module.down))
    if module.halves:
        up = torch.stack(up.chunk(2, dim=1), dim=2).flatten(1, 2)
    if loading.transposed[name]:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    first = "gate_up_proj" if module.gated else "up_proj"
    for name, weight in ((first, up), ("down_proj", down)):
        original.register_parameter(name, nn.Parameter(weight.to(loading.device, dtype), requires_grad=False))
    return original
