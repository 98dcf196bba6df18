"""Experts in vLLM: two methods for each expert that this rank holds; only those that a batch selects are touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import op_registry
from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig, apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from ...errors import QplugError, UsageError
from ...quant_plan import Decision
from .layers import STACKS, local_experts
from .weights import Weights, place, show

if TYPE_CHECKING:
    from .config import QplugConfig


def check_graphs(name: str, vendor: str, eager: bool) -> None:
    """Refuse CUDA graphs, which would record the experts of one batch.

    :raises UsageError: one sentence.
    """
    if vendor != "cpu" and not eager:
        raise UsageError(f"{name} chooses experts on the host, which no CUDA graph records; start vLLM with --enforce-eager")


class QplugExperts(FusedMoEMethodBase):
    """``up`` is gate and up rows ``[2I, H]`` (or up alone), ``down`` is ``[H, I]``, in the order of :func:`local_experts`.

    ``biases``: those of this rank's experts, ``[2I]`` and ``[H]`` each, or nothing.

    :raises UsageError: for experts with biases that are stored one by one, which no model of vLLM has, and where CUDA graphs are on.
    """

    def __init__(self, config: QplugConfig, moe: Any, decisions: Sequence[Decision], dtype: torch.dtype) -> None:
        super().__init__(moe)
        self.config = config
        self.name, self.dtype = decisions[0].layer.name, dtype
        planner = config.planner(dtype)
        check_graphs(self.name, planner.device.vendor, get_current_vllm_config().model_config.enforce_eager)
        made = [Weights(d, config.bind(d, dtype), planner) for d in decisions]
        self.up, self.down = made[0::2], made[1::2]
        self.places: dict[int, int] = {}
        self.biases: list[tuple[Tensor, Tensor]] = []
        self.stacks = sorted({name for w in made for name in w.stacks})
        if moe.has_bias and not self.stacks:
            raise UsageError(
                f"{self.name} has a bias and is stored by itself, where a stack of all experts was needed; load the model with qplug's own engine"
            )
        if moe.has_bias:
            parent = self.stacks[0].rpartition(".")[0]
            self.stacks += [f"{parent}.{name}_bias" for name in STACKS]
        self.missing: set[str] = set()
        op = moe.activation.custom_op_name
        lacking = moe.activation.is_gated and not hasattr(torch.ops._C, op)  # vLLM's CPU build has few of them compiled.
        self.native = op_registry[op]().forward_native if lacking else None
        config.wait_for(self.name)

    def create_weights(self, layer: Any, *sizes: Any, **extra: Any) -> None:
        """Register an empty parameter for each kind of stored tensor, ``w13_qweight`` and so on; for stacks, by vLLM's own names."""
        self.places = {e: i for i, e in enumerate(local_experts(layer))}
        for which, weights in (("w13", self.up), ("w2", self.down)):
            for suffix in sorted({s for w in weights for s in w.suffixes}):
                name = f"{which}_{self.config.flat(suffix)}"
                place(layer, name, sum(w.elements(suffix) for w in weights), self._loader(suffix))
        self.missing = {self.config.renamed(name).rpartition(".")[2] for name in self.stacks}
        for name in sorted(self.missing):
            place(layer, name, 0, self._noter(name))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything came, and show vLLM the packed tensors."""
        if self.stacks:
            self._read()
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
        for e in torch.unique(topk_ids).tolist():
            if e not in self.places:
                continue
            at = self.places[e]
            tokens, slot = torch.where(topk_ids == e)
            factors = topk_weights[tokens, slot, None]
            rows = x[tokens]
            if layer.apply_router_weight_on_input:
                rows = (rows * factors).to(x.dtype)
            first, second = self.biases[at] if self.biases else (None, None)
            y = self.down[at].method.apply(self._activate(layer, self.up[at].method.apply(rows, first)), second)
            if not layer.apply_router_weight_on_input:
                y = y * factors
            out.index_add_(0, tokens, y.to(out.dtype))
        return out

    def _activate(self, layer: Any, y: Tensor) -> Tensor:
        """``[T, 2I]`` (or ``[T, I]`` without gate) to ``[T, I]``, as vLLM computes it on this device."""
        if self.native is not None:
            activated: Tensor = self.native(y)
            return activated
        settings = ApplyMoEActivationConfig.from_configs(self.moe, FusedMoEQuantConfig.make())
        inner = y.new_empty((y.shape[0], y.shape[1] // (2 if self.moe.is_act_and_mul else 1)))
        apply_moe_activation(layer.activation, inner, y, activation_config=settings)
        return inner

    def _read(self) -> None:
        """Read this rank's experts, and cuts of them, from the file: vLLM brings stacks that the model's own code has cut already."""
        if self.missing:
            raise ValueError(
                f"vLLM did not bring {' and '.join(sorted(self.missing))} of {self.name}; nothing was loaded into the layer, so give the "
                "whole checkpoint"
            )
        try:
            source = self.config.readable()
        except QplugError as error:
            raise ValueError(str(error)) from None
        for weights in (*self.up, *self.down):
            weights.read(source)
        if not self.moe.has_bias:
            return
        first, second = (source.read(name).to(self.dtype) for name in self.stacks[-2:])
        if self.moe.moe_parallel_config.tp_rank:
            second = torch.zeros_like(second)  # The ranks' sums are added.
        device = self.config.planner(self.dtype).device.torch_device()
        for e, at in self.places.items():
            part = self.up[at].decision.segments[0].parts[0]
            start, stop = part.rows or (0, part.n)
            self.biases.append((first[e, start:stop].to(device), second[e].to(device)))

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

    def _noter(self, name: str) -> Any:
        def note(*given: Any, **options: Any) -> bool:
            if self.up[0].loaded:
                raise ValueError(
                    f"{self.name} is one of experts that are stored as a stack, which qplug cannot reload in vLLM; start vLLM with the new checkpoint"
                )
            self.missing.discard(name)
            return True

        return note
