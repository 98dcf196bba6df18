"""Stored scales of the KV cache in vLLM. The cache itself, its kernels and its memory are vLLM's."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.models.utils import WeightsMapper

from ...scheme import QuantScheme, TensorQuant
from . import log

if TYPE_CHECKING:
    from ...format import CheckpointFormat
    from .config import QplugConfig

ROLES = ("q_scale", "k_scale", "v_scale")


def is_served(kv: TensorQuant) -> bool:
    """True for the cache that vLLM has with stored scales: FP8 e4m3, one scale for keys and one for values."""
    return kv.dtype == "fp8_e4m3" and kv.block == (0, 0) and kv.dynamic is not True


def cache_method(config: QplugConfig, layer: Any, prefix: str) -> BaseKVCacheMethod | None:
    """The method that loads the scales of one attention layer; None where the checkpoint has none that vLLM can use."""
    planner = config.planner(torch.get_default_dtype())
    kv = planner.config.kv
    if kv is None or planner.format is None:
        return None
    if not is_served(kv):
        log.warning(
            "the checkpoint has a KV cache of %s, which vLLM does not have with stored scales; it stays as --kv-cache-dtype says",
            QuantScheme(kv=kv),
        )
        return None
    return QplugKVCache(config, planner.format)


class QplugKVCache(BaseKVCacheMethod):
    """Scales as the format decodes them, in float32: vLLM's own parameters round them to the model's dtype."""

    def __init__(self, config: QplugConfig, fmt: CheckpointFormat) -> None:
        super().__init__(config)
        self.fmt = fmt

    def create_weights(self, layer: Any) -> None:
        """vLLM's parameters, in float32."""
        super().create_weights(layer)
        for name in (*ROLES, "prob_scale"):
            getattr(layer, name).data = torch.tensor(-1.0, dtype=torch.float32)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Divisors become factors before vLLM takes them."""
        if hasattr(layer, "k_scale"):
            stored: dict[str, Tensor] = {r: getattr(layer, r).data for r in ROLES if getattr(layer, r) > 0}
            for role, value in self.fmt.decode_kv(stored).items():
                if role in ROLES:
                    getattr(layer, role).data = value.reshape(()).float()
        super().process_weights_after_loading(layer)


def scale_mapper(config: QplugConfig, default: Any) -> Any:
    """vLLM's renaming of scale names, with the names of the checkpoint's format before it; all are dropped where they are not used."""
    planner = config._planner
    if planner is None or planner.format is None:
        return default
    kv = planner.config.kv
    if kv is None:
        return default
    roles = list(planner.format.kv_tensors("@").items())
    stored = {
        name.removeprefix("@"): role
        for role, names in reversed(roles)  # AutoFP8's one scale is that of the keys, for vLLM.
        for name in ((names,) if isinstance(names, str) else names)
    }
    rules: dict[Any, str | None] = {}
    for suffix in sorted(stored, key=len, reverse=True):
        role = stored[suffix]
        pattern = re.compile(rf"^(.+)(?<!\.attn){re.escape(suffix)}$")
        rules[pattern] = rf"\1.attn.{role}" if is_served(kv) and role in ROLES else None
    return WeightsMapper(orig_to_new_regex=rules) | default
