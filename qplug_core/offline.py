"""quantize(): a 16-bit checkpoint into a quantized one, layer by layer, for algorithms that need no data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from .config import LayerQuant
from .decl import FormatDecl, SchemePattern
from .device import Device
from .engine.describe import Description, describe
from .engine.memory import trim
from .engine.names import StoredNames
from .engine.skeleton import model_config, skeleton
from .errors import CannotEncode, SchemeError, UsageError
from .format import CheckpointFormat
from .layer import PlainSlot, StoredPart
from .method import online_quantizer, plain_name, read_plain
from .planner import Planner
from .quant_plan import Decision, QuantPlan, Segment
from .quantizer import Quantizer
from .registry import Registry, get_registry
from .repository import open_checkpoint
from .resolve import Policy
from .scheme import QuantScheme
from .shards import ShardWriter, copy_other_files, write_config
from .source import Source
from .weight import OpaqueWeight, QuantWeight


@dataclass(frozen=True)
class Quantized:
    """What :func:`quantize` wrote: where, in which format and schemes, how many layers, and bytes of weights before and after."""

    path: Path
    format: str
    schemes: tuple[str, ...]
    layers: int
    nbytes_before: int
    nbytes: int
    notes: tuple[str, ...] = ()


def quantize(
    path: str | Path,
    out: str | Path,
    *,
    scheme: str | QuantScheme,
    algorithm: str | None = None,
    format: str | None = None,
    calibration: Any = None,
    shard_bytes: int = 2 * 2**30,
    progress: bool = False,
    registry: Registry | None = None,
) -> Quantized:
    """Write a 16-bit checkpoint to the folder ``out``, its linear layers and experts quantized.

    The weights are those of ``load(path, quantize=scheme)``, bit for bit, or a note says which are not. Of a multimodal model
    only the language part is quantized. Held in memory are one layer and one shard; ``out`` appears when it is whole and has been
    planned again.

    scheme
        As in :func:`qplug_core.load`, without a KV cache.
    algorithm
        A quantizer that looks at weights alone; None is the one that loading takes, round to nearest where it can.
    format
        What to write; None is the first that stores every layer without loss, those that store most schemes first.

    :raises UsageError: for an ``out`` that holds something, an unknown or calibrated algorithm, or calibration data.
    :raises CannotEncode: where no format, or not the one named, stores the result without loss.
    """
    registry = registry or get_registry()
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists and holds something; name a new folder")
    if calibration is not None:
        raise UsageError("calibration data was given, and quantization without calibration is all there is; leave it out")
    job = _Job(open_checkpoint(path, registry), scheme, algorithm, registry)
    refused: dict[str, str] = {}
    for name in _candidates(job, format):
        writer = ShardWriter(target, shard_bytes)
        try:
            done = job.write(name, writer, progress)
            writer.finish()
        except CannotEncode as reason:
            if format is not None:
                raise
            refused[name] = str(reason)
        else:
            return done
        finally:
            writer.discard()
    if format is None and refused:
        shown = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise CannotEncode(f"no installed format stores {job.said} without loss ({shown})")
    raise CannotEncode(
        f"no installed format writes {job.said} for {', '.join(sorted(job.ops))} layers; choose another scheme"
    )


def _candidates(job: _Job, wanted: str | None) -> list[str]:
    """Formats to try: the one that was named, or those that declare every scheme, most schemes first, then by name."""
    if wanted is not None:
        decl = job.registry.format(wanted).decl
        if not decl.writes:
            raise CannotEncode(f"{wanted} is read and not written; leave the format out, or name one that is written")
        return [wanted]
    declared = [entry.decl for entry in job.registry.formats]
    fitting = [d for d in declared if d.writes and job.ops <= set(d.ops) and all(_stores(d, s) for s in job.schemes)]
    return [d.name for d in sorted(fitting, key=lambda d: (-_breadth(d), d.name))]


def _stores(decl: FormatDecl, scheme: QuantScheme) -> bool:
    return any(SchemePattern(text).matches(scheme) for text in decl.schemes)


def _breadth(decl: FormatDecl) -> int:
    return sum(len(SchemePattern(text).example()) for text in decl.schemes)


@dataclass
class _Job:
    """One checkpoint and what is to become of it."""

    source: Source
    scheme: str | QuantScheme
    algorithm: str | None
    registry: Registry
    planner: Planner = field(init=False)
    described: Description = field(init=False)
    plan: QuantPlan = field(init=False)
    model: Any = field(init=False)
    _split: set[str] = field(default_factory=set)
    _apart_notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.planner = Planner(self.source, Device.cpu(), "float32", Policy("reference"), self.scheme, self.registry)
        if self.planner.kv_wanted is not None:
            raise SchemeError(
                f"{self.scheme} quantizes the KV cache too, which needs no other weights; leave its part out and load with kv_cache="
            )
        self.model, self.described = _described(self.source, self.planner)
        self.plan = self.planner.plan(self.described.layers, self.described.slots)

    @property
    def said(self) -> str:
        return " and ".join(sorted({str(s) for s in self.schemes}))

    @property
    def schemes(self) -> list[QuantScheme]:
        """Distinct schemes of all layers."""
        return list(dict.fromkeys(s.online for d in self.plan.decisions for s in d.segments if s.online is not None))

    @property
    def ops(self) -> set[str]:
        """Operations of the layers that are quantized."""
        return {d.layer.op for d in self.plan.decisions if d.quantized}

    def write(self, format_name: str, writer: ShardWriter, progress: bool) -> Quantized:
        """All tensors, config.json and the other files, through ``writer``; then a plan of what was written."""
        fmt: CheckpointFormat = self.registry.load(self.registry.format(format_name).decl)
        layers: dict[str, LayerQuant | None] = {}
        used: set[str] = set()
        columns = (
            TextColumn("quantizing"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} layers"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, transient=True, disable=not progress) as bar:
            for decision in bar.track(self.plan.decisions):
                if not decision.quantized:
                    layers |= self._plain_layers(decision)
                    continue
                for name, weight in self._weights(decision, used):
                    layers[name] = _put(writer, fmt, name, weight)
                trim()
            self._copy(writer, used)
        quantized = [name for name, quant in layers.items() if quant is not None]
        write_config(writer.folder, {**self.source.config, "quantization_config": fmt.quantization_config(layers)})
        copy_other_files(self.source.path, writer.folder)
        writer.close()
        self._check(writer.folder)
        schemes = tuple(sorted({str(quant.scheme) for quant in layers.values() if quant is not None}))
        before = self.source.nbytes
        return Quantized(
            writer.target,
            format_name,
            schemes,
            len(quantized),
            before,
            writer.nbytes,
            (*self.plan.all_notes(), *dict.fromkeys(self._apart_notes)),
        )

    def _plain_layers(self, decision: Decision) -> dict[str, LayerQuant | None]:
        if decision.layer.op == "embedding":
            return {}
        names = [part.name for segment in decision.segments for part in segment.parts if part.expert is None]
        return dict.fromkeys(names, None)

    def _weights(self, decision: Decision, used: set[str]) -> Iterator[tuple[str, QuantWeight]]:
        """Every weight of a layer with the module name that it is stored under."""
        for segment in decision.segments:
            for part in segment.parts:
                stored = plain_name(self.source, part)
                used.add(stored)
                weight = read_plain(self.source, decision.layer, part)
                yield from self._named(decision, segment, part, weight)
                self.source.release(stored)

    def _named(
        self, decision: Decision, segment: Segment, part: StoredPart, weight: Tensor
    ) -> Iterator[tuple[str, QuantWeight]]:
        """Parts of a stack or of a fused tensor get names of their own: quantized tensors are stored apart."""
        layer = decision.layer
        if part.expert is None:
            yield (part.name if part.rows is None else layer.name), self._quantized(weight, segment)
            return
        places = layer.alternatives[0]
        self._split.add(_experts_of(layer.name))
        if len(places) == 1:
            yield places[0].name, self._quantized(weight, segment)
        elif self._is_interleaved(_experts_of(layer.name)):
            whole = self._quantized(weight, segment)
            if whole.block[0] > 1:
                self._apart_notes.append(
                    f"{whole.scheme}: gate and up rows lie in turn and blocks hold both, so each was quantized alone"
                )
            for i, place in enumerate(places):
                alone = whole.block[0] > 1
                rows = slice(i, None, len(places))
                yield place.name, self._quantized(weight[rows].contiguous(), segment) if alone else _rows(whole, rows)
        else:
            whole, start = self._quantized(weight, segment), 0
            for place in places:
                yield place.name, whole.narrow((start, start + place.n))
                start += place.n

    def _is_interleaved(self, experts: str) -> bool:
        return not getattr(self.model.get_submodule(experts), "is_concatenated", True)

    def _quantized(self, weight: Tensor, segment: Segment) -> QuantWeight:
        assert segment.online is not None
        return self._quantizer(segment.online).quantize(weight, segment.online)

    def _quantizer(self, scheme: QuantScheme) -> Quantizer:
        if self.algorithm is None:
            return online_quantizer(self.planner.resolver, scheme)
        free = [entry.decl for entry in self.registry.quantizers if not entry.decl.calibrated]
        known = next((d for d in free if d.name == self.algorithm), None)
        if known is None:
            names = ", ".join(d.name for d in free if d.makes(scheme)) or "none"
            raise UsageError(
                f"{self.algorithm!r} is no installed algorithm that works without calibration data, which is all there is here; those that "
                f"make {scheme} are: {names}"
            )
        if not known.makes(scheme):
            raise SchemeError(f"{self.algorithm} does not make {scheme}; leave the algorithm out, or choose another scheme")
        quantizer: Quantizer = self.registry.load(known)
        return quantizer

    def _copy(self, writer: ShardWriter, used: set[str]) -> None:
        """Everything that was not quantized, as it is stored; biases of experts apart, where their weights now are."""
        for slot in self.described.slots:
            for name, value in self._apart(slot, used):
                writer.add(name, value)
        for name in self.source.tensors:
            if name not in used:
                writer.add(name, self.source.read(name))
                self.source.release(name)

    def _apart(self, slot: PlainSlot, used: set[str]) -> Iterator[tuple[str, Tensor]]:
        parent, _, _ = slot.name.rpartition(".")
        stored = next((name for name in slot.names if name in self.source.tensors), None)
        if stored is None or parent not in self._split or not slot.pieces:
            return
        value = self.source.read(stored)
        used.add(stored)
        names = slot.pieces[0]
        per_expert = len(names) // value.shape[0]
        interleaved = self._is_interleaved(parent)
        for i, name in enumerate(names):
            row, place = value[i // per_expert], i % per_expert
            piece = row[place::per_expert] if interleaved else row.chunk(per_expert)[place]
            yield name, piece.contiguous()

    def _check(self, folder: Path) -> None:
        """Plan what was written: the exact cover holds, and every layer has the scheme that it was given."""
        source = Source.open(folder)
        planner = Planner(source, Device.cpu(), "float32", Policy("reference"), None, self.registry)
        described = _described(source, planner)[1]
        again = planner.plan(described.layers, described.slots)
        for decision in self.plan.decisions:
            found = [segment.scheme for segment in again[decision.layer.name].segments]
            wanted = [segment.online for segment in decision.segments]
            if set(found) != set(wanted):
                raise CannotEncode(
                    f"{decision.layer.name} was quantized to {wanted[0]} and {planner.config.method} reads it as {found[0]}; name another format"
                )
        source.close()


def _rows(weight: QuantWeight, rows: slice) -> QuantWeight:
    """Some rows of a weight whose scales are for rows, or for all."""
    grids = {name: getattr(weight, name) for name in ("scales", "zeros", "shift")} if weight.block[0] else {}
    if weight.global_scale is not None and weight.global_scale.ndim > 1:
        grids["global_scale"] = weight.global_scale
    cut = {name: value[rows].contiguous() for name, value in grids.items() if value is not None}
    return replace(weight, codes=weight.codes[rows].contiguous(), **cut)


def _experts_of(projection: str) -> str:
    """The module that holds an expert's projection: ``mlp.experts`` of ``mlp.experts.3.down_proj``."""
    return projection.rsplit(".", 2)[0]


def _described(source: Source, planner: Planner) -> tuple[Any, Description]:
    model = skeleton(model_config(source), torch.float32)
    return model, describe(model, StoredNames(model, source.tensors, planner.model_name))


def _put(writer: ShardWriter, fmt: CheckpointFormat, name: str, weight: QuantWeight) -> LayerQuant:
    """Write one weight, after it was read back.

    :raises CannotEncode: where that is not what went in.
    """
    try:
        quant = fmt.quant_for_scheme(weight)
        tensors: Mapping[str, Tensor] = fmt.encode(weight, quant)
    except CannotEncode as reason:
        raise CannotEncode(f"{name}: {reason}") from None
    decoded = fmt.decode(tensors, quant, weight.n, weight.k)
    if isinstance(decoded, OpaqueWeight) or not decoded.equal(weight):
        raise CannotEncode(f"{name}: {quant.layout} does not give back what was stored; name another format")
    for tensor in fmt.tensors(quant):
        if tensor.name in tensors:
            writer.add(tensor.full_name(name), tensors[tensor.name])
    return quant


__all__ = ["Quantized", "quantize"]
