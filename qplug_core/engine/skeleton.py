"""A model definition without weights: parameters on the meta device, buffers that no checkpoint holds computed."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from ..errors import CheckpointError, ConfigError
from ..source import Source


def model_config(source: Source) -> Any:
    """The Hugging Face config of a checkpoint, without its ``quantization_config``: that part is qplug's.

    :raises ConfigError: for an architecture that the installed transformers does not have.
    """
    if not source.config:
        raise CheckpointError(f"{source.path} has no config.json; the reference engine needs it to know the architecture")
    fields = {key: value for key, value in source.config.items() if key not in ("quantization_config", "compression_config")}
    # transformers 5 writes infinity as an object of its own, because JSON has none.
    fields = PreTrainedConfig._decode_special_floats(fields)
    model_type = fields.pop("model_type", None)
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ConfigError(
            f"config.json of {source.path} has model_type {model_type!r}, which transformers {transformers.__version__} does not build "
            f"({' '.join(str(error).split())}); correct it or install a transformers that knows it"
        ) from None


class TransposedLinear(nn.Linear):
    """In the place of GPT-2's ``Conv1D``: the same layer, whose 16-bit weight is stored ``[K, N]``."""

    def __init__(self, original: Conv1D) -> None:
        k, n = original.weight.shape
        super().__init__(k, n, dtype=original.weight.dtype)
        self.bias = original.bias


def skeleton(config: Any, dtype: torch.dtype) -> Any:
    """The model of ``config`` with every parameter on meta, in ``dtype``: causal where there is such a class, else as named.

    The class is the first of ``architectures`` that transformers has, so that encoders get their own forward.
    """
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    cls = next((c for c in named if c is not None), None)
    with torch.device("meta"):
        if cls is not None:
            model = cls._from_config(config, dtype=dtype)
        elif type(config) in AutoModelForCausalLM._model_mapping:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            model = AutoModel.from_config(config, dtype=dtype)
        for name, module in list(model.named_modules()):
            if isinstance(module, Conv1D):
                model.set_submodule(name, TransposedLinear(module))
    _compute_buffers(model)
    return model.eval()


def _compute_buffers(model: Any) -> None:
    """Give storage and values to buffers that are in no checkpoint (rotary frequencies, masks, position ids).

    Most are computed where transformers initializes a module; a few (Falcon-H1's) only where its constructor runs.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    owners = {"": model, **{name: m for name, m in model.named_modules() if isinstance(m, PreTrainedModel)}}
    for name, module in model.named_modules():
        hidden = {n: b for n, b in module._buffers.items() if b is not None and n in module._non_persistent_buffers_set}
        if not hidden:
            continue
        for n, buffer in hidden.items():
            module._buffers[n] = torch.full_like(buffer, _unset(buffer.dtype), device="cpu")
        # A model inside of a model knows its own buffers.
        owners[max((o for o in owners if f"{name}.".startswith(f"{o}.") or not o), key=len)]._init_weights(module)
        for n in hidden:
            if _is_unset(module._buffers[n]):
                module._buffers[n] = _constructed(model)[f"{name}.{n}"]


def _constructed(model: Any) -> dict[str, torch.Tensor]:
    """The buffers of a model that is constructed with memory for its weights, which nothing writes to and so takes none."""
    with torch.device("cpu"), no_init_weights():
        return dict(type(model)._from_config(model.config, dtype=model.dtype).named_buffers())


def _unset(dtype: torch.dtype) -> float | int | bool:
    return (
        float("nan")
        if dtype.is_floating_point or dtype.is_complex
        else False
        if dtype == torch.bool
        else torch.iinfo(dtype).min
    )


def _is_unset(buffer: torch.Tensor) -> bool:
    if buffer.dtype == torch.bool or not buffer.numel():
        return False
    if buffer.dtype.is_floating_point or buffer.dtype.is_complex:
        return bool(buffer.isnan().any())
    return bool((buffer == _unset(buffer.dtype)).any())


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the state dict, by name."""
    found = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found
