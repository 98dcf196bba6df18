"""Checkpoints in files that vLLM has no loader for, GGUF among them: an installed format opens them, and vLLM streams what it reads.

vLLM's loader takes ``*.safetensors`` and ``*.bin``. A folder without any, with a file that a plugin opens, is read by that plugin. config.json
and the tokenizer lie beside the file, as vLLM needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import QplugError
from ...registry import get_registry
from ...repository import open_checkpoint
from . import log

OWN = (".safetensors", ".bin", ".pt")
"""Suffixes of files that vLLM reads itself."""


FUNCTION = "get_all_weights"
"""Through which vLLM streams a checkpoint."""


def owner() -> Any:
    """Where vLLM has :data:`FUNCTION`."""
    return import_module("vllm.model_executor.model_loader.default_loader").DefaultModelLoader


def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    """:data:`FUNCTION`, with core's reader where vLLM has none."""

    def get_all_weights(self: Any, model_config: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
        path = Path(model_config.model)
        return tensors(path) if opened(path) else original(self, model_config, model)

    return get_all_weights


def opened(folder: Path) -> str:
    """The file in a folder that an installed format opens and vLLM does not, or an empty string."""
    names = sorted(file.name for file in folder.glob("*")) if folder.is_dir() else []
    if any(name.endswith(OWN) for name in names):
        return ""
    try:
        suffixes = tuple({suffix for form in get_registry().formats for suffix in form.decl.opens})
    except QplugError as error:
        log.warning("qplug cannot run: %s", error)
        return ""
    return next((name for name in names if suffixes and name.endswith(suffixes)), "")


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint by its stored name, one at a time.

    :raises ValueError: one sentence, where it cannot be read.
    """
    try:
        source = open_checkpoint(path, get_registry())
    except QplugError as error:
        raise ValueError(str(error)) from None
    for name in source.tensors:
        yield name, source.read(name)
