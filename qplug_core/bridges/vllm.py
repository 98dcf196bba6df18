"""A bridge into vLLM, as small as the contract allows: linear layers of any installed format, at any tensor parallelism.

It proves the contract against the hardest host (docs/decisions/0002-vllm-spike.md); it is not registered as a vLLM plugin.
Call :func:`register` in every process, before a model is loaded. Written for vLLM 0.32.

vLLM creates parameters before it sees tensors, and streams whole stored tensors through ``weight_loader``. So a parameter
here is an empty place that collects them, and when the layer is complete core loads it as from any other source.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper

from ..device import Device
from ..layer import LayerSpec, StoredPart
from ..method import HubMethod
from ..planner import Planner, assumed_source
from ..registry import get_registry
from ..source import MemorySource

NAME = "qplug"


class QplugConfig(QuantizationConfig):
    """The ``quantization_config`` of a checkpoint whose ``quant_method`` an installed plugin reads."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.planners: dict[torch.dtype, Planner] = {}

    def get_name(self) -> str:
        """The name under which vLLM knows this config."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What the reference kernels take, which is everything."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """None: kernels refuse by themselves."""
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Files beside config.json are not asked for."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QplugConfig:
        """From the dict in config.json."""
        return cls(config)

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any, hf_config: Any = None) -> str | None:
        """Claim what an installed format reads."""
        method = str((hf_quant_cfg or {}).get("quant_method", "")).lower()
        return NAME if any(method in entry.decl.detects for entry in get_registry().formats) else None

    @staticmethod
    def get_checkpoint_weight_mapper() -> Any:
        """No renaming: vLLM's default drops every ``g_idx``."""
        return WeightsMapper()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """A method for linear layers; everything else stays vLLM's own."""
        return QplugLinear(self, prefix) if isinstance(layer, LinearBase) else None

    def planner(self, dtype: torch.dtype) -> Planner:
        """The planner of this config, which believes it until tensors come."""
        if dtype not in self.planners:
            name = str(dtype).removeprefix("torch.")
            self.planners[dtype] = Planner(assumed_source(self.config), Device.cpu(), name, assumed=True)
        return self.planners[dtype]


class QplugLinear(LinearMethodBase):
    """One linear layer, fused or not."""

    def __init__(self, config: QplugConfig, prefix: str) -> None:
        self.config = config
        self.prefix = prefix
        self.plain = UnquantizedLinearMethod()
        self.method: HubMethod | None = None
        self.collected: dict[str, Tensor] = {}

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
        """Plan the layer, and register an empty parameter for each stored tensor."""
        spec = self._spec(layer, input_size_per_partition, output_partition_sizes, input_size)
        planner = self.config.planner(params_dtype)
        decision = planner.plan([spec], complete=False).decisions[0]
        if not decision.quantized:
            self.plain.create_weights(
                layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra
            )
            return
        self.method = HubMethod(decision, planner.resolver, planner.layout, params_dtype)
        names = {
            tensor.name
            for segment in decision.segments
            if segment.quant is not None
            for tensor in planner.layout(segment.quant.layout).tensors(segment.quant)
        }
        for name in sorted(names):
            parameter = nn.Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = self._loader(name, spec)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Decode, cut to this rank, and pack, once every tensor is here."""
        if self.method is None:
            self.plain.process_weights_after_loading(layer)
            return
        self.method.load(MemorySource(self.collected))
        self.collected.clear()
        for name in [n for n, p in layer.named_parameters(recurse=False) if p.numel() == 0]:
            delattr(layer, name)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [*, K]`` to ``[*, N]`` of this rank."""
        if self.method is None:
            out: Tensor = self.plain.apply(layer, x, bias)
            return out
        return self.method.apply(x, bias)

    def _loader(self, suffix: str, spec: LayerSpec) -> Any:
        parts = spec.alternatives[0]
        shards: dict[Any, StoredPart] = dict(zip(("q", "k", "v"), parts, strict=False)) if len(parts) == 3 else {}
        shards |= dict(enumerate(parts))

        def load(parameter: nn.Parameter, loaded: Tensor, shard_id: Any = None) -> None:
            part = parts[0] if shard_id is None else shards[shard_id]
            self.collected[f"{part.name}.{suffix}"] = loaded.clone()

        return load

    def _spec(self, layer: Any, k_local: int, n_local: list[int], k: int) -> LayerSpec:
        """The layer with the rows and columns of this rank."""
        parent, _, leaf = self.prefix.rpartition(".")
        names = self.config.packed_modules_mapping.get(leaf, [leaf])
        rank, world = int(getattr(layer, "tp_rank", 0)), int(getattr(layer, "tp_size", 1))
        if isinstance(layer, RowParallelLinear):
            part = (StoredPart(self.prefix, n_local[0]),)
            return LayerSpec(self.prefix, "linear", n_local[0], k, (part,), columns=(rank * k_local, (rank + 1) * k_local))
        replicas = int(getattr(layer, "num_kv_head_replicas", 1))
        parts = []
        for i, (name, n) in enumerate(zip(names, n_local, strict=True)):
            copies = replicas if i and len(names) == 3 else 1
            at = rank // copies
            parts.append(StoredPart(f"{parent}.{name}", n, (at * n, (at + 1) * n), n * (world // copies)))
        return LayerSpec(self.prefix, "linear", sum(n_local), k, (tuple(parts),))


def register() -> None:
    """Tell vLLM of qplug; harmless when called again."""
    register_quantization_config(NAME)(QplugConfig)
