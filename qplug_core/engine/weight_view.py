"""The weight of a quantized layer, for model code that reads it instead of calling the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..errors import UsageError
from ..method import QuantMethod


class WeightView(Tensor):
    """``[N, K]`` of the activations' dtype, multiplied out when something computes with it; shape, dtype and device cost nothing.

    A layer has it as ``weight``, because models and PEFT ask a weight for its dtype and device, and because some models
    (Mamba's ``dt_proj``) multiply with the weight of a layer that they never call.
    """

    method: QuantMethod

    @staticmethod
    def __new__(cls, method: QuantMethod, dtype: torch.dtype, device: torch.device | str) -> WeightView:
        """:param method: the weight; ``dtype`` and ``device``: those it was loaded for."""
        layer = method.decision.layer
        view: WeightView = Tensor._make_wrapper_subclass(
            cls, (layer.n, layer.local_k), dtype=dtype, device=torch.device(device)
        )
        view.method = method
        return view

    def value(self) -> Tensor:
        """The weight: the layer's product with the identity, which is exact where activations are not quantized.

        :raises UsageError: where they are.
        """
        decision = self.method.decision
        if any(s.scheme is not None and s.scheme.act is not None and not s.weight_only for s in decision.segments):
            scheme = next(s.scheme for s in decision.segments if s.scheme is not None)
            raise UsageError(
                f"the model multiplies with the weight of {decision.layer.name} itself, and {scheme} quantizes the activations of a "
                "layer that is called; load with activations='16bit'"
            )
        identity = torch.eye(self.shape[1], dtype=self.dtype, device=self.device)
        return self.method.apply(identity).t()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Every operation takes the value."""
        args, kwargs = tree_map_only(WeightView, WeightView.value, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Shape and layer; the values are not multiplied out to be shown."""
        return f"WeightView({self.method.decision.layer.name}, {list(self.shape)}, {self.dtype})"
