"""Modules that stand in a Hugging Face model where a weight was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..experts import group
from ..method import QuantMethod
from .weight_view import WeightView


class _Packed(nn.Module):
    """A module whose weights are packed for one device and dtype, and are no parameters that torch could move."""

    def methods(self) -> list[QuantMethod]:
        """The weights."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What ``.to()``, ``.half()`` and ``.cuda()`` call; biases follow where the weights need not."""
        method = self.methods()[0]
        device, dtype = getattr(method, "device", None), getattr(method, "dtype", None)
        if device is not None and dtype is not None:
            moved = fn(torch.empty(0, device=device, dtype=dtype))
            if (moved.device.type, moved.dtype) != (torch.device(device).type, dtype):
                raise UsageError(
                    f"{method.decision.layer.name} is packed for {dtype} on {device} and was to become {moved.dtype} on {moved.device}; "
                    "load the model with that dtype and device instead"
                )
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class QuantLinear(_Packed):
    """A linear layer whose weight is a QuantMethod. ``bias`` is a parameter of the model, ``[N]`` or None."""

    def __init__(self, method: QuantMethod, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.method = method
        self.bias = bias
        self.in_features, self.out_features = method.decision.layer.local_k, method.decision.layer.n

    def methods(self) -> list[QuantMethod]:
        """The one weight."""
        return [self.method]

    @property
    def weight(self) -> Tensor:
        """What models and PEFT see as the weight."""
        dtype, device = getattr(self.method, "dtype", None), getattr(self.method, "device", None)
        if dtype is None or device is None or torch.compiler.is_compiling():
            return torch.empty(0, dtype=dtype, device=device)
        return WeightView(self.method, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """``[*, K]`` to ``[*, N]``."""
        return self.method.apply(x, self.bias)

    def extra_repr(self) -> str:
        """Shape, scheme and kernel."""
        segments = self.method.decision.segments
        return f"{self.in_features}, {self.out_features}, " + ", ".join(f"{s.scheme or '16 bit'}" for s in segments)


class QuantEmbedding(_Packed):
    """An embedding whose weight is a QuantMethod; rows come in ``dtype``."""

    def __init__(self, method: QuantMethod, dtype: torch.dtype, scale: Tensor | None) -> None:
        super().__init__()
        self.method = method
        self.dtype = dtype
        self.scale = scale

    def methods(self) -> list[QuantMethod]:
        """The one weight."""
        return [self.method]

    def forward(self, ids: Tensor) -> Tensor:
        """LongTensor ``[*]`` to ``[*, K]``."""
        rows = self.method.apply(ids).to(self.dtype)
        return rows if self.scale is None else rows * self.scale.to(rows.dtype)


class QuantExperts(_Packed):
    """Experts, each with its own two methods: ``gate_up [2I, H]`` (or ``up [I, H]``) and ``down [H, I]``.

    Takes the place of a transformers experts module: everything between the router and the sum over experts. Only
    the experts that a batch selects are touched, in one call for each projection where their kernel has one.
    ``original``: that module without its weights, which knows the activation and holds the biases. ``halves``: gate
    rows come before up rows, though the module interleaves them.
    """

    def __init__(self, up: list[QuantMethod], down: list[QuantMethod], original: Any, halves: bool) -> None:
        super().__init__()
        self.up = up
        self.down = down
        self.original = original
        self.halves = halves and not getattr(original, "is_concatenated", True)
        self.gated = up[0].decision.layer.n == 2 * down[0].decision.layer.local_k
        self.num_experts = len(up)
        self.groups = group(up), group(down)

    def methods(self) -> list[QuantMethod]:
        """Of all experts."""
        return [*self.up, *self.down]

    def forward(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        """Tokens ``[T, H]``, LongTensor ``[T, k]`` and weights ``[T, k]`` to ``[T, H]``; or tokens sorted by expert alone (Llama 4)."""
        if None not in self.groups:
            return self._grouped(hidden_states, *routing)
        if not routing:
            pieces = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
            return torch.cat([self._expert(e, x) for e, x in enumerate(pieces)])
        top_k_index, top_k_weights = routing
        out = torch.zeros_like(hidden_states)
        for e in torch.unique(top_k_index).tolist():
            if e >= self.num_experts:  # The router's mark for a token that no expert takes.
                continue
            tokens, place = torch.where(top_k_index == e)
            y = self._expert(e, hidden_states[tokens])
            out.index_add_(0, tokens, (y * top_k_weights[tokens, place, None]).to(out.dtype))
        return out

    def _grouped(self, x: Tensor, *routing: Tensor) -> Tensor:
        """As :meth:`forward`, with one call for all experts of a projection."""
        up, down = self.groups
        assert up is not None
        assert down is not None
        up_bias, down_bias = self._biases()
        if not routing:
            ends = torch.arange(1, self.num_experts + 1, device=x.device) * (x.shape[0] // self.num_experts)
            return down.apply(self._activate(up.apply(x, ends, up_bias)), ends, down_bias)
        top_k_index, top_k_weights = routing
        # What is no expert is a mark of the router for a token that none takes: those rows come last, and are 0.
        experts = top_k_index.reshape(-1).clamp(max=self.num_experts)
        sorted_experts, order = experts.sort(stable=True)
        ends = torch.searchsorted(sorted_experts, torch.arange(self.num_experts, device=x.device), right=True)
        tokens = order // top_k_index.shape[-1]
        y = down.apply(self._activate(up.apply(x[tokens], ends, up_bias)), ends, down_bias)
        y = (y * top_k_weights.reshape(-1)[order, None]).to(x.dtype)
        return torch.zeros_like(x).index_add_(0, tokens, y)

    def _biases(self) -> tuple[Tensor | None, Tensor | None]:
        """``[E, N]`` of both projections, where there are any."""
        name = "gate_up_proj_bias" if self.gated else "up_proj_bias"
        return getattr(self.original, name, None), getattr(self.original, "down_proj_bias", None)

    def _expert(self, e: int, x: Tensor) -> Tensor:
        """``x [M, H]`` through one expert, biases included."""
        up_bias, down_bias = self._biases()
        y = self.up[e].apply(x, None if up_bias is None else up_bias[e])
        return self.down[e].apply(self._activate(y), None if down_bias is None else down_bias[e])

    def _activate(self, y: Tensor) -> Tensor:
        if not self.gated:
            return self.original.act_fn(y)  # type: ignore[no-any-return]
        if self.halves:
            y = torch.stack(y.chunk(2, dim=-1), dim=-1).flatten(-2)
        if hasattr(self.original, "_apply_gate"):
            return self.original._apply_gate(y)  # type: ignore[no-any-return]
        gate, up = y.chunk(2, dim=-1)
        return self.original.act_fn(gate) * up  # type: ignore[no-any-return]
