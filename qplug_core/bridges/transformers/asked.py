"""Two questions before transformers picks a quantizer: does the checkpoint say how it is quantized, and does anybody read that?

transformers looks at config.json alone. It takes a checkpoint that says it in a file beside (``quantize_config.json``,
``smoothquant.ini``) or under another key for a 16-bit one, and skips a method that it does not know; both give random weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

from ...planner import read_config
from ...registry import get_registry
from ...source import CONFIG_FILES, FLAG_FILES, Source
from .config import QplugConfig
from .gguf import GgufChooser
from .policy import VARIABLE, Wanted, announce


def asking(original: Callable[..., Any], wanted: Wanted, known: Container[str]) -> Callable[..., Any]:
    """transformers' ``get_hf_quantizer`` with the questions before it.

    ``wanted``: what ``$QPLUG_TRANSFORMERS`` says. ``known``: the methods that stand in transformers' table.
    """

    @functools.wraps(original)
    def get_hf_quantizer(config: Any, quantization_config: Any, *given: Any, **options: Any) -> Any:
        if options.get("gguf_file") is not None:
            # With a file, transformers takes no config but its own, so ours comes afterwards.
            ours = quantization_config if isinstance(quantization_config, QplugConfig) else None
            found = original(config, None if ours else quantization_config, *given, **options)
            if isinstance(found[0], GgufChooser):
                found[0].model_config, found[0].ours = found[1], ours
            return found
        if quantization_config is None and (reason := _reason(config, wanted, known)):
            where = config.name_or_path
            announce(where, f"qplug serves {where}: {reason} ({VARIABLE}=0 leaves it to transformers)")
            quantization_config = QplugConfig()
        if isinstance(quantization_config, QplugConfig) and (said := _said(config)) and _method(said) not in known:
            config.quantization_config = None  # transformers would skip it with a warning; qplug reads the file itself.
        return original(config, quantization_config, *given, **options)

    return get_hf_quantizer


def _reason(config: Any, wanted: Wanted, known: Container[str]) -> str:
    """Why qplug has to load what transformers would load without its quantization; an empty string where that is not so.

    :raises PluginError: for a method that nobody reads.
    """
    said = _said(config)
    if not wanted or _method(said) in known:
        return ""
    if said is not None and (method := _method(said) or str(said.get("quantization") or "")):
        decl = get_registry().format_for_method(method).decl
        return f"transformers does not know {method}" if _is_wanted(wanted, decl.detects) else ""
    folder = Path(config.name_or_path)
    beside = [name for name in (*CONFIG_FILES, *FLAG_FILES) if (folder / name).is_file()]
    if not config.name_or_path or not folder.is_dir() or (said is None and not beside):
        return ""
    registry = get_registry()
    entries: list[Any] = [*registry.formats, *registry.configs]
    files = {file for entry in entries for file in entry.decl.files}
    if said is None and not files.intersection(beside):
        return ""
    source = Source.open(folder)
    method = read_config(source, registry)[0].method
    names = {method, *(name for entry in entries if entry.decl.name == method for name in entry.decl.detects)}
    return f"{source.quant_config_from or beside[0]} says that it is {method}" if _is_wanted(wanted, names) else ""


def _said(config: Any) -> Any:
    """What config.json says of quantization: a dict, an object of transformers, or None."""
    found = getattr(config, "quantization_config", None)
    return found or getattr(config.get_text_config(decoder=True), "quantization_config", None)


def _method(said: Any) -> str:
    """The method by which transformers looks for a quantizer; an empty string where it finds none."""
    said = {} if said is None else said if isinstance(said, dict) else said.to_dict()
    for bits in (8, 4):
        if said.get(f"load_in_{bits}bit"):
            return f"bitsandbytes_{bits}bit"
    return str(said.get("quant_method") or "")


def _is_wanted(wanted: Wanted, methods: Iterable[str]) -> bool:
    return isinstance(wanted, str) or bool(wanted.intersection(methods))
