"""Modules that stand in a Hugging Face model where a weight was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..method import QuantMethod


class QuantLinear(nn.Module):
    """A linear layer whose weight is a QuantMethod. ``bias`` is a parameter of the model, ``[N]`` or None."""

    def __init__(self, method: QuantMethod, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.method = method
        self.bias = bias
        self.in_features, self.out_features = method.decision.layer.local_k, method.decision.layer.n

    def forward(self, x: Tensor) -> Tensor:
        """``[*, K]`` to ``[*, N]``."""
        return self.method.apply(x, self.bias)

    def extra_repr(self) -> str:
        """Shape, scheme and kernel."""
        segments = self.method.decision.segments
        return f"{self.in_features}, {self.out_features}, " + ", ".join(f"{s.scheme or '16 bit'}" for s in segments)


class QuantEmbedding(nn.Module):
    """An embedding whose weight is a QuantMethod; rows come in ``dtype``."""

    def __init__(self, method: QuantMethod, dtype: torch.dtype, scale: Tensor | None) -> None:
        super().__init__()
        self.method = method
        self.dtype = dtype
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        """LongTensor ``[*]`` to ``[*, K]``."""
        rows = self.method.apply(ids).to(self.dtype)
        return rows if self.scale is None else rows * self.scale.to(rows.dtype)


class QuantExperts(nn.Module):
    """Experts, each with its own two methods: ``gate_up [2I, H]`` and ``down [H, I]``.

    Takes the place of a transformers experts module: everything between the router and the sum over experts. Only
    the experts that a batch selects are touched.
    """

    def __init__(self, gate_up: list[QuantMethod], down: list[QuantMethod], original: Any) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.act_fn = original.act_fn
        self.num_experts = len(gate_up)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens ``[T, H]``, LongTensor ``[T, k]`` and weights ``[T, k]`` to ``[T, H]``."""
        out = torch.zeros_like(hidden_states)
        for e in torch.unique(top_k_index).tolist():
            if e >= self.num_experts:  # The router's mark for a token that no expert takes.
                continue
            tokens, place = torch.where(top_k_index == e)
            gate, up = self.gate_up[e].apply(hidden_states[tokens]).chunk(2, dim=-1)
            y = self.down[e].apply(self.act_fn(gate) * up)
            out.index_add_(0, tokens, (y * top_k_weights[tokens, place, None]).to(out.dtype))
        return out
