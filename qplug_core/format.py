"""CheckpointFormat: how quantized numbers are stored on disk. Pure; never sees a device, an engine, a rank or a name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .axes import StoredTensor
from .config import LayerQuant, QuantizationConfig

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from .source import Source
    from .weight import OpaqueWeight, QuantWeight


class CheckpointFormat(ABC):
    """One format, with all of its layouts (storage variants).

    The covering read, cuts for tensor parallelism, fusing and stacking are core's: a format declares its tensors by
    logical axes and decodes what it is given, which may be a window of the layer.
    """

    name: str

    @abstractmethod
    def parse(self, source: Source) -> QuantizationConfig:
        """The config of a checkpoint, from ``source.quant_config`` and, for what it leaves out, from the headers.

        :raises ConfigError: for a key that changes the numbers and is not understood, or two that contradict each other.
        """

    @abstractmethod
    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The stored tensors of one layer."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight | OpaqueWeight:
        """Plain codes from stored tensors, keyed by declared name, of a layer or window of ``n`` rows and ``k`` columns.

        :raises DecodeError: where values contradict the config.
        """

    def open(self, path: Path) -> Source:
        """A checkpoint in files of one of the declared suffixes ``opens``: a file, or a folder with no other weights.

        What comes back names tensors as the model's own library does, and ``quant_config`` says all that ``parse`` needs.

        :raises CheckpointError: for a missing, truncated or contradictory file.
        """
        raise NotImplementedError(f"{self.name} opens no files of its own")

    def encode(self, weight: QuantWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """Stored tensors of a weight; ``decode`` of them is the weight, bit for bit.

        :raises CannotEncode: where the format cannot hold it without loss.
        """
        raise NotImplementedError(f"{self.name} has no writer")

    def quant_for_scheme(self, weight: QuantWeight) -> LayerQuant:
        """The layout and options that store ``weight``.

        :raises CannotEncode: where the format has none for it.
        """
        raise NotImplementedError(f"{self.name} has no writer")

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """The ``quantization_config`` for config.json that says ``layers``: module name to quantization, None for 16 bit."""
        raise NotImplementedError(f"{self.name} has no writer")

    def model_name(self, stored: str) -> str:
        """The Hugging Face name of a stored tensor, where a tool's names are its own (``attention.query_key_value.weight``).

        A module that holds several of the model's is called as the model would fuse it: ``qkv_proj``, ``gate_up_proj``.
        """
        return stored

    def kv_tensors(self, attention: str) -> Mapping[str, str | tuple[str, ...]]:
        """Stored names of KV-cache scales of one attention module by role: ``k_scale``, ``v_scale``, ``k_zero``, ``v_zero``, ``q_scale``.

        Of several names for one role, the first that is stored is taken. Other roles are claimed and not used.
        """
        return {}

    def decode_kv(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Factors and zero points by role, ``[]``, ``[H]`` or ``[H, D]``, from stored tensors: where a tool stores divisors."""
        return tensors
