"""Who serves a checkpoint, SGLang or qplug, and why; and what a user says to qplug inside SGLang.

What SGLang has is asked of SGLang: its table of methods, and each method's own word on the checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import UsageError
from ...planner import assumed_source, read_config
from ...registry import Registry
from ...resolve import Policy
from ...scheme import TensorQuant
from . import NAME

VARIABLE = "QPLUG_SGLANG"
OPTIONS = "QPLUG_SGLANG_OPTIONS"
KNOWN = ("quantize", "kernels", "pin", "forbid", "activations")


@dataclass(frozen=True)
class Options:
    """``$QPLUG_SGLANG_OPTIONS``, a JSON object in the words of :func:`qplug_core.load`; SGLang has no argument for what it does not know.

    ``quantize``: the scheme that a 16-bit checkpoint is quantized to at load, with ``--quantization qplug``.
    """

    policy: Policy
    quantize: str | None = None

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Options:
        """From the environment, which SGLang's processes inherit.

        :raises UsageError: for what is no JSON object, or a word that is not known.
        """
        text = environ.get(OPTIONS, "{}")
        try:
            words = json.loads(text)
        except ValueError:
            words = None
        if not isinstance(words, dict):
            raise UsageError(f'{OPTIONS} is {text!r}; a JSON object was needed, such as {{"quantize": "W4A16_g128"}}')
        if unknown := sorted(words.keys() - set(KNOWN)):
            raise UsageError(f"{OPTIONS} has {unknown[0]!r}; {', '.join(KNOWN)} are known")
        quantize = words.pop("quantize", None)
        return cls(Policy(**{**words, "forbid": frozenset(words.get("forbid", ()))}), quantize)


@dataclass(frozen=True)
class Claim:
    """``qplug``: whether qplug serves the checkpoint. ``reason``: one clause for the log."""

    qplug: bool
    reason: str


def decide(
    config: Mapping[str, Any], asked: str | None, own: str, registry: Registry, environ: Mapping[str, str] | None = None
) -> Claim | None:
    """Who serves a checkpoint with this ``quantization_config``; None where no installed format reads it.

    ``asked``: what the user gave as ``--quantization``. ``own``: SGLang's method for the checkpoint, empty where it has none.

    :raises UsageError: for a word in ``$QPLUG_SGLANG`` that means nothing.
    :raises ConfigError: for a config that only qplug could read, and does not.
    """
    method = str(config.get("quant_method", "")).lower()
    if asked == NAME:
        return Claim(True, f"--quantization {NAME} asks for it")
    detected = {name for entry in registry.formats for name in entry.decl.detects}
    detected |= {name for entry in registry.configs for name in entry.decl.detects}
    wanted = _words(os.environ if environ is None else environ, detected)
    if method not in detected:
        return None
    if asked is not None:
        return Claim(False, f"--quantization {asked} asks for SGLang's own")
    if own and "all" not in wanted and method not in wanted:
        return Claim(False, f"its {own} takes it; {VARIABLE}=all or {VARIABLE}={method} gives it to qplug")
    if not own:
        read_config(assumed_source(dict(config)), registry)
        return Claim(True, f"this SGLang has no {method} here")
    return Claim(True, f"{VARIABLE}={','.join(wanted)} asks for it")


def _words(environ: Mapping[str, str], known: set[str]) -> list[str]:
    words = [word.strip().lower() for word in environ.get(VARIABLE, "missing").split(",") if word.strip()]
    for word in words:
        if word not in ("missing", "all") and word not in known:
            raise UsageError(
                f"{VARIABLE} names {word!r}; missing, all, or a quant_method that an installed plugin reads was needed "
                f"({', '.join(sorted(known)) or 'none is installed'})"
            )
    return words


def has_fp8_scales(kv: TensorQuant) -> bool:
    """True for the cache that SGLang has with stored scales: FP8 e4m3, one scale for keys and one for values."""
    return kv.dtype == "fp8_e4m3" and kv.block == (0, 0) and kv.dynamic is not True
