"""Source: a checkpoint as it lies on disk. Headers and configs first; tensors are read when asked for, from a memory map."""

from __future__ import annotations

import json
import math
import mmap
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
    "BOOL": 1, "F8_E4M3": 1, "F8_E4M3FNUZ": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
"""Bytes of one element by safetensors dtype name."""

CONFIG_FILES = (
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "quantization_config.json",
    "quanto_qmap.json",
)
FLAG_FILES = ("smoothquant.ini", "pertensorquant.ini")
HEADER_LIMIT = 100 * 2**20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its header describes it; ``start`` and ``stop`` are byte offsets in ``file``.

    ``transposed``: it is stored ``[K, N]`` and read as ``shape``, ``[N, K]``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int
    transposed: bool = False


@dataclass
class Source:
    """An opened checkpoint.

    config
        config.json, empty where there is none.
    quant_config
        Its ``quantization_config``, or a file beside it that says the same; None for an unquantized checkpoint.
    quant_config_from
        Where ``quant_config`` was read.
    files
        Other quantization files by name (a presence flag is an empty dict).
    tensors
        Every tensor of every weight file, by stored name.
    metadata
        ``__metadata__`` of the headers, merged.
    """

    path: Path
    config: dict[str, Any]
    quant_config: dict[str, Any] | None
    quant_config_from: str
    files: dict[str, Any]
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Source:
        """Read configs and headers of a folder, of a single ``.safetensors`` file, or of an index file.

        :raises CheckpointError: for a missing, truncated or contradictory file.
        """
        path = Path(path)
        if not path.exists():
            raise CheckpointError(f"there is no checkpoint at {path}; give a folder with config.json and *.safetensors")
        folder = path if path.is_dir() else path.parent
        config = _read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        files: dict[str, Any] = {n: _read_json(folder / n) for n in CONFIG_FILES if (folder / n).exists()}
        files.update({n: {} for n in FLAG_FILES if (folder / n).exists()})
        quant_config, origin = find_quant_config(config, files)
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        for file in _weight_files(path):
            entries, extra = read_header(file)
            for info in entries:
                if info.name in tensors:
                    raise CheckpointError(
                        f"tensor {info.name} is in both {tensors[info.name].file.name} and {file.name}; one of the two files "
                        "does not belong to this checkpoint, so remove it or list the right ones in the index"
                    )
                tensors[info.name] = info
            metadata.update(extra)
        return cls(path, config, quant_config, origin, files, tensors, metadata)

    def read(self, name: str, index: tuple[slice | int, ...] = ()) -> Tensor:
        """A tensor, or a cut of it, in memory of its own. E8M0 scales come as their bytes, uint8."""
        import torch

        info = self.tensors[name]
        view = _view(torch, self._map(info.file), info)
        cut = view[index] if index else view
        # A copy ends the dependence on the map, so that its pages can be dropped.
        result = torch.empty(cut.shape, dtype=cut.dtype)
        result.copy_(cut)
        return result

    def split(self, name: str, pieces: Sequence[tuple[str, int]]) -> None:
        """See a tensor ``[..., K]`` as several: consecutive rows of it, under names of their own; ``name`` is gone then.

        ``pieces``: names and numbers of rows, all leading axes flattened, in the order of the file.

        :raises ValueError: where they are not all rows.
        """
        info = self.tensors[name]
        rows, width = math.prod(info.shape[:-1]), info.shape[-1]
        if sum(count for _, count in pieces) != rows:
            raise ValueError(f"{name} {list(info.shape)} was to be split into {sum(count for _, count in pieces)} rows")
        row_bytes = (info.stop - info.start) // rows if rows else 0
        start = info.start
        del self.tensors[name]
        for piece, count in pieces:
            stop = start + count * row_bytes
            self.tensors[piece] = TensorInfo(piece, info.dtype, (count, width), info.file, start, stop)
            start = stop

    def transpose(self, name: str) -> None:
        """See a matrix that is stored ``[K, N]`` as ``[N, K]``; once, however often it is said."""
        self.tensors[name] = _turned(self.tensors[name])

    def release(self, name: str) -> None:
        """Give the pages of a tensor back to the system, once its layer is loaded."""
        info = self.tensors[name]
        if hasattr(mmap, "MADV_DONTNEED") and info.stop > info.start:
            page = mmap.ALLOCATIONGRANULARITY
            start = info.start // page * page
            self._map(info.file).madvise(mmap.MADV_DONTNEED, start, info.stop - start)

    def close(self) -> None:
        """Unmap all files."""
        for mapped in self._maps.values():
            try:
                mapped.close()
            except BufferError:  # A tensor still looks into the map: it is closed when that goes.
                continue
        self._maps.clear()

    def load_tokenizer(self) -> Any:
        """The tokenizer beside the weights, by transformers, with whatever transformers raises where there is none."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path if self.path.is_dir() else self.path.parent)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.stop - t.start for t in self.tensors.values())

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as handle:
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]


def _turned(info: TensorInfo) -> TensorInfo:
    return info if info.transposed else replace(info, shape=info.shape[::-1], transposed=True)


def _view(torch: Any, mapped: mmap.mmap, info: TensorInfo) -> Any:
    if info.transposed:
        return _view(torch, mapped, replace(info, shape=info.shape[::-1], transposed=False)).t()
    dtypes = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
        "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
        "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.uint8,
    }  # fmt: skip
    dtype = dtypes[info.dtype]
    count = math.prod(info.shape)
    if count == 0:
        return torch.empty(info.shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        if info.start % ITEM_BYTES[info.dtype]:
            return torch.frombuffer(bytearray(mapped[info.start : info.stop]), dtype=dtype).view(info.shape)
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=info.start).view(info.shape)


def read_header(file: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """Tensors and ``__metadata__`` of one safetensors file, checked against its size.

    :raises CheckpointError: for a file that is truncated or whose header is not one.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        head = handle.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if len(head) < 8 or length > min(size - 8, HEADER_LIMIT):
            raise CheckpointError(
                f"{file} has {size} bytes and no whole safetensors header; it is truncated or not a safetensors file, so fetch it again"
            )
        try:
            header = json.loads(handle.read(length))
        except ValueError as error:
            raise CheckpointError(f"the header of {file} is not JSON ({error}); fetch the file again") from None
    return _header_entries(header, file, 8 + length, size)


