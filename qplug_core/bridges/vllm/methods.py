"""Which method a layer of vLLM gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import GateLinear, RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from ...errors import UsageError
from ...quant_plan import Decision
from .experts import QplugExperts
from .kv_cache import cache_method
from .layers import expert_specs, linear_spec, vocabulary_spec
from .linear import QplugEmbedding, QplugLinear, TiedHead

if TYPE_CHECKING:
    from .config import QplugConfig


def method_for(config: QplugConfig, layer: Any, prefix: str) -> Any:
    """qplug's method where anything of the layer is quantized, else what vLLM takes for "leave it"."""
    dtype = getattr(layer, "params_dtype", None) or torch.get_default_dtype()
    planner = config.planner(dtype)
    if isinstance(layer, LinearBase):
        if isinstance(layer, GateLinear) and planner.online:
            return UnquantizedLinearMethod()  # A router decides by small differences, and no producer quantizes it.
        spec = linear_spec(layer, prefix, config.packed_modules_mapping, config.stored)
        (decision,) = config.plan([spec], dtype).decisions
        _note_split(config, decision, prefix)
        return QplugLinear(config, decision, dtype) if decision.quantized else UnquantizedLinearMethod()
    if isinstance(layer, VocabParallelEmbedding):
        prefix = prefix or config.embedding()
        return _vocabulary(config, layer, prefix, dtype) if prefix else None
    if isinstance(layer, RoutedExperts):
        pairs = expert_specs(layer, prefix, config.stored)
        decisions = config.plan([spec for pair in pairs for spec in pair], dtype).decisions
        return QplugExperts(config, layer.moe_config, decisions, dtype) if any(d.quantized for d in decisions) else None
    if isinstance(layer, Attention):
        return cache_method(config, layer, prefix)
    return None


def _vocabulary(config: QplugConfig, layer: Any, prefix: str, dtype: torch.dtype) -> Any:
    """The method of the head or the embedding, None for vLLM's own.

    :raises UsageError: where the two are tied and the file does not show what both need.
    """
    head = isinstance(layer, ParallelLMHead)
    tied = "embed_tokens" if head and config.tied else None
    spec = vocabulary_spec(layer, prefix, "lm_head" if head else "embedding", tied, config.stored)
    (decision,) = config.plan([spec], dtype).decisions
    if config.tied:
        if not head:
            config.quantized_embedding = decision.quantized
        both = head or not decision.quantized or config.holds_head()
        if not both or decision.quantized != config.quantized_embedding:
            raise UsageError(
                f"{prefix} is quantized and tied, and the file does not show it under both names, which vLLM needs; load the model with "
                "qplug's own engine"
            )
    if not decision.quantized:
        return None
    if head:
        return (TiedHead if config.tied else QplugLinear)(config, decision, dtype)
    return QplugEmbedding(config, decision, dtype)


def _note_split(config: QplugConfig, decision: Decision, prefix: str) -> None:
    """Tell vLLM of parts that this file holds one by one where the model's own code expects them fused."""
    leaf = prefix.rpartition(".")[2]
    parts = [part.name.rpartition(".")[2] for segment in decision.segments for part in segment.parts]
    if config.packed_modules_mapping.get(leaf, [leaf]) == [leaf] and len(set(parts)) > 1:
        for i, part in enumerate(parts):
            config.fused_here(part, leaf, "qkv"[i] if len(parts) == 3 else i)
