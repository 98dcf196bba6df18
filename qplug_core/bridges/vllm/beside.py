"""Checkpoints that say in a file beside config.json how they are quantized: ``quantize_config.json``, ``smoothquant.ini``.

vLLM looks at config.json alone (and at ModelOpt's file), so it would take them for 16 bit and fail at the first tensor. Where config.json says
nothing and a file of an installed plugin is there, this module lets config.json say ``qplug``.
"""

from __future__ import annotations

import functools
from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import QplugError
from ...registry import get_registry
from ...source import CONFIG_FILES, FLAG_FILES
from . import NAME, log


def watch() -> None:
    """Wrap the function through which vLLM reads config.json; once in each process.

    :raises AttributeError: where vLLM has no such function.
    """
    models: Any = import_module("vllm.config.model")
    original = models.get_config
    if hasattr(original, "qplug"):
        return

    @functools.wraps(original)
    def get_config(model: str | Path, *given: Any, **options: Any) -> Any:
        config = original(model, *given, **options)
        said = any(getattr(config, key, None) for key in ("quantization_config", "compression_config"))
        if not said and (file := claimed(Path(model))):
            log.info("qplug serves the checkpoint: config.json does not say how it is quantized, and %s does", file)
            config.quantization_config = {"quant_method": NAME}
        return config

    get_config.qplug = True  # type: ignore[attr-defined]
    models.get_config = get_config


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
