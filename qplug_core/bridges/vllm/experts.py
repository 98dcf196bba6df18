"""Experts in vLLM: two methods for each expert that this rank holds; only those that a batch selects are touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig, apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from ...quant_plan import Decision
from .layers import local_experts
from .weights import Weights, place, show

if TYPE_CHECKING:
    from .config import QplugConfig


class QplugExperts(FusedMoEMethodBase):
    """``up`` is gate and up rows ``[2I, H]`` (or up alone), ``down`` is ``[H, I]``, in the order of :func:`local_experts`."""

    def __init__(self, config: QplugConfig, moe: Any, decisions: Sequence[Decision], dtype: torch.dtype) -> None:
        super().__init__(moe)
        self.config = config
        self.name = decisions[0].layer.name
        planner = config.planner(dtype)
        made = [Weights(d, config.bind(d, dtype), planner) for d in decisions]
        self.up, self.down = made[0::2], made[1::2]
        self.places: dict[int, int] = {}
        config.wait_for(self.name)

    def create_weights(self, layer: Any, *sizes: Any, **extra: Any) -> None:
        """Register an empty parameter for each kind of stored tensor, ``w13_qweight`` and so on."""
        self.places = {e: i for i, e in enumerate(local_experts(layer))}
        for which, weights in (("w13", self.up), ("w2", self.down)):
            for suffix in sorted({s for w in weights for s in w.suffixes}):
                place(layer, f"{which}_{suffix}", sum(w.elements(suffix) for w in weights), self._loader(suffix))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything came, and show vLLM the packed tensors."""
        for weights in (*self.up, *self.down):
            weights.finish()
        show(
            layer,
            {f"up{i}_": w.method for i, w in enumerate(self.up)} | {f"down{i}_": w.method for i, w in enumerate(self.down)},
        )
        self.config.arrived(self.name)

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        """Nothing that vLLM's own kernels need."""
        return FusedMoEQuantConfig.make()

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Tokens ``[T, H]``, weights and ids ``[T, k]`` to ``[T, H]``: this rank's part of the sum over experts."""
        out = torch.zeros_like(x)
        settings = ApplyMoEActivationConfig.from_configs(self.moe, FusedMoEQuantConfig.make())
        for e in torch.unique(topk_ids).tolist():
            if e not in self.places:
                continue
            tokens, slot = torch.where(topk_ids == e)
            factors = topk_weights[tokens, slot, None]
            rows = x[tokens]
            if layer.apply_router_weight_on_input:
                rows = (rows * factors).to(x.dtype)
            y = self.up[self.places[e]].method.apply(rows)
            inner = y.new_empty((y.shape[0], y.shape[1] // (2 if self.moe.is_act_and_mul else 1)))
            apply_moe_activation(layer.activation, inner, y, activation_config=settings)
            y = self.down[self.places[e]].method.apply(inner)
            if not layer.apply_router_weight_on_input:
                y = y * factors
            out.index_add_(0, tokens, y.to(out.dtype))
        return out

    def _loader(self, suffix: str) -> Any:
        def load(
            param: Any, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int, return_success: bool = False
        ) -> bool | None:
            index = self.places.get(expert_id)
            if index is not None:
                weights = self.down[index] if shard_id == "w2" else self.up[index]
                weights.take(1 if shard_id == "w3" else 0, suffix, loaded_weight)
            return (index is not None) if return_success else None

        return load
