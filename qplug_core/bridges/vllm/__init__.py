"""The bridge into vLLM: every format and kernel that is installed, behind ``vllm serve`` and ``LLM(...)`` with no flag.

vLLM calls :func:`register` in each of its processes, through the entry point ``vllm.general_plugins``. Nothing of qplug is
imported before a quantized checkpoint is opened, and where qplug cannot run, vLLM runs without it and the log says why in one sentence.
"""

from __future__ import annotations

import functools
import logging
from importlib import import_module
from importlib.metadata import version as installed
from typing import Any

NAME = "qplug"
VERSIONS = ">=0.32,<0.33"
"""Versions of vLLM that the tests of this bridge pass with."""

log = logging.getLogger("vllm.qplug")


def register() -> None:
    """Tell vLLM of qplug. Harmless when called again, and never an exception."""
    if reason := unsupported():
        log.warning("qplug stays out of this vLLM: %s", reason)
        return
    try:
        # All that can fail comes before the first change.
        methods = import_module("vllm.model_executor.layers.quantization")
        add = methods.register_quantization_config(NAME)
        config = import_module("qplug_core.bridges.vllm.config").QplugConfig
        wrapped = []
        for name in ("beside", "files"):
            module = import_module(f"qplug_core.bridges.vllm.{name}")
            owner = module.owner()
            wrapped.append((owner, module.FUNCTION, getattr(owner, module.FUNCTION), module.wrap))
    except Exception as error:
        log.warning("qplug stays out of this vLLM: %s", changed(error))
        return
    add(config)
    for owner, function, original, wrap in wrapped:
        if not hasattr(original, "qplug"):
            fresh: Any = functools.wraps(original)(wrap(original))
            fresh.qplug = True
            setattr(owner, function, fresh)


def unsupported() -> str:
    """Why the installed vLLM is not one that this bridge was written for, or an empty string."""
    from packaging.specifiers import SpecifierSet

    found = str(import_module("vllm").__version__)
    if SpecifierSet(VERSIONS).contains(found, prereleases=True):
        return ""
    return f"it is version {found} and qplug-core {installed('qplug-core')} is tested with {VERSIONS}; install one of those"


def changed(error: BaseException) -> str:
    """The one sentence for an engine that is not as this bridge knows it, or for a qplug that is not whole."""
    if isinstance(error, ImportError) and str(error.name).startswith("qplug"):
        return f"a part of qplug is missing or does not fit the others ({error}); install qplug-core and its plugins again"
    found = import_module("vllm").__version__
    return (
        f"vLLM {found} is not as qplug-core {installed('qplug-core')} knows it ({type(error).__name__}: {error}); install vllm{VERSIONS}, "
        "or a qplug-core that knows this one"
    )
