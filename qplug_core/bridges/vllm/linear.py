"""Linear layers, the head and embeddings in vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearMethodBase

from ...errors import QplugError
from ...quant_plan import Decision
from .weights import Weights, place, show

if TYPE_CHECKING:
    from .config import QplugConfig


@torch.library.custom_op("qplug::vllm_linear", mutates_args=())
def _linear(x: Tensor, bias: Tensor | None, layer: str, n: int) -> Tensor:
    """The product of the layer that vLLM calls ``layer``: ``x [*, K]`` to ``[*, n]``. One node of a compiled graph, whatever the kernel."""
    y: Tensor = get_forward_context().no_compile_layers[layer].quant_method.product(x, bias)
    return y


@_linear.register_fake
def _(x: Tensor, bias: Tensor | None, layer: str, n: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


class QplugLinear(LinearMethodBase):
    """A linear layer, fused or not, or the head, whose rows are padded to what vLLM expects."""

    def __init__(self, config: QplugConfig, decision: Decision, dtype: torch.dtype) -> None:
        self.config = config
        self.name = decision.layer.name
        self.method = config.bind(decision, dtype)
        self.weights = Weights(decision, self.method, config.planner(dtype))
        self.n = decision.layer.n
        config.wait_for(self.name)

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], *sizes: Any, **extra: Any
    ) -> None:
        """Register an empty parameter for each stored tensor."""
        self.n = sum(output_partition_sizes)
        for suffix in sorted(self.weights.suffixes):
            place(layer, self.config.flat(suffix), self.weights.elements(suffix), self._loader(suffix))
        get_current_vllm_config().compilation_config.static_forward_context[self.name] = layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything came, and show vLLM the packed tensors."""
        self.weights.finish()
        show(layer, {"": self.method})
        self.config.arrived(self.name)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [*, K]`` to ``[*, N]`` of this rank."""
        if torch.compiler.is_compiling():
            out: Tensor = torch.ops.qplug.vllm_linear(x, bias, self.name, self.n)
            return out
        return self.product(x, bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product, padded with zeros to ``n`` rows."""
        missing = self.n - self.method.decision.layer.n
        if not missing:
            return self.method.apply(x, bias)
        y = torch.nn.functional.pad(self.method.apply(x, None), (0, missing))
        return y if bias is None else y + bias

    def _loader(self, suffix: str) -> Any:
        order = {"q": 0, "k": 1, "v": 2}

        def load(param: Any, loaded_weight: Tensor, shard_id: Any = None) -> None:
            self.weights.take(0 if shard_id is None else order.get(shard_id, shard_id), suffix, loaded_weight)

        return load


class TiedHead(QplugLinear):
    """The head of a tied model whose file shows the embedding under the head's name too (GGUF), packed for products, which the embedding is
    not. Some of vLLM's models drop it from the stream; then it is read from the file.
    """

    streams = 0
    """How often the layer was loaded when it was last in order."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """The head itself, which shares no storage with the embedding."""
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Read the weights where they were not streamed.

        :raises ValueError: where new weights were streamed without those of the head.
        """
        if self.weights.loads == self.streams:
            if self.streams:
                raise ValueError(
                    f"{self.name} is tied and quantized, and vLLM drops it from new weights; start vLLM with the new checkpoint"
                )
            try:
                self.weights.read(self.config.readable())
            except QplugError as error:
                raise ValueError(str(error)) from None
        self.streams = self.weights.loads
        super().process_weights_after_loading(layer)


class QplugEmbedding(QplugLinear):
    """An embedding: rows of a quantized weight."""

    def __init__(self, config: QplugConfig, decision: Decision, dtype: torch.dtype) -> None:
        super().__init__(config, decision, dtype)
        self.dtype = dtype

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """LongTensor ``[*]`` of rows of this rank to ``[*, K]``."""
        if torch.compiler.is_compiling():
            out: Tensor = torch.ops.qplug.vllm_embedding(ids, self.name, self.method.decision.layer.k, self.dtype)
            return out
        return self.rows(ids)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows, in the model's dtype."""
        return self.method.apply(ids).to(self.dtype)


@torch.library.custom_op("qplug::vllm_embedding", mutates_args=())
def _embedding(ids: Tensor, layer: str, k: int, dtype: torch.dtype) -> Tensor:
    """Rows of the embedding that vLLM calls ``layer``: LongTensor ``[*]`` to ``[*, k]``."""
    rows: Tensor = get_forward_context().no_compile_layers[layer].quant_method.rows(ids)
    return rows


@_embedding.register_fake
def _(ids: Tensor, layer: str, k: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((*ids.shape, k), dtype=dtype, device=ids.device)
