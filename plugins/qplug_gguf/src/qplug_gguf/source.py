"""GGUFSource: GGUF files seen as a checkpoint with the names, shapes and row order of the Hugging Face model."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from qplug_core.errors import CheckpointError
from qplug_core.source import Source, TensorInfo

from .header import PLAIN, GGUFTensor, Header, read_header
from .metadata import Metadata
from .names import PERMUTED, model_names, unpermuted_rows

FACTORS = "rope_freqs.weight"
_SPLIT = re.compile(r"^(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf$")


@dataclass
class GGUFSource(Source):
    """A source whose quantized tensors are bytes ``[N, blocks * size]``, uint8, under the name of the weight.

    ``quant_config`` is ``{"quant_method": "gguf", "types": {module: GGUF type}}``.

    first
        The file that holds metadata and tokenizer.
    order
        Stored row by row of the model, for tensors whose rows llama.cpp reorders.
    alias
        Tensors that read the bytes of another: a quantized embedding that is also the output projection.
    notes
        What was read off the file and is in no config.
    """

    first: Path = field(default_factory=Path)
    order: dict[str, Tensor] = field(default_factory=dict, repr=False)
    alias: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def read(self, name: str, index: tuple[slice | int, ...] = ()) -> Tensor:
        """See :class:`~qplug_core.source.Source`."""
        order = self.order.get(name)
        if order is None:
            return super().read(name, index)
        rows, *columns = index or (slice(None),)
        # Rows of the model are scattered over a head, so the rows in between are read too.
        whole = super().read(name, (slice(None), *columns))
        return whole[order[rows]]

    def load_tokenizer(self) -> Any:
        """The model's own tokenizer.json where it lies beside the file, else transformers' reading of the vocabulary inside.

        The file is read alone: transformers mixes it with a tokenizer.model that it finds in the same folder, and then adds
        neither the first token nor the first space.
        """
        from transformers import AutoTokenizer

        folder = self.first.parent
        if all((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
            return AutoTokenizer.from_pretrained(folder)
        with tempfile.TemporaryDirectory() as alone:
            (Path(alone) / self.first.name).symlink_to(self.first.absolute())
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=self.first.name)
        tokenizer.name_or_path = str(self.first)
        return tokenizer

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, each counted once."""
        return sum(info.stop - info.start for name, info in self.tensors.items() if name not in self.alias)


def open_gguf(path: Path) -> GGUFSource:
    """A GGUF file, all files of a split one, or a folder that holds one of these.

    :raises CheckpointError: for several models in a folder, a missing part, and a file that does not parse.
    :raises ConfigError: for a model of another family, and a config.json of another model.
    """
    headers = [read_header(file) for file in _files(path)]
    _check_split(headers)
    metadata = Metadata(headers[0])
    layers, held = metadata.number("block_count"), sum(len(header.tensors) for header in headers)
    if not 0 < layers <= held:
        raise CheckpointError(
            f"{headers[0].file} says it has {layers} layers and holds {held} tensors; at least one tensor for each was needed, so the file is "
            "damaged, fetch it again"
        )
    names = model_names(metadata.architecture, layers)
    source = GGUFSource(path, {}, None, "", {}, {}, {}, first=headers[0].file)
    types: dict[str, str] = {}
    for header in headers:
        for tensor in header.tensors:
            _add(source, types, names.get(tensor.name, tensor.name), tensor, header.file)
    if metadata.architecture in PERMUTED:
        source.order = _orders(source, metadata)
    source.config = _config(source, metadata, types)
    source.metadata = {key: str(value) for key, value in headers[0].metadata.items() if key.startswith("general.")}
    if types:
        source.quant_config = {"quant_method": "gguf", "types": types}
        source.quant_config_from = f"tensor types of {headers[0].file.name}"
    return source


def _orders(source: GGUFSource, metadata: Metadata) -> dict[str, Tensor]:
    """The order of rows of every weight and bias of queries and keys."""
    heads = {"q_proj": int(metadata.number("attention.head_count")), "k_proj": metadata.kv_heads()}
    orders = {}
    for name, info in source.tensors.items():
        count = heads.get(name.split(".")[-2]) if "." in name else None
        if count is None:
            continue
        if count < 1 or info.shape[0] % (2 * count):
            raise CheckpointError(
                f"{name} has {info.shape[0]} rows in {info.file}; an even number for each of {count} heads was needed, so fetch it again"
            )
        orders[name] = unpermuted_rows(info.shape[0], count)
    return orders


