"""LoRA adapters of PEFT on quantized linear layers."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer, model
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge

from ...engine.modules import QuantLinear
from ...errors import UsageError
from .dequantize import dense_linear
from .policy import announce


class QuantLoraLinear(layer.Linear):
    """A quantized linear layer with adapters beside it: ``base(x) + B(A(x)) * scaling``.

    Merging makes a 16-bit layer, because no quantized one holds the sum without another rounding; unmerging puts the quantized
    layer back as it was.
    """

    def __init__(self, base_layer: Any, adapter_name: str, config: Any, **kwargs: Any) -> None:
        for option in ("use_dora", "use_bdlora", "velora_config", "monteclora_config"):
            if getattr(config, option, None):
                raise UsageError(
                    f"LoraConfig has {option}, which looks at the base weight; a quantized layer has none, so leave it out"
                )
        if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
            raise UsageError(
                f"LoraConfig has init_lora_weights={config.init_lora_weights!r}, which changes the base weight; a quantized layer keeps its "
                "own, so use True, False, 'gaussian' or 'orthogonal'"
            )
        layer_held = base_layer.method.decision.layer
        if (layer_held.local_k, layer_held.n) != (base_layer.in_features, base_layer.out_features):
            raise UsageError(
                f"{layer_held.name} is one rank's part of a layer; adapters go on a model that is loaded with tp_size=1"
            )
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.quantized: QuantLinear | None = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put a 16-bit layer with the adapters in it in the place of the quantized one.

        :raises UsageError: where ``safe_merge`` finds a number that is not finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        base = self.get_base_layer()
        if self.quantized is None:
            announce(
                "lora", "merging adapters makes quantized layers 16 bit; quantize the merged model again to save memory"
            )
            self.quantized, base = base, dense_linear(base, base.source, base.method.dtype)
        weight = base.weight.data.float()
        for name in names:
            weight += self.get_delta_weight(name).float()
        if safe_merge and not bool(weight.isfinite().all()):
            raise UsageError(f"the adapters {', '.join(names)} hold numbers that are not finite; they were not merged")
        base.weight.data = weight.to(base.weight.dtype)
        self.base_layer = base
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Put the quantized layer back."""
        if self.quantized is not None:
            self.base_layer, self.quantized = self.quantized, None
        self.merged_adapters.clear()


def dispatch(target: Any, adapter_name: str, config: Any, **kwargs: Any) -> Any:
    """The LoRA layer for a quantized linear layer of this bridge; None for other modules, and where ``config`` brings its own."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    brought = any(isinstance(base, kind) for kind in getattr(config, "_custom_modules", None) or {})
    if brought or not isinstance(base, QuantLinear) or not hasattr(base, "source"):
        return None
    return QuantLoraLinear(target, adapter_name, config=config, **kwargs)


def enable_lora() -> None:
    """Tell PEFT of quantized layers. It is called when PEFT is imported; harmless when called again."""
    create = model.LoraModel._create_new_module
    if getattr(create, "knows_qplug", False):
        return

    def create_new_module(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> torch.nn.Module:
        found = dispatch(target, adapter_name, lora_config, **kwargs)
        module: torch.nn.Module = create(lora_config, adapter_name, target, **kwargs) if found is None else found
        return module

    create_new_module.knows_qplug = True  # type: ignore[attr-defined]
    model.LoraModel._create_new_module = staticmethod(create_new_module)