def _header_entries(header: Any, file: Path, data: int, size: int) -> tuple[list[TensorInfo], dict[str, str]]:
    entries = []
    if not isinstance(header, dict):
        raise CheckpointError(
            f"the header of {file} is a {type(header).__name__}; a JSON object was needed, so fetch the file again"
        )
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            expected = math.prod(shape) * ITEM_BYTES[dtype]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the header of {file} describes tensor {name} as {entry!r}, which lacks or does not know {error}; rewrite the file"
            ) from None
        if stop - start != expected or start < 0 or any(length < 0 for length in shape):
            raise CheckpointError(
                f"tensor {name} in {file} has {stop - start} bytes; {dtype} {list(shape)} needs {expected}, so the file is damaged"
            )
        if data + stop > size:
            raise CheckpointError(
                f"{file} has {size} bytes; tensor {name} ends at byte {data + stop}, so the file is truncated: fetch it again"
            )
        entries.append(TensorInfo(name, dtype, shape, file, data + start, data + stop))
    return entries, dict(header.get("__metadata__") or {})


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _indexed_files(path)
        return [path]
    index = path / "model.safetensors.index.json"
    if index.exists():
        return _indexed_files(index)
    files = sorted(path.glob("*.safetensors"))
    single = path / "model.safetensors"
    if single in files:
        return [single]
    if not files:
        raise CheckpointError(
            f"{path} holds no *.safetensors; qplug reads safetensors only, so convert the weights (a .bin file runs code when opened)"
        )
    return files


def _indexed_files(index: Path) -> list[Path]:
    entries = _read_json(index).get("weight_map")
    if not isinstance(entries, Mapping) or not entries:
        raise CheckpointError(f"{index} has no weight_map; fetch the index again")
    files = [index.parent / name for name in dict.fromkeys(entries.values())]
    missing = [f.name for f in files if not f.exists()]
    if missing:
        raise CheckpointError(
            f"{index.name} names {len(files)} files and {', '.join(missing)} is not there; fetch it, the checkpoint is incomplete"
        )
    present = {info.name for file in files for info in read_header(file)[0]}
    lost = [name for name in entries if name not in present]
    if lost:
        raise CheckpointError(
            f"{index.name} says that {lost[0]} is in {entries[lost[0]]}, which does not hold it; fetch both files again"
        )
    return files


def find_quant_config(config: dict[str, Any], files: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The quantization config of a checkpoint and where it was found: in config.json, else in a file beside it."""
    places = [("config.json", config), ("config.json text_config", config.get("text_config") or {})]
    for place, holder in places:
        for key in ("quantization_config", "compression_config"):
            found = holder.get(key)
            if isinstance(found, dict):
                return found, f"{place} {key}"
    for name in CONFIG_FILES:
        if name in files:
            return files[name], name
    return None, ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); fetch or correct it") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}; a JSON object was needed")
    return found


class MemorySource:
    """Tensors that an engine holds in memory, seen as a source: for engines that read files themselves, and for reloads.

    ``tensors`` by stored name. E8M0 tensors are given as torch.float8_e8m0fnu or as bytes, uint8.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        here = Path("memory")
        self.tensors = {
            name: TensorInfo(name, _dtype_name(t), tuple(t.shape), here, 0, t.nbytes) for name, t in self._tensors.items()
        }

    def read(self, name: str, index: tuple[slice | int, ...] = ()) -> Tensor:
        """The tensor or a cut of it, without a copy."""
        tensor = self._tensors[name]
        if self.tensors[name].dtype == "F8_E8M0":
            import torch

            tensor = tensor.view(torch.uint8)
        return tensor[index] if index else tensor

    def transpose(self, name: str) -> None:
        """See :meth:`Source.transpose`."""
        if not self.tensors[name].transposed:
            self._tensors[name] = self._tensors[name].t()
        self.tensors[name] = _turned(self.tensors[name])

    def release(self, name: str) -> None:
        """The owner of the tensors frees them."""


def _dtype_name(tensor: Tensor) -> str:
    names = {
        "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
        "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
        "float8_e4m3fn": "F8_E4M3", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    }  # fmt: skip
    return names[str(tensor.dtype).removeprefix("torch.")]
