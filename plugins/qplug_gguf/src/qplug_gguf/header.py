"""Header: metadata and tensor table of one GGUF file, read by the gguf package and checked against the file's size."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType

from qplug_core.errors import CheckpointError

PLAIN = {"F64": "F64", "F32": "F32", "F16": "F16", "BF16": "BF16", "I8": "I8", "I16": "I16", "I32": "I32", "I64": "I64"}
"""Types that hold one number in one element, with their names in safetensors."""


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: name and type as written, shape with the row length last, byte offsets in the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        """Shape of a quantized tensor as bytes: the last axis in blocks."""
        values, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.type]]
        return (*self.shape[:-1], self.shape[-1] // values * size)


@dataclass(frozen=True)
class Array:
    """An array of the metadata that was stepped over."""

    length: int


@dataclass(frozen=True)
class Header:
    """``metadata``: every scalar and string by key, and every array as an :class:`Array`."""

    file: Path
    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]

    @property
    def architecture(self) -> str:
        """``general.architecture``, or an empty string."""
        return str(self.metadata.get("general.architecture", ""))


class _Reader(GGUFReader):
    """The package's reader, which steps over arrays instead of taking a vocabulary apart, and refuses to look beyond the end of
    the file, where its parent goes on with nothing for as long as a count says."""

    def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: Any = None) -> npt.NDArray[Any]:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"the file ends at byte {len(self.data)} and {end} are needed")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[npt.NDArray[Any]], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = self._get(orig_offs + 4, np.uint64)
        end = orig_offs + 12
        if item == GGUFValueType.STRING:
            data = self.data.data
            for _ in range(int(count[0])):
                end += 8 + int.from_bytes(data[end : end + 8], "little")
                if end > len(data):
                    break
        elif item in self.gguf_scalar_to_np:
            end += int(count[0]) * np.dtype(self.gguf_scalar_to_np[item]).itemsize
        else:
            raise ValueError("an array of arrays was found")
        if end > len(self.data):
            raise ValueError(f"the file ends at byte {len(self.data)} and {end} are needed")
        return end - orig_offs, [count], [0], [GGUFValueType.ARRAY, item]


def read_header(file: Path) -> Header:
    """The header of ``file``.

    :raises CheckpointError: for a file that is no GGUF file of versions 2 or 3 in little-endian byte order, or that is truncated.
    """
    _check_start(file)
    try:
        reader = _Reader(file)
        metadata = {key: _value(field) for key, field in reader.fields.items()}
        tensors = tuple(_tensor(t) for t in reader.tensors)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        # A number of numpy says its type too.
        reason = re.sub(r"np\.\w+\((\w+)\)", r"\1", str(error.args[0] if error.args else error).split("\n")[0])
        raise CheckpointError(
            f"the header of {file} does not parse ({reason}); the file is truncated, damaged or of a newer kind, so fetch it again or "
            "upgrade the gguf package"
        ) from None
    return Header(file, metadata, tensors)


def _check_start(file: Path) -> None:
    """Magic, byte order and version, which deserve a sentence of their own."""
    with file.open("rb") as handle:
        start = handle.read(8)
    if len(start) < 8 or int.from_bytes(start[:4], "little") != GGUF_MAGIC:
        raise CheckpointError(
            f"{file} starts with {start[:4]!r}; a GGUF file starts with b'GGUF', so fetch it again or correct its name"
        )
    little, big = int.from_bytes(start[4:], "little"), int.from_bytes(start[4:], "big")
    if little not in (2, 3) and big in (2, 3):
        raise CheckpointError(
            f"{file} is a big-endian GGUF file; little-endian ones are read, so convert it with `gguf-convert-endian FILE little`"
        )
    if little not in (2, 3):
        raise CheckpointError(
            f"{file} is of GGUF version {little}; versions 2 and 3 are read, so convert the model again with a llama.cpp of today"
        )


def _value(field: Any) -> Any:
    return Array(int(field.parts[-1][0])) if field.types[0] == GGUFValueType.ARRAY else field.contents()


def _tensor(tensor: Any) -> GGUFTensor:
    shape = tuple(int(d) for d in reversed(tensor.shape.tolist()))
    kind = tensor.tensor_type.name
    values, size = GGML_QUANT_SIZES[tensor.tensor_type]
    count = math.prod(shape)
    if count % values or (values > 1 and shape[-1] % values):
        raise ValueError(
            f"tensor {tensor.name} has rows of {shape[-1]} values, which is no multiple of the {values} of {kind}"
        )
    if count // values * size != tensor.n_bytes:
        raise ValueError(f"tensor {tensor.name} has {tensor.n_bytes} bytes and needs {count // values * size}")
    start = int(tensor.data_offset)
    return GGUFTensor(tensor.name, kind, shape, start, start + int(tensor.n_bytes))
