"""GGUF files: ``from_pretrained(folder, gguf_file=...)`` with weights that stay quantized.

transformers keeps the weights of a few families in blocks, where it has a kernel for the device, and turns all others into 16 or 32
bit. Which of the two is known when the file is open: until then, and for those that transformers runs, its own quantizer is in charge.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from ...errors import QplugError, UsageError
from ...registry import get_registry
from ...repository import open_checkpoint
from ...source import Source
from .config import QplugConfig
from .policy import VARIABLE, announce
from .quantizer import QplugHfQuantizer


class GgufChooser(GgufHfQuantizer):
    """transformers' quantizer, which becomes qplug's where it would dequantize the whole file.

    ``model_config``: what the model will be made from. ``ours``: what the caller asked of qplug.
    """

    model_config: Any = None
    ours: QplugConfig | None = None

    def read_header(self, gguf_file: str) -> None:
        """Open the file, and decide.

        :raises QplugError: for a file that qplug was asked to load and cannot.
        """
        asked = bool(self.quantization_config.dequantize)
        super().read_header(gguf_file)
        stays = asked or (self.supported and not self.quantization_config.dequantize)
        if self.model_config is None or (self.ours is None and stays):
            return
        from .loading import plain_torch

        try:
            with plain_torch():
                source = open_checkpoint(gguf_file, get_registry())
        except QplugError as error:
            if self.ours is not None:
                raise
            announce(gguf_file, f"transformers dequantizes {gguf_file}: qplug does not read it here ({error})")
            return
        if source.quant_config is not None:
            reason = "transformers would dequantize the whole model here" if self.ours is None else "QplugConfig says so"
            announce(gguf_file, f"qplug serves {gguf_file}: {reason} ({VARIABLE}=0 leaves it to transformers)")
            self._hand_over(source)

    def _hand_over(self, source: Source) -> None:
        """Be qplug's quantizer from here on; the model is made as qplug reads the file."""
        from ...engine.skeleton import model_config
        from .loading import plain_torch

        assert source.quant_config is not None
        with plain_torch():
            read = model_config(source)
        for key in source.config.keys() - {"architectures", "model_type"}:
            setattr(self.model_config, key, getattr(read, key))
        config = (self.ours or QplugConfig()).of(source.quant_config)
        self.model_config.quantization_config = self.quantization_config = config
        self.loading: Any = None
        self.__class__ = QplugGgufQuantizer


class QplugGgufQuantizer(QplugHfQuantizer):
    """A GGUF file that qplug loads."""

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """As for other files; where nothing says a dtype it is torch's default, as transformers has it for these families."""
        return super().update_dtype(torch.get_default_dtype() if dtype is None else dtype)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        kwargs["device_map"] = self.update_device_map(kwargs.get("device_map"))
        return super()._process_model_before_weight_loading(model, **kwargs)

    def get_state_dict(self, checkpoint_file: str, model: Any) -> dict[str, Tensor]:
        """The tensors that are no blocks, under the model's names: transformers reads these."""
        from .loading import plain_torch

        source = self.loading.source
        with plain_torch():
            return {name: source.read(name) for name, info in source.tensors.items() if info.dtype != "U8"}

    def is_serializable(self) -> bool:
        """See :class:`QplugHfQuantizer`.

        :raises UsageError: because no other file than a GGUF one holds these blocks.
        """
        raise UsageError(
            f"{self.loading.source.path} is a GGUF file, whose blocks no safetensors file holds; copy the file itself, or save the model "
            "after model.dequantize()"
        )
