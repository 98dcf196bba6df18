"""Which method a layer of SGLang gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from ...errors import CoverError, UsageError
from .experts import QplugExperts, check_experts
from .kv_cache import cache_method
from .layers import expert_specs, vocabulary_spec
from .linear import QplugEmbedding, QplugHead, QplugLinear

if TYPE_CHECKING:
    from .config import QplugConfig

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Linear layers that decide by small differences: no producer quantizes them, and quantization at load leaves them alone."""


def method_for(config: QplugConfig, layer: Any, prefix: str) -> Any:
    """qplug's method where anything of the layer may be quantized, else what SGLang takes for "leave it"."""
    if isinstance(layer, LinearBase):
        if config.planner().online and prefix.rpartition(".")[2] in ROUTERS:
            return UnquantizedLinearMethod()
        return QplugLinear(config, prefix)
    if isinstance(layer, VocabParallelEmbedding):
        return _vocabulary(config, layer, prefix or config.embedding())
    if isinstance(layer, FusedMoE):
        specs = [spec for pair in expert_specs(layer, prefix, config.stored) for spec in pair]
        try:
            decisions = config.plan(specs, layer.params_dtype).decisions
        except CoverError:
            check_experts(
                layer, prefix
            )  # Stacked experts, which this bridge does not read, mostly have biases: the better reason.
            raise
        if not any(decision.quantized for decision in decisions):
            return None
        check_experts(layer, prefix)
        return QplugExperts(config, decisions, layer.params_dtype)
    if isinstance(layer, RadixAttention):
        return cache_method(config, prefix)
    return None


def _vocabulary(config: QplugConfig, layer: Any, prefix: str) -> Any:
    if not prefix:
        return None
    head = isinstance(layer, ParallelLMHead)
    dtype = torch.get_default_dtype()
    tied = "embed_tokens" if head and config.tied else None
    spec = vocabulary_spec(layer, prefix, "lm_head" if head else "embedding", tied, config.stored)
    (decision,) = config.plan([spec], dtype).decisions
    if not decision.quantized:
        return None
    if config.tied:
        raise UsageError(
            f"{prefix} is quantized and tied, which qplug does not serve in SGLang; load the model with qplug's own engine"
        )
    return (QplugHead if head else QplugEmbedding)(config, decision, dtype)