def _add(source: GGUFSource, types: dict[str, str], name: str, tensor: GGUFTensor, file: Path) -> None:
    if name in source.tensors:
        raise CheckpointError(
            f"{tensor.name} is in both {source.tensors[name].file.name} and {file.name}; fetch the parts again"
        )
    dtype = PLAIN.get(tensor.type)
    if dtype is None:
        types[name.removesuffix(".weight")] = tensor.type
    shape = tensor.shape if dtype else tensor.bytes_shape
    source.tensors[name] = TensorInfo(name, dtype or "U8", shape, file, tensor.start, tensor.stop)


def _config(source: GGUFSource, metadata: Metadata, types: dict[str, str]) -> dict[str, Any]:
    """config.json beside the file, or the metadata; what the tensors say goes before both."""
    tensors = source.tensors
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise CheckpointError(
            f"{source.first} has no token_embd.weight; it holds no language model, so fetch the model's own file"
        )
    factors = source.read(FACTORS).tolist() if FACTORS in tensors else None
    tensors.pop(FACTORS, None)
    tied = "lm_head.weight" not in tensors
    if tied and "model.embed_tokens" in types:
        # Kernels pack an embedding and a projection differently, so the two are two layers that read the same bytes.
        source.alias["lm_head.weight"] = embedding.name
        tensors["lm_head.weight"] = TensorInfo(
            "lm_head.weight", *(getattr(embedding, f) for f in ("dtype", "shape", "file", "start", "stop"))
        )
        types["lm_head"] = types["model.embed_tokens"]
        source.notes.append("there is no output.weight, so lm_head reads token_embd.weight")
        tied = False
    beside = source.first.parent / "config.json"
    bias = "model.layers.0.self_attn.q_proj.bias" in tensors
    own = metadata.config(embedding.shape[0], tied, bias, factors)
    if factors is not None:
        source.notes.append("rotary frequencies are divided by rope_freqs.weight")
    if not beside.exists():
        source.notes.append("the config was read from the metadata, because there is no config.json")
        return own
    config = _read_json(beside)
    metadata.check(config)
    for key in ("quantization_config", "compression_config"):
        if config.pop(key, None) is not None:
            source.notes.append(f"{key} of config.json is of other weights and was left unread")
    changes = {"vocab_size": own["vocab_size"], "tie_word_embeddings": tied}
    return {**config, **changes, **({"rope_parameters": own["rope_parameters"]} if factors is not None else {})}


def _files(path: Path) -> list[Path]:
    if path.is_file():
        found = _SPLIT.match(path.name)
        return _parts(path.parent, found) if found else [path]
    files = sorted(path.glob("*.gguf"))
    splits = {f.name: m for f in files if (m := _SPLIT.match(f.name))}
    models = [f for f in files if f.name not in splits]
    stems = {m["stem"]: m for m in splits.values()}
    if len(models) + len(stems) != 1:
        names = ", ".join([*(f.name for f in models), *(f"{stem}-*" for stem in sorted(stems))])
        raise CheckpointError(f"{path} holds {len(models) + len(stems)} GGUF models ({names}); give the path of one of them")
    return models or _parts(path, next(iter(stems.values())))


def _parts(folder: Path, found: re.Match[str]) -> list[Path]:
    count = int(found["count"])
    parts = [folder / f"{found['stem']}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)} of a model in {count} files; fetch what is missing")
    return parts


def _check_split(headers: list[Header]) -> None:
    """The files are all parts of one split model, in order."""
    first = headers[0]
    for i, header in enumerate(headers):
        count, number = header.metadata.get("split.count", 0) or 1, header.metadata.get("split.no", 0)
        if (count, number) != (len(headers), i):
            raise CheckpointError(
                f"{header.file} says that it is part {number + 1} of {count}; part {i + 1} of {len(headers)} was needed, so give the parts "
                "the names that they were written with (model-00001-of-00003.gguf)"
            )
    wanted, found = first.metadata.get("split.tensors.count"), sum(len(h.tensors) for h in headers)
    if wanted is not None and len(headers) > 1 and wanted != found:
        raise CheckpointError(
            f"{first.file} says that its parts hold {wanted} tensors and they hold {found}; fetch them again"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); fetch or correct it") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}; a JSON object was needed")
    return found
