"""Stored scales of the KV cache in SGLang. The cache itself, its kernels and its memory are SGLang's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod
from torch import Tensor

from ...scheme import QuantScheme
from . import log
from .policy import has_fp8_scales

if TYPE_CHECKING:
    from ...format import CheckpointFormat
    from .config import QplugConfig

ROLES = ("k_scale", "v_scale")


def cache_method(config: QplugConfig, prefix: str) -> QplugKVCache | None:
    """The method that loads the scales of one attention layer; None where the checkpoint has none that SGLang can use."""
    planner = config.planner()
    kv = planner.config.kv
    if kv is None or planner.format is None:
        return None
    if not has_fp8_scales(kv):
        log.warning(
            "the checkpoint has a KV cache of %s, which SGLang does not have with stored scales; it stays as --kv-cache-dtype says",
            QuantScheme(kv=kv),
        )
        return None
    return QplugKVCache(config, planner.format, prefix)


class QplugKVCache(BaseKVCacheMethod):
    """Scales as the format decodes them. SGLang drops a scale whose name it does not know: then the load is refused."""

    def __init__(self, config: QplugConfig, fmt: CheckpointFormat, prefix: str) -> None:
        super().__init__(config)
        self.config, self.fmt = config, fmt
        self.attention = prefix.rpartition(".")[0]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Divisors become factors before SGLang takes them.

        :raises ValueError: where the file holds scales of this layer that did not come.
        """
        stored: dict[str, Tensor] = {role: getattr(layer, role).data for role in ROLES if getattr(layer, role) > 0}
        if not stored and (held := self._held()):
            raise ValueError(
                f"SGLang did not load {held}, the scale of a quantized KV cache, because it knows no such name; report the model"
            )
        for role, value in self.fmt.decode_kv(stored).items():
            if role in ROLES:
                getattr(layer, role).data = value.reshape(()).float()
        super().process_weights_after_loading(layer)

    def _held(self) -> str:
        """The name of a stored scale of this layer, an empty string where there is none."""
        tensors = self.config.planner().source.tensors
        named = self.fmt.kv_tensors(self.attention).values()
        names = [name for each in named for name in ((each,) if isinstance(each, str) else each)]
        return next((name for name in names if name in tensors), "")
