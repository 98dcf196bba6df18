"""Writing a checkpoint: safetensors in shards, in a folder that gets its name when it is whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError

WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
    ".ot",
    ".npz",
)
"""Endings of weight files, which do not go along: they are what was quantized, or the same in other words."""


class ShardWriter:
    """A checkpoint in the making.

    target
        Where it will be.
    folder
        Where it is until :meth:`finish`: a hidden folder beside ``target``, on the same file system.
    nbytes
        Bytes of all tensors so far.
    """

    def __init__(self, target: Path, shard_bytes: int) -> None:
        self.target = target
        self.shard_bytes = shard_bytes
        target.parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        self.nbytes = 0
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._addresses: set[int] = set()
        self._places: dict[str, int] = {}
        self._shards = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """One tensor; a full shard is written.

        :raises CheckpointError: for a name that is there already.
        """
        if name in self._places:
            raise CheckpointError(f"{name} would be written twice; the checkpoint names two tensors alike")
        if self._held and self._held_bytes + tensor.nbytes > self.shard_bytes:
            self._flush()
        tensor = tensor.contiguous()
        # safetensors writes no two tensors that share memory, and a view keeps all of it.
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._addresses or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        self._addresses.add(tensor.untyped_storage().data_ptr())
        self._held[name] = tensor
        self._held_bytes += tensor.nbytes
        self._places[name] = self._shards
        self.nbytes += tensor.nbytes

    def close(self) -> None:
        """Write the last shard and the index."""
        if self._held:
            self._flush()
        if self._shards == 1:
            self._shard(0).rename(self.folder / "model.safetensors")
            return
        names = [f"model-{i + 1:05}-of-{self._shards:05}.safetensors" for i in range(self._shards)]
        for i, name in enumerate(names):
            self._shard(i).rename(self.folder / name)
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": {n: names[i] for n, i in self._places.items()}}
        _write(self.folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")

    def finish(self) -> None:
        """Give the folder its name."""
        self.folder.chmod(0o777 & ~_umask())
        os.replace(self.folder, self.target)

    def discard(self) -> None:
        """Remove what was not finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _flush(self) -> None:
        save_file(self._held, self._shard(self._shards), metadata={"format": "pt"})
        self._held, self._held_bytes, self._addresses = {}, 0, set()
        self._shards += 1

    def _shard(self, index: int) -> Path:
        return self.folder / f"shard-{index}"


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """config.json."""
    _write(folder / "config.json", json.dumps(config, indent=2) + "\n")


def copy_other_files(source: Path, folder: Path) -> None:
    """The tokenizer and whatever else lies beside the weights, folders too; hidden files and weights do not go along."""
    root = source if source.is_dir() else source.parent
    for file in sorted(root.rglob("*")):
        relative = file.relative_to(root)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or not file.is_file() or file.name.endswith(WEIGHTS) or relative == Path("config.json"):
            continue
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / relative)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
