"""The hooks of qplug: what a plugin module may define, each marked with ``@hookimpl``.

Declarations only: nothing here, and nothing that a plugin module imports, may import torch, triton or transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

from .decl import ConfigDecl, FormatDecl, KernelDecl, QuantizerDecl

if TYPE_CHECKING:
    from .layer import LayerSpec
    from .quant_plan import Decision

PROJECT = "qplug"
ENTRY_POINTS = "qplug.plugins"
"""Entry-point group: each name is a plugin, each value a module with ``API = "1.0"`` and hook implementations."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def qplug_formats() -> Sequence[FormatDecl]:
    """Checkpoint formats that this plugin reads."""
    raise NotImplementedError


@hookspec
def qplug_kernels() -> Sequence[KernelDecl]:
    """Kernels that this plugin brings, for its own formats and everyone else's."""
    raise NotImplementedError


@hookspec
def qplug_quantizers() -> Sequence[QuantizerDecl]:
    """Algorithms that make quantized weights."""
    raise NotImplementedError


@hookspec
def qplug_quantization_configs() -> Sequence[ConfigDecl]:
    """Methods that do not fit the hub: a config with a QuantMethod of its own."""
    raise NotImplementedError


@hookspec
def qplug_layer_ready(layer: LayerSpec, decision: Decision) -> None:
    """Observe a layer that has been loaded: for progress and telemetry. Never called on the hot path."""
