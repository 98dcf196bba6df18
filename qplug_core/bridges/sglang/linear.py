"""Linear layers, the head and embeddings in SGLang."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.quantization.base_config import LinearMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from torch import Tensor

from ...errors import QplugError
from ...quant_plan import Decision
from .layers import linear_spec
from .weights import Weights, place, show

if TYPE_CHECKING:
    from .config import QplugConfig


class _Rows(LinearMethodBase):
    """A weight with ``n`` rows where SGLang counts its own padding too, and ``method.decision.layer.n`` where not."""

    def __init__(self, config: QplugConfig) -> None:
        self.quant_config = config
        self.weights: Weights | None = None
        self.n = 0

    def bind(self, layer: Any, decision: Decision, dtype: torch.dtype) -> None:
        """Register an empty parameter for each stored tensor."""
        self.name = decision.layer.name
        self.method = self.quant_config.bind(decision, dtype)
        self.weights = weights = Weights(decision, self.method, self.quant_config.planner(dtype))
        for suffix in sorted(weights.suffixes):
            place(layer, suffix, weights.elements(suffix), self._loader(weights, suffix))
        self.quant_config.wait_for(self.name)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything came, and show SGLang the packed tensors."""
        assert self.weights is not None
        self.weights.finish()
        show(layer, {"": self.method})
        self.quant_config.arrived(self.name)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [*, K]`` to ``[*, N]`` of this rank."""
        missing = self.n - self.method.decision.layer.n
        if not missing:
            return self.method.apply(x, bias)
        y = torch.nn.functional.pad(self.method.apply(x, None), (0, missing))
        return y if bias is None else y + bias

    def _loader(self, weights: Weights, suffix: str) -> Any:
        order = {"q": 0, "k": 1, "v": 2}

        def load(param: Any, loaded_weight: Tensor, shard_id: Any = None) -> None:
            if isinstance(shard_id, tuple):
                raise ValueError(
                    f"{self.name}: SGLang brought parts {shard_id} as one tensor, which qplug does not cut; report the model"
                )
            weights.take(0 if shard_id is None else order.get(shard_id, shard_id), suffix, loaded_weight)

        return load


class QplugLinear(_Rows):
    """A linear layer. SGLang asks for its method before it knows its parts, so the plan is made when they are known."""

    def __init__(self, config: QplugConfig, prefix: str) -> None:
        super().__init__(config)
        self.name = prefix

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Plan the layer; one that stays at 16 bit gets SGLang's own method.

        :raises ValueError: one sentence.
        """
        config = self.quant_config
        try:
            spec = linear_spec(layer, self.name, output_partition_sizes, config.packed_modules_mapping, config.stored)
            (decision,) = config.plan([spec], params_dtype).decisions
            if decision.quantized:
                self.n = decision.layer.n
                self.bind(layer, decision, params_dtype)
                return
        except QplugError as error:
            raise ValueError(str(error)) from None
        layer.quant_method = UnquantizedLinearMethod()
        layer.quant_method.create_weights(
            layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra
        )


class QplugHead(_Rows):
    """The head."""

    def __init__(self, config: QplugConfig, decision: Decision, dtype: torch.dtype) -> None:
        super().__init__(config)
        self.decision, self.dtype = decision, dtype

    def create_weights(self, layer: Any, input_size: int, heights: list[int], *sizes: Any, **extra: Any) -> None:
        """Register an empty parameter for each stored tensor; SGLang pads the rows."""
        self.n = sum(heights)
        self.bind(layer, self.decision, self.dtype)


class QplugEmbedding(QplugHead):
    """An embedding: rows of a quantized weight."""

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """LongTensor ``[*]`` of rows of this rank to ``[*, K]``, in the model's dtype."""
        return self.method.apply(ids).to(self.dtype)
