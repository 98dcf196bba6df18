"""QplugHfQuantizer: what transformers calls while it loads and saves a model that qplug serves."""

from __future__ import annotations

from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer

from ...errors import QplugError, UsageError
from . import changed, unsupported
from .config import QplugConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class QplugHfQuantizer(HfQuantizer):
    """Loads with the plan, the loader and the kernels of qplug; transformers keeps its model, its devices and its generation."""

    requires_calibration = False

    def __init__(self, quantization_config: QplugConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.loading: Any = None
        self.dtype = torch.bfloat16

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a transformers that this bridge does not know.

        :raises UsageError: naming the versions.
        """
        if reason := unsupported():
            raise UsageError(reason)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Refuse dtypes that are no activations.

        :raises UsageError: naming those that are.
        """
        if dtype not in DTYPES:
            raise UsageError(f"dtype {dtype} was asked for; float32, bfloat16 or float16 is needed")
        self.dtype = dtype
        return dtype

    def update_device_map(self, device_map: Any) -> Any:
        """One device: packed weights are laid out for it.

        :raises UsageError: for a map over several, and for a device that has no kernels or is not here.
        """
        places = set(device_map.values()) if isinstance(device_map, dict) else set()
        if isinstance(device_map, str) and torch.cuda.device_count() <= 1:
            places = {"cuda:0" if torch.cuda.is_available() else "cpu"}
        elif isinstance(device_map, str):
            raise UsageError(
                f"device_map={device_map!r} was given; qplug packs for one device, so give device_map={{'': 'cuda:0'}}"
            )
        if len(places) > 1:
            raise UsageError(
                f"device_map has {len(places)} devices; qplug packs for one, so give device_map={{'': 'cuda:0'}}"
            )
        for place in places:
            found = f"cuda:{place}" if isinstance(place, int) else str(place)
            if found.partition(":")[0] not in ("cpu", "cuda"):
                raise UsageError(
                    f"device_map has {found!r}; qplug packs for a CPU or a GPU (cuda), so give device_map={{'': 'cpu'}}"
                )
            if found != "cpu" and not torch.cuda.is_available():
                raise UsageError(f"device_map has {found!r} and torch sees no GPU here; give device_map={{'': 'cpu'}}")
        return device_map if not places else {"": next(iter(places))}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Plan, and put modules in place; the model is on meta."""
        try:
            from .loading import Loading

            found = (kwargs.get("device_map") or {}).get("", "cpu")
            device = f"cuda:{found}" if isinstance(found, int) else str(found)
            self.loading = Loading(model, self.quantization_config, self.dtype, device, kwargs["checkpoint_files"])
        except QplugError:
            raise
        except (AttributeError, ImportError, KeyError, TypeError) as error:
            if isinstance(error, ImportError) and str(error.name).startswith("qplug"):
                raise  # Not transformers' fault, and nobody is helped by being told so.
            raise UsageError(changed(error)) from error
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Read the quantized weights, from the checkpoint to the kernels."""
        self.loading.finish()
        method = self.loading.planner.config.method
        if self.quantization_config.stored is None and method and self.quantization_config.scheme is None:
            said = self.loading.source.quant_config or {}
            # FastDeploy's key for the same thing is another, and its values are names of their own.
            self.quantization_config.stored = {"quant_method": said.get("quantization") or method, **said}
        model.quant_plan = self.loading.plan
        model._weight_conversions = []
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """What ``save_pretrained`` writes: tensors of the format, under their stored names; None where it writes an adapter alone."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        from .saving import stored_state

        return stored_state(model, self.loading, self.quantization_config)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Every quantized layer as 16 bit; ``model.dequantize()``."""
        from .dequantize import dequantize_model

        return dequantize_model(model, self.loading, dtype)

    def is_serializable(self) -> bool:
        """True: what is loaded can be saved, or the error says why not."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: kernels have no backward."""
        return False


def new_cache(model: Any) -> Any:
    """An empty KV cache for ``model.generate(past_key_values=...)``: as the checkpoint says, or ``QplugConfig(kv_cache=...)``.

    :raises UsageError: for a model that qplug did not load.
    """
    from ...engine.cache import quant_cache

    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, QplugHfQuantizer):
        raise UsageError(
            f"{type(model).__name__} was not loaded by qplug; load it with quantization_config=QplugConfig(...)"
        )
    return quant_cache(model.config, quantizer.loading.coders)
