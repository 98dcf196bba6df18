"""The bridge into Hugging Face transformers: every installed format and kernel behind ``from_pretrained``.

Where qplug is installed from a wheel, transformers finds it by itself (docs/decisions/0005-transformers-discovery.md); elsewhere
:func:`register` is called once. docs/transformers.md shows what it does.
"""

from __future__ import annotations

import logging
import warnings
from importlib import import_module
from importlib.metadata import version as installed
from typing import TYPE_CHECKING, Any

from ...errors import QplugError, UsageError
from .hook import when_imported

if TYPE_CHECKING:
    from .config import QplugConfig as QplugConfig
    from .lora import enable_lora as enable_lora
    from .quantizer import new_cache as new_cache

NAME = "qplug"
VERSIONS = ">=5.23,<5.24"
"""Versions of transformers that the tests of this bridge pass with."""

log = logging.getLogger("transformers.qplug")

_HOMES = {"QplugConfig": "config", "enable_lora": "lora", "new_cache": "quantizer"}

__all__ = [*_HOMES, "NAME", "VERSIONS", "register"]


def __getattr__(name: str) -> Any:
    """Names come when they are asked for: half of them need what the other half is imported by."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def register() -> None:
    """Tell transformers of qplug, as ``$QPLUG_TRANSFORMERS`` says. Harmless when called again.

    :raises UsageError: for a transformers that this bridge does not know, or a word in the variable that means nothing.
    """
    if reason := unsupported():
        raise UsageError(reason)
    from .policy import install

    try:
        if install():
            when_imported("peft.tuners.lora.model", _enable_lora)
    except (AttributeError, ImportError, TypeError) as error:
        raise UsageError(changed(error)) from error


def autoload() -> None:
    """:func:`register` while transformers is being imported: what is wrong becomes one warning, and transformers goes on.

    Another version of transformers is for the log alone: the host may be an engine with a bridge of its own, as vLLM is.
    """
    if reason := unsupported():
        log.info("qplug stays out of transformers: %s", reason)
        return
    try:
        register()
    except QplugError as error:
        warnings.warn(f"qplug stays out of transformers: {error}", stacklevel=2)


def _enable_lora() -> None:
    from .lora import enable_lora

    try:
        enable_lora()
    except AttributeError as error:
        warnings.warn(f"qplug stays out of PEFT {installed('peft')}, which is not as it knows it ({error})", stacklevel=2)


def unsupported() -> str:
    """Why the installed transformers is not one that this bridge was written for, or an empty string."""
    from packaging.specifiers import SpecifierSet

    found = installed("transformers")
    if SpecifierSet(VERSIONS).contains(found, prereleases=True):
        return ""
    return (
        f"transformers is {found} and qplug-core {installed('qplug-core')} is tested with {VERSIONS}; install one of those, or set "
        "QPLUG_TRANSFORMERS=0"
    )


def changed(error: BaseException) -> str:
    """The one sentence for an engine that is not as this bridge knows it."""
    return (
        f"transformers {installed('transformers')} is not as qplug-core {installed('qplug-core')} knows it ({type(error).__name__}: "
        f"{error}); install transformers{VERSIONS}, or a qplug-core that knows this one"
    )
