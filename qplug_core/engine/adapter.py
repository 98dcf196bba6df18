"""LoRA adapters of PEFT on a model with quantized linear layers: ``y = quantized(x) + scaling * B(A(x))``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError, UsageError
from .modules import QuantLinear

try:
    from peft import LoraConfig, PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils import load_peft_weights
except ImportError as error:
    raise UsageError(f"a LoRA adapter was given and PEFT is not usable ({error}); pip install peft") from None


DORA = "the adapter is DoRA, which needs the norm of the whole weight; use a LoRA adapter on quantized layers"


class QuantLora(nn.Module, LoraLayer):  # type: ignore[misc]
    """PEFT's layer over a :class:`QuantLinear`: the weight stays packed, what A and B add is computed in their own dtype.

    It is never merged: the sum of a quantized weight and an adapter is no quantized weight.
    """

    base_layer: Any
    update_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    scaling: Any
    active_adapters: Any

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, r: int = 0, lora_alpha: int = 1, **more: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        if config.use_dora:
            raise UsageError(DORA)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **more)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def forward(self, x: Tensor) -> Tensor:
        """``[*, K]`` to ``[*, N]``."""
        y: Tensor = self.base_layer(x)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.lora_A:
                a, b = self.lora_A[name], self.lora_B[name]
                inner = self.lora_dropout[name](x.to(a.weight.dtype))
                y = (y + b(a(inner)) * self.scaling[name]).to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused."""
        raise UsageError(
            "an adapter was to be merged into quantized weights, which cannot hold the sum; keep it apart, or merge it into the 16-bit "
            "checkpoint and quantize that"
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""


def register(config: LoraConfig) -> LoraConfig:
    """Make a LoRA config know quantized layers, for ``PeftModel(engine.model, config)`` and the like; the config comes back."""
    config._register_custom_module({QuantLinear: QuantLora})
    return config


def add_adapter(model: nn.Module, path: str | Path, name: str) -> tuple[str, ...]:
    """Load the LoRA adapter in ``path`` over the layers of ``model`` that it names, and make it the active one; the modules come back.

    :raises UsageError: for a name in use, or an adapter that is no LoRA or is for experts.
    :raises CheckpointError: where its tensors and those layers are not the same set.
    """
    try:
        config = PeftConfig.from_pretrained(str(path))
        weights = load_peft_weights(str(path), device="cpu")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} holds no adapter of PEFT ({str(error).splitlines()[0]}); give a folder with adapter_config.json and its weights"
        ) from None
    if not isinstance(config, LoraConfig) or getattr(config, "target_parameters", None):
        kind = (
            "for parameters without a module (experts)"
            if isinstance(config, LoraConfig)
            else f"a {config.peft_type} adapter"
        )
        raise UsageError(f"{path} is {kind}; a LoRA adapter for linear layers is needed")
    if config.use_dora:
        raise UsageError(DORA)
    if any(name in _own(layer) for _, layer in _layers(model)):
        raise UsageError(f"an adapter called {name!r} is loaded already; give another name")
    config.inference_mode = True
    try:
        inject_adapter_in_model(register(config), model, name)
    except ValueError as error:
        raise CheckpointError(f"{path} does not fit the model: {str(error).splitlines()[0]}") from None
    try:
        done = set_peft_model_state_dict(model, weights, name)
    except RuntimeError as error:
        remove_adapter(model, name)
        shapes = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{path} has other shapes than the model ({shapes}); load the model it was made for") from None
    lost = [*(key for key in done.missing_keys if f".{name}." in key), *done.unexpected_keys]
    if lost:
        remove_adapter(model, name)
        raise CheckpointError(
            f"{path} and the model differ in {len(lost)} tensors, {lost[0]} for one; load the model that the adapter was made for"
        )
    use_adapter(model, name)
    return tuple(n for n, layer in _layers(model) if name in _own(layer))


def use_adapter(model: nn.Module, name: str | None) -> None:
    """Make one adapter the active one, or none.

    :raises UsageError: for a name that was not loaded.
    """
    layers = _layers(model)
    known = sorted({n for _, layer in layers for n in _own(layer)})
    if name is not None and name not in known:
        raise UsageError(f"no adapter is called {name!r}; loaded are {', '.join(known) or 'none'}")
    for _, layer in layers:
        layer.enable_adapters(name is not None)
        if name is not None:
            layer.set_adapter(name, inference_mode=True)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter out; layers that have no other are as they were."""
    for place, layer in _layers(model):
        if name in _own(layer):
            layer.delete_adapter(name)
        if not _own(layer):
            model.set_submodule(place, layer.base_layer)
    getattr(model, "peft_config", {}).pop(name, None)


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(place, module) for place, module in model.named_modules() if isinstance(module, LoraLayer)]


def _own(layer: Any) -> set[str]:
    """Names of the adapters of one layer."""
    return {*layer.lora_A, *layer.lora_embedding_A}
