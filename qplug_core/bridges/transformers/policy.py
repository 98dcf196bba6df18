"""Who serves a checkpoint, transformers or qplug: ``$QPLUG_TRANSFORMERS``.

``missing`` (the default): qplug takes what transformers has no quantizer for, and what its own cannot run here. ``all``: whatever
qplug reads. ``gptq,awq``: these. ``0``: nothing.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Mapping
from typing import Any

from ...errors import PluginError, UsageError
from ...registry import get_registry
from . import NAME, log

VARIABLE = "QPLUG_TRANSFORMERS"
GGUF = "gguf"
"""The method whose files transformers opens by another argument of ``from_pretrained``, so no config decides for it."""
BY_KEY = {"bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes"}
"""Keys of transformers that stand for the quantization method of another name."""

ANNOUNCED: set[str] = set()

Wanted = str | set[str]
"""``missing``, ``all``, or the methods that qplug is to serve."""


def install() -> bool:
    """Write qplug into the tables of transformers; False where it is there already.

    :raises UsageError: for a word in the variable that is no method of an installed plugin.
    """
    from transformers.quantizers import auto

    from .asked import asking
    from .config import QplugConfig
    from .gguf import GgufChooser
    from .quantizer import QplugHfQuantizer

    configs, quantizers = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
    if NAME in quantizers:
        return False
    registry = get_registry()
    methods = {name for entry in registry.formats for name in entry.decl.detects}
    methods |= {name for entry in registry.configs for name in entry.decl.detects}
    wanted = policy(os.environ, methods)
    merge = auto.AutoHfQuantizer.merge_quantization_configs
    asks = asking(auto.get_hf_quantizer, wanted, configs)
    if not callable(auto.AutoHfQuantizer.from_config):
        raise AttributeError("AutoHfQuantizer.from_config is not callable")
    quantizers[NAME] = QplugHfQuantizer
    configs[NAME] = QplugConfig
    for key in {*methods, *(k for k, method in BY_KEY.items() if method in methods)} - {GGUF}:
        if not isinstance(wanted, str) and BY_KEY.get(key, key) not in wanted:
            continue
        configs[key] = _chooser(key, configs.get(key), quantizers.get(key), everything=wanted != "missing")
    if isinstance(wanted, str) or GGUF in wanted:
        quantizers[GGUF] = GgufChooser
    auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(_merging(merge, QplugConfig))
    auto.get_hf_quantizer = asks
    if (loader := sys.modules.get("transformers.modeling_utils")) is not None:
        loader.get_hf_quantizer = asks  # type: ignore[attr-defined]
    return True


def policy(environ: Mapping[str, str], methods: set[str]) -> Wanted:
    """``missing``, ``all``, or the methods that qplug is to serve; ``0`` is the empty set.

    :raises UsageError: for a word that is no method of an installed plugin.
    """
    text = environ.get(VARIABLE, "").strip().lower()
    if text in ("", "1", "missing"):
        return "missing"
    if text == "all":
        return "all"
    if text in ("0", "off", "none"):
        return set()
    words = {word.strip() for word in text.split(",") if word.strip()}
    if unknown := words - methods:
        raise UsageError(
            f"{VARIABLE} names {', '.join(sorted(unknown))}; missing, all, 0 or some of {', '.join(sorted(methods))} were needed"
        )
    return words


def _chooser(key: str, original: Any, quantizer: Any, everything: bool) -> type:
    """A config class for transformers' table whose ``from_dict`` decides who serves the checkpoint."""
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from .config import QplugConfig

    def from_dict(cls: Any, /, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        if original is None:
            reason = "transformers has no quantizer for it"
        elif everything:
            reason = f"{VARIABLE} says so"
        else:
            reason = refusal(original, quantizer, config_dict)
        if reason and (unreadable := _unreadable(config_dict)):
            announce(key, f"transformers serves {key}: qplug does not read it here ({unreadable})")
            reason = ""
        if not reason:
            return original.from_dict(config_dict, return_unused_kwargs, **kwargs)
        announce(key, f"qplug serves {key}: {reason} ({VARIABLE}=0 leaves it to transformers)")
        return QplugConfig.from_dict(config_dict)

    base = original or QuantizationConfigMixin
    return type(base.__name__ if original else "QplugConfig", (base,), {"from_dict": classmethod(from_dict)})


def refusal(original: Any, quantizer: Any, config_dict: dict[str, Any]) -> str:
    """Why transformers' own quantizer does not run this config here; an empty string where it does.

    A quantizer that would turn the whole model into 16 bit, though nobody asked for it, does not run it.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        config = original.from_dict(copy.deepcopy(config_dict))
        asked = bool(getattr(config, "dequantize", False))
        quantizer(config, pre_quantized=True).validate_environment(device_map=None, weights_only=True)
    except Exception as error:  # Whatever it says is the reason, and is reported.
        return f"transformers does not load it here: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
    finally:
        logging.set_verbosity(verbosity)
    if getattr(config, "dequantize", False) and not asked:
        return "transformers would dequantize the whole model to 16 bit here"
    return ""


def _unreadable(config_dict: dict[str, Any]) -> str:
    """Why qplug has no reader for this config, or an empty string."""
    method = str(config_dict.get("quant_method") or "bitsandbytes").lower()
    try:
        get_registry().format_for_method(method)
    except PluginError as error:
        return str(error)
    return ""


def announce(key: str, text: str) -> None:
    """Warn once for each ``key``."""
    if key not in ANNOUNCED:
        ANNOUNCED.add(key)
        log.warning(text)


def _merging(merge: Any, config_class: type) -> Any:
    """transformers' merge of a checkpoint's config and the caller's: the caller's QplugConfig decides that qplug serves it."""

    @functools.wraps(merge)
    def merged(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        if isinstance(quantization_config_from_args, config_class):
            return quantization_config_from_args.of(quantization_config)  # type: ignore[attr-defined]
        return merge(quantization_config, quantization_config_from_args)

    return merged
