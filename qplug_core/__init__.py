"""qplug: quantization methods for LLM inference engines, from separately installed packages."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .device import Device as Device
    from .engine.engine import Engine as Engine
    from .engine.engine import load as load
    from .hookspecs import hookimpl as hookimpl
    from .layer import LayerSpec as LayerSpec
    from .layer import PlainSlot as PlainSlot
    from .layer import StoredPart as StoredPart
    from .module import quantize_module as quantize_module
    from .offline import quantize as quantize
    from .planner import plan as plan
    from .quant_plan import QuantPlan as QuantPlan
    from .resolve import Policy as Policy
    from .scheme import QuantScheme as QuantScheme

__version__ = "0.1.0"

_HOMES = {
    "Device": "device",
    "Engine": "engine.engine",
    "LayerSpec": "layer",
    "PlainSlot": "layer",
    "Policy": "resolve",
    "QuantPlan": "quant_plan",
    "QuantScheme": "scheme",
    "StoredPart": "layer",
    "hookimpl": "hookspecs",
    "load": "engine.engine",
    "plan": "planner",
    "quantize": "offline",
    "quantize_module": "module",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    """Names come when they are asked for, so that ``import qplug_core`` imports no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qplug_core' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
