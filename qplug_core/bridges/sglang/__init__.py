"""The bridge into SGLang: every format and kernel that is installed, behind ``sglang serve`` and ``Engine(...)`` with no flag.

SGLang calls :func:`register` in each of its processes, through the entry point ``sglang.srt.plugins``. Where qplug cannot run, SGLang runs
without it and the log says why in one sentence. docs/sglang.md says what was run, and what was not.
"""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.metadata import version as installed

NAME = "qplug"
VERSIONS = ">=0.5.23,<0.5.24"
"""Versions of SGLang that the tests of this bridge pass with."""

log = logging.getLogger("sglang.srt.qplug")


def register() -> None:
    """Tell SGLang of qplug. Harmless when called again, and never an exception."""
    if reason := unsupported():
        log.warning("qplug stays out of this SGLang: %s", reason)
        return
    try:
        from .config import QplugConfig

        methods = import_module("sglang.srt.layers.quantization")
        choices = import_module("sglang.srt.arg_groups.choices").QUANTIZATION_CHOICES
        # The first that claims a checkpoint has it, so qplug is asked before the others and asks them itself.
        first(methods.QUANTIZATION_METHODS, NAME, QplugConfig)
        methods.CPU_QUANTIZATION_METHODS[NAME] = QplugConfig
        if NAME not in choices:
            choices.append(NAME)
    except Exception as error:
        log.warning("qplug stays out of this SGLang: %s", changed(error))


def first(table: dict[str, object], name: str, value: object) -> None:
    """Put an entry before all others, in the same dict, which other modules hold."""
    others = {key: each for key, each in table.items() if key != name}
    table.clear()
    table.update({name: value, **others})


def unsupported() -> str:
    """Why the installed SGLang is not one that this bridge was written for, or an empty string."""
    from packaging.specifiers import SpecifierSet

    found = installed("sglang")
    if SpecifierSet(VERSIONS).contains(found, prereleases=True):
        return ""
    return f"it is version {found} and qplug-core {installed('qplug-core')} is tested with {VERSIONS}; install one of those"


def changed(error: BaseException) -> str:
    """The one sentence for an engine that is not as this bridge knows it."""
    return (
        f"SGLang {installed('sglang')} is not as qplug-core {installed('qplug-core')} knows it ({type(error).__name__}: {error}); install "
        f"sglang{VERSIONS}, or a qplug-core that knows this one"
    )
