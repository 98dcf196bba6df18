"""Experts in SGLang: two methods for each expert that this rank holds; only those that a batch selects are touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.runtime_context import get_server_args
from torch import Tensor
from torch.nn import functional

from ...errors import QplugError, UsageError
from ...quant_plan import Decision
from .layers import local_experts
from .weights import Weights, place, show

if TYPE_CHECKING:
    from .config import QplugConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": functional.silu, "gelu": functional.gelu}


def check_experts(layer: Any, prefix: str) -> None:
    """Refuse what this bridge does not compute.

    :raises UsageError: one sentence.
    """
    config, args = layer.moe_runner_config, get_server_args()
    own = "; load the model with qplug's own engine"
    limits = (config.gemm1_alpha, config.gemm1_beta, config.gemm1_clamp_limit, config.swiglu_limit)
    facts = (
        (layer.with_bias, f"has experts with biases, which qplug does not serve in SGLang{own}"),
        (
            config.activation not in ACTIVATIONS or any(limit is not None for limit in limits),
            f"has experts with another activation than silu or gelu, which qplug does not serve in SGLang{own}",
        ),
        (
            layer.num_fused_shared_experts,
            "fuses shared experts into the others; start SGLang with --disable-shared-experts-fusion",
        ),
        (
            args.enable_eplb or args.ep_num_redundant_experts,
            "has copies of experts; start SGLang without --enable-eplb and redundant experts",
        ),
        (
            torch.get_default_device().type != "cpu" and not args.disable_cuda_graph,
            "chooses experts on the host, which no CUDA graph records; start SGLang with --disable-cuda-graph",
        ),
    )
    for wrong, sentence in facts:
        if wrong:
            raise UsageError(f"{prefix} {sentence}")


class QplugExperts(FusedMoEMethodBase):
    """``up`` is gate and up rows ``[2I, H]`` (or up alone), ``down`` is ``[H, I]``, in the order of this rank's own numbers."""

    fuse_routed_scaling_factor_in_topk = True
    """A model's factor for routed experts belongs to the weights that the router gives."""

    def __init__(self, config: QplugConfig, decisions: Sequence[Decision], dtype: torch.dtype) -> None:
        self.quant_config = config
        self.name = decisions[0].layer.name
        planner = config.planner(dtype)
        try:
            made = [Weights(d, config.bind(d, dtype), planner) for d in decisions]
        except QplugError as error:
            raise ValueError(str(error)) from None
        self.up, self.down = made[0::2], made[1::2]
        self.places: dict[int, int] = {}
        config.wait_for(self.name)

    def create_weights(self, layer: Any, *sizes: Any, **extra: Any) -> None:
        """Register an empty parameter for each kind of stored tensor, ``w13_qweight`` and so on."""
        self.places = {e: i for i, e in enumerate(local_experts(layer))}
        for which, weights in (("w13", self.up), ("w2", self.down)):
            for suffix in sorted({s for w in weights for s in w.suffixes}):
                place(layer, f"{which}_{suffix}", sum(w.elements(suffix) for w in weights), self._loader(suffix))

    def create_moe_runner(self, layer: Any, moe_runner_config: Any) -> None:
        """No runner: with none, SGLang gives this rank's own numbers of experts."""
        self.settings = moe_runner_config

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything came, and show SGLang the packed tensors."""
        for weights in (*self.up, *self.down):
            weights.finish()
        up = {f"up{i}_": w.method for i, w in enumerate(self.up)}
        show(layer, up | {f"down{i}_": w.method for i, w in enumerate(self.down)})
        self.quant_config.arrived(self.name)

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        """Tokens ``[T, H]`` with weights and ids ``[T, k]`` to ``[T, H]``: this rank's part of the sum over experts."""
        x: Tensor = dispatch_output.hidden_states
        weights, ids = dispatch_output.topk_output.topk_weights, dispatch_output.topk_output.topk_ids
        out = torch.zeros_like(x)
        before = self.settings.apply_router_weight_on_input
        for e in torch.unique(ids).tolist():
            if not 0 <= e < len(self.up):  # -1 marks experts of other ranks, and tokens that no expert takes.
                continue
            tokens, slot = torch.where(ids == e)
            factors = weights[tokens, slot, None]
            rows = (x[tokens] * factors).to(x.dtype) if before else x[tokens]
            y = self.down[e].method.apply(self._activate(self.up[e].method.apply(rows)))
            out.index_add_(0, tokens, (y if before else y * factors).to(out.dtype))
        return StandardCombineInput(hidden_states=out)

    def _activate(self, y: Tensor) -> Tensor:
        act = ACTIVATIONS[self.settings.activation]
        if not self.settings.is_gated:
            return act(y)
        gate, up = y.chunk(2, dim=-1)
        return act(gate) * up

    def _loader(self, suffix: str) -> Any:
        def load(param: Any, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int) -> None:
            index = self.places.get(expert_id)
            if index is not None:
                weights = self.down[index] if shard_id == "w2" else self.up[index]
                weights.take(1 if shard_id == "w3" else 0, suffix, loaded_weight)

        return load
