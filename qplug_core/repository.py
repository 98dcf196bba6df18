"""Repositories of the Hugging Face Hub: their headers for a plan, their files for a load. The client is huggingface_hub."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import CheckpointError
from .source import CONFIG_FILES, FLAG_FILES, Source, TensorInfo, find_quant_config

if TYPE_CHECKING:
    from .decl import FormatDecl
    from .registry import Registry

_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(?:@[\w./-]+)?$")
_WANTED = ("*.safetensors", "*.json", "*.ini", "*.model", "*.txt", "*.jinja")
Result = TypeVar("Result")


def is_repository(text: str | Path) -> bool:
    """True where ``text`` is ``owner/name`` or ``owner/name@revision`` and no file or folder of that name is here."""
    return isinstance(text, str) and _ID.match(text) is not None and not Path(text).exists()


def open_checkpoint(path: str | Path, registry: Registry, headers: bool = False) -> Source:
    """A checkpoint: safetensors, or files of a suffix that a format opens itself.

    ``headers``: no weight will be read, so of a repository only configs and headers are fetched.

    :raises CheckpointError: where it cannot be had or read.
    """
    if not is_repository(path) and (decl := _opener(Path(path), registry)) is not None:
        source: Source = registry.load(decl).open(Path(path))
        return source
    return open_headers(path) if headers else Source.open(local_folder(path))


def _opener(path: Path, registry: Registry) -> FormatDecl | None:
    """The format that opens a file of this suffix, or a folder whose only weights, or only ``model`` file, have one."""
    names = [path.name] if path.is_file() else sorted(f.name for f in path.glob("*")) if path.is_dir() else []
    if {"model.safetensors", "model.safetensors.index.json"} & set(names):
        return None
    if path.is_dir() and any(name.endswith(".safetensors") for name in names):
        names = [name for name in names if Path(name).stem == "model"]
    suffixes = {Path(name).suffix for name in names}
    for entry in registry.formats:
        if suffixes & set(entry.decl.opens):
            return entry.decl
    if ".gguf" in suffixes:
        raise CheckpointError(f"{path} is a GGUF checkpoint, which no installed plugin opens; pip install qplug-gguf")
    return None


def local_folder(path: str | Path) -> Path:
    """``path``, or the folder that its repository was downloaded to (huggingface_hub's cache is used and filled).

    :raises CheckpointError: where the repository cannot be had.
    """
    if not is_repository(path):
        return Path(path)
    from huggingface_hub import snapshot_download

    name, revision = _split(str(path))
    return Path(_ask(str(path), lambda: snapshot_download(name, revision=revision, allow_patterns=list(_WANTED))))


def open_headers(path: str | Path) -> Source:
    """A checkpoint whose weights will not be read: a folder, or a repository of which only configs and headers are fetched.

    :raises CheckpointError: as :meth:`Source.open`, and where the repository cannot be had.
    """
    if not is_repository(path):
        return Source.open(path)
    from huggingface_hub import HfApi, try_to_load_from_cache

    name, revision = _split(str(path))
    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str) and _is_cached(name, revision):
        return Source.open(local_folder(path))
    api = HfApi()
    listing = _ask(str(path), lambda: api.model_info(name, revision=revision, timeout=10))
    listed = {sibling.rfilename for sibling in listing.siblings or ()}
    files: dict[str, Any] = {file: {} for file in FLAG_FILES if file in listed}
    for file in ("config.json", *CONFIG_FILES):
        if file in listed:
            files[file] = _json(str(path), functools.partial(api.hf_hub_download, name, file, revision=revision))
    config = files.pop("config.json", {})
    found = _ask(str(path), lambda: api.get_safetensors_metadata(name, revision=revision))
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file, header in found.files_metadata.items():
        metadata.update(header.metadata or {})
        for tensor, info in header.tensors.items():
            start, stop = info.data_offsets
            tensors[tensor] = TensorInfo(tensor, info.dtype, tuple(info.shape), Path(file), start, stop)
    quant_config, origin = find_quant_config(config, files)
    return Source(Path(str(path)), config, quant_config, origin, files, tensors, metadata)


def _split(text: str) -> tuple[str, str | None]:
    name, _, revision = text.partition("@")
    return name, revision or None


def _is_cached(name: str, revision: str | None) -> bool:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(_WANTED), local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return False
    return any(folder.glob("*.safetensors"))


def _json(repository: str, download: Callable[[], str]) -> dict[str, Any]:
    path = _ask(repository, download)
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{Path(path).name} of {repository} is not JSON ({error}); its owner has to correct it"
        ) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{Path(path).name} of {repository} holds a {type(found).__name__}; a JSON object was needed")
    return found


def _ask(repository: str, question: Callable[[], Result]) -> Result:
    """The answer of the hub, with every way of failing as one sentence."""
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return question()
    except GatedRepoError:
        reason = "it is gated: accept its terms on its page and log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = "the Hub has no public repository of that name: correct it, or log in with `hf auth login` if it is private"
    except RevisionNotFoundError:
        reason = "it has no such revision: correct what follows the @"
    except (HTTPError, OSError, ValueError) as error:
        text = str(error).strip() or type(error).__name__
        first = text.splitlines()[0].split(". ")[0]
        reason = f"the Hub did not give it ({first}): give a folder that is here, or try again online"
    raise CheckpointError(f"there is no folder {repository}, and as a Hugging Face repository {reason}")
