"""QplugConfig: what ``from_pretrained(quantization_config=...)`` takes, and what stands in ``model.config`` afterwards."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ...errors import UsageError
from ...resolve import Policy
from ...scheme import QuantScheme
from . import NAME, register


class QplugConfig(QuantizationConfigMixin):
    """How qplug loads a model: a scheme for a 16-bit checkpoint, or only options for one that is quantized already.

    scheme
        ``W8A16``, ``W4A16_g128``... for a 16-bit checkpoint, quantized layer by layer while it is loaded; None for the
        quantization that the checkpoint has.
    format
        Format that ``save_pretrained`` writes a model in that was quantized while it was loaded; None takes the first that holds it.
    kernels, pin, forbid, activations
        See :class:`~qplug_core.resolve.Policy`.
    kv_cache
        What :func:`~qplug_core.bridges.transformers.new_cache` makes: None what the checkpoint says, ``16bit``, ``fp8``, ``int8``...
    """

    def __init__(
        self,
        scheme: str | QuantScheme | None = None,
        *,
        format: str | None = None,
        kernels: str = "auto",
        pin: Mapping[str, str] | None = None,
        forbid: Sequence[str] = (),
        activations: str = "quantized",
        kv_cache: str | None = None,
    ) -> None:
        register()
        self.quant_method = NAME
        self.scheme = scheme
        self.format = format
        self.policy = Policy(kernels, dict(pin or {}), frozenset(forbid), activations)
        self.kv_cache = kv_cache
        self.stored: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config of a checkpoint: it is kept as it is, and read by its format when the files are known."""
        return cls().of(config_dict)

    def of(self, stored: Any) -> QplugConfig:
        """The same options for a checkpoint whose config is ``stored``.

        :raises UsageError: where a scheme was asked for too.
        """
        found: dict[str, Any] = copy.deepcopy(stored if isinstance(stored, dict) else stored.to_dict())
        if self.scheme is not None:
            raise UsageError(
                f"the checkpoint is {found.get('quant_method')} already and {self.scheme} was asked for; load it as it is, or start "
                "from the 16-bit checkpoint"
            )
        options = copy.copy(self)
        options.stored = found
        return options

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: the config of the checkpoint's own format, so that every engine reads what is saved."""
        if self.stored is not None:
            return copy.deepcopy(self.stored)
        return {"quant_method": NAME, "scheme": None if self.scheme is None else str(self.scheme)}
