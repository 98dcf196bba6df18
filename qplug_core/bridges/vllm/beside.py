"""Checkpoints that say in a file beside config.json how they are quantized: ``quantize_config.json``, ``smoothquant.ini``.

vLLM looks at config.json alone (and at ModelOpt's file), so it would take them for 16 bit and fail at the first tensor. Where config.json says
nothing and a file of an installed plugin is there, weights among them, this module lets config.json say ``qplug``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import QplugError
from ...registry import get_registry
from ...source import CONFIG_FILES, FLAG_FILES
from . import NAME, log
from .files import opened

FUNCTION = "get_config"
"""Through which vLLM reads config.json."""


def owner() -> Any:
    """Where vLLM has :data:`FUNCTION`."""
    return import_module("vllm.config.model")


def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    """:data:`FUNCTION`, with a ``quantization_config`` where a file says what config.json does not."""

    def get_config(model: str | Path, *given: Any, **options: Any) -> Any:
        config = original(model, *given, **options)
        said = any(getattr(config, key, None) for key in ("quantization_config", "compression_config"))
        if not said and (file := claimed(Path(model)) or opened(Path(model))):
            log.info("qplug serves the checkpoint: config.json does not say how it is quantized, and %s does", file)
            config.quantization_config = {"quant_method": NAME}
        return config

    return get_config


def claimed(folder: Path) -> str:
    """The file in a folder by which an installed plugin knows its checkpoints, or an empty string."""
    present = [name for name in (*CONFIG_FILES, *FLAG_FILES) if (folder / name).is_file()]
    if not present:
        return ""
    try:
        registry = get_registry()
    except QplugError as error:
        log.warning("qplug cannot run: %s", error)
        return ""
    known = {file for form in registry.formats for file in form.decl.files}
    known |= {file for other in registry.configs for file in other.decl.files}
    return next((name for name in present if name in known), "")
