"""Weights: stored tensors as vLLM streams them, collected until a layer is whole, then loaded as core loads from any source.

vLLM makes parameters before it sees tensors and hands each rank every stored tensor whole. So a parameter here is empty, and its
``weight_loader`` collects. A layer is packed as soon as its last tensor is there; a second stream refills it in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...method import QuantMethod, TensorSource, plain_name
from ...planner import Planner
from ...quant_plan import Decision
from ...source import MemorySource


class Weights:
    """The tensors of one projection.

    ``parts``: stored module names in the order of the rows. ``suffixes``: what vLLM may bring for each part. ``expected``: full
    names of all that the file holds of it, empty where there are no headers. ``stacks``: names of the tensors that hold this expert among
    others, which are read from the file and not collected. ``engine``: who streams, for error messages.
    """

    engine = "vLLM"

    def __init__(self, decision: Decision, method: QuantMethod, planner: Planner) -> None:
        self.decision, self.method = decision, method
        self.parts = [part.name for segment in decision.segments for part in segment.parts]
        self.suffixes: set[str] = set()
        self.expected: dict[str, int] = {}
        self.stacks: set[str] = set()
        self.loads = 0
        self._collected: dict[str, Tensor] = {}
        held = planner.source.tensors
        for segment in decision.segments:
            for part in segment.parts:
                if segment.quant is None:
                    names = {plain_name(planner.source, part)}
                else:
                    layout = planner.layout(segment.quant.layout)
                    names = {t.full_name(part.name) for t in layout.tensors(segment.quant)}
                if part.expert is not None:
                    self.stacks |= names & held.keys()
                    continue
                if odd := sorted(n for n in names if not n.startswith(f"{part.name}.") and (n in held or not held)):
                    raise CheckpointError(
                        f"{odd[0]} is stored beside {decision.layer.name} and not in it, and {self.engine} has no place for that; load the model "
                        "with qplug's own engine"
                    )
                self.suffixes |= {n.removeprefix(f"{part.name}.") for n in names if n.startswith(f"{part.name}.")}
                self.expected |= {n: _numel(held[n].shape) for n in names if n in held}

    @property
    def loaded(self) -> bool:
        """Whether the layer has weights."""
        return self.loads > 0

    def elements(self, suffix: str) -> int:
        """Elements of all stored tensors with ``suffix``, which vLLM counts when it reloads."""
        return sum(count for name, count in self.expected.items() if name.endswith(f".{suffix}"))

    def take(self, part: int, suffix: str, tensor: Tensor) -> None:
        """Keep one tensor; load the layer where it was the last."""
        kept = torch.empty_like(tensor, device="cpu")
        kept.copy_(tensor)  # vLLM counts elements that are copied while it reloads.
        self._collected[f"{self.parts[part]}.{suffix}"] = kept
        if self.expected and self._collected.keys() >= self.expected.keys():
            self._load(MemorySource(self._collected))

    def read(self, source: TensorSource) -> None:
        """Load from the file itself."""
        self._load(source)

    def finish(self) -> None:
        """All tensors were streamed.

        :raises ValueError: where some of this layer are missing.
        """
        if self._collected and not self.expected:
            self._load(MemorySource(self._collected))
        if self._collected or not self.loaded:
            missing = sorted(self.expected.keys() - self._collected.keys()) or ["every tensor"]
            raise ValueError(
                f"{self.engine} brought {len(self._collected)} of {len(self.expected) or 'the'} tensors of {self.decision.layer.name} and not "
                f"{missing[0]}; nothing was loaded into the layer, so give the whole checkpoint"
            )

    def _load(self, source: TensorSource) -> None:
        previous = torch.get_default_dtype()
        torch.set_default_dtype(
            torch.float32
        )  # vLLM loads under the model's dtype and device, decoders know nothing of that.
        try:
            with torch.device("cpu"), torch.no_grad():
                if self.loaded:
                    self.method.reload(source)
                else:
                    self.method.load(source)
        finally:
            torch.set_default_dtype(previous)
        self.loads += 1
        self._collected = {}


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def place(layer: nn.Module, name: str, elements: int, loader: Callable[..., Any]) -> None:
    """An empty parameter that collects: ``loader`` is called as vLLM calls every ``weight_loader``."""
    parameter = nn.Parameter(torch.empty(0), requires_grad=False)
    parameter.weight_loader = loader  # type: ignore[attr-defined]
    parameter.weight_loader_numel = elements  # type: ignore[attr-defined]
    layer.register_parameter(name, parameter)


def show(layer: nn.Module, methods: dict[str, QuantMethod]) -> None:
    """Register packed tensors as buffers, so that vLLM counts them; they are the tensors in use, not copies."""
    for key, method in methods.items():
        tensors = method.tensors() if hasattr(method, "tensors") else {}
        for name, tensor in tensors.items():
            layer.register_buffer(f"qplug_{key}{name}".replace(".", "_"), tensor, persistent=False)
