"""plan(): from headers, a config and the layers of an engine to a QuantPlan. The exact cover is checked here."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from .aliases import online_schemes
from .axes import FLOATS
from .config import LayerQuant, ModuleName, QuantizationConfig
from .cover import Cover
from .decl import ConfigDecl, FormatDecl
from .device import Device
from .errors import ConfigError, CoverError, UsageError
from .format import CheckpointFormat
from .kernel import Problem
from .kv import kv_meaning, kv_scheme, plan_caches
from .layer import LayerSpec, PlainSlot, StoredPart
from .method import HubMethod, QuantMethod, online_decl, plain_name
from .quant_plan import Decision, QuantPlan, Segment
from .quantizer import online_scheme
from .registry import Entry, Registry, get_registry
from .repository import open_checkpoint
from .resolve import Policy, Resolver
from .scheme import QuantScheme, TensorQuant
from .source import Source
from .tuning import find_tuning

STORED_PLAIN = (
    "the config says quantized and the file holds 16 bit; the file is right, because nothing else is stored for it"
)
COMPUTED = dict.fromkeys(("rotary_emb.inv_freq", "embeddings.position_ids"), "a buffer that every model computes itself")


def read_config(source: Source, registry: Registry) -> tuple[QuantizationConfig, CheckpointFormat | None]:
    """The quantization of a checkpoint and the format that reads it; without rules where it is 16 bit.

    :raises ConfigError: where no installed format reads it.
    """
    declared = source.quant_config
    _check_files(source, registry)
    entries: list[Entry[FormatDecl] | Entry[ConfigDecl]] = [*registry.formats, *registry.configs]
    claimed = [e for e in entries if any(file in source.files for file in e.decl.files)]
    if declared is None and not claimed:
        endings = [(e, e.decl.suffixes) for e in registry.formats if e.decl.suffixes]
        claimed = [e for e, ends in endings if any(name.endswith(ends) for name in source.tensors)]
    if declared is not None and (method := _method(declared)):
        chosen: FormatDecl | ConfigDecl = registry.format_for_method(method).decl
    elif claimed:
        chosen = claimed[0].decl
    elif declared is not None:
        raise ConfigError(
            f"{source.quant_config_from} of {source.path} has no quant_method and no installed plugin knows the file; add the "
            "quant_method of the tool that wrote it"
        )
    else:
        return QuantizationConfig("", []), None
    loaded = registry.load(chosen)
    return loaded.parse(source), loaded if isinstance(loaded, CheckpointFormat) else None


def _method(declared: dict[str, Any]) -> str:
    """The quantization method that a config names; FastDeploy's key is ``quantization``."""
    named = declared.get("quant_method") or declared.get("quantization")
    return named.lower() if isinstance(named, str) else ""


def _check_files(source: Source, registry: Registry) -> None:
    """Refuse a config file of another tool beside a config: one of the two is a leftover, and nothing says which."""
    said = str((source.quant_config or {}).get("quant_method") or "").lower()
    for name, content in source.files.items():
        entries: list[Entry[FormatDecl] | Entry[ConfigDecl]] = [*registry.formats, *registry.configs]
        owners = [entry.decl for entry in entries if name in entry.decl.files]
        own = str(content.get("quant_method") or "").lower()
        if said and content and owners and own != said and all(said not in decl.detects for decl in owners):
            raise ConfigError(
                f"{source.quant_config_from} says quant_method {said!r} and {name} is a file of {owners[0].name}; one of them is a "
                "leftover, so remove the one that the weights were not made with"
            )


class Planner:
    """Plans one model. An object, because reading the config and the headers is shared by all layers."""

    def __init__(
        self,
        source: Source,
        device: Device | None = None,
        dtype: str = "bfloat16",
        policy: Policy | None = None,
        quantize: str | QuantScheme | None = None,
        registry: Registry | None = None,
        assumed: bool = False,
        kv_cache: str | TensorQuant | None = None,
    ) -> None:
        """``assumed``: there are no headers yet, and the config is believed. ``kv_cache``: see :func:`kv_scheme`."""
        self.source = source
        self.assumed = assumed
        self.registry = registry or get_registry()
        self.device = device or Device.current()
        self.dtype = dtype
        self.policy = policy or Policy()
        self.tuning, self._tuning_note = (
            find_tuning(self.device, self.registry) if self.policy.kernels == "auto" else (None, "")
        )
        self.resolver = Resolver(self.registry, self.device, self.policy, self.tuning)
        self.config, self.format = read_config(source, self.registry)
        online, meaning = online_schemes(quantize)
        self._meanings = [meaning, kv_meaning(kv_cache) if isinstance(kv_cache, str) else ""]
        if kv_cache is None:
            kv_cache = next((scheme.kv for scheme in online.values() if scheme.kv is not None), None)
        self.online = {op: replace(scheme, kv=None) for op, scheme in online.items() if scheme.weight is not None}
        for scheme in self.online.values():
            online_decl(self.registry, scheme)
        self.kv_wanted = kv_cache if isinstance(kv_cache, TensorQuant) else kv_scheme(kv_cache)
        self.cover = Cover(source.tensors)
        self._names = sorted(source.tensors)
        self._formats: dict[str, CheckpointFormat] = {}
        if self.online and self.format is not None:
            raise UsageError(
                f"{source.path} is {self.config.method} already and quantize={quantize} was asked for; load it as it is, or start "
                "from the 16-bit checkpoint"
            )

    def model_name(self, stored: str) -> str:
        """The Hugging Face name of a stored tensor, as its format knows it."""
        return stored if self.format is None else self.format.model_name(stored)

    def layout(self, name: str) -> CheckpointFormat:
        """The format that decodes a layout."""
        if name not in self._formats:
            self._formats[name] = self.registry.load(self.registry.layout(name).decl)
        return self._formats[name]

    def plan(self, layers: Sequence[LayerSpec], slots: Sequence[PlainSlot] = (), complete: bool = True) -> QuantPlan:
        """Decide every layer and check the exact cover.

        ``slots``: everything else that the model needs. ``complete``: the layers and slots are the whole model, so a
        tensor that nobody claims is an error.

        :raises CoverError: where tensors and slots are not the same set.
        :raises NoKernel: where the policy leaves a layer without a kernel.
        """
        decisions = [self._decide(layer) for layer in layers if layer.op != "kv_cache"]
        for slot in slots:
            self._fill(slot)
        caches, kv_notes = plan_caches(layers, self.kv_wanted, self.config, self.format, self.cover)
        try:
            self.cover.check({**COMPUTED, **self.config.ignorable}, complete)
        except CoverError as error:
            raise CoverError(f"{self.source.path}: {error}") from None
        if self.online and complete and not any(d.quantized for d in decisions):
            raise UsageError(f"quantize={self._online_name} was asked for and the model has no layer that takes it")
        plain = [d.layer.name for d in decisions if STORED_PLAIN in d.notes]
        if plain and complete and not any(d.quantized for d in decisions):
            raise ConfigError(
                f"{self.source.path}: the config says {self.config.method}, and {plain[0]} and every other layer that it means is stored "
                "at 16 bit; get the quantized files, or remove the quantization_config to load it at 16 bit"
            )
        return QuantPlan(
            source=str(self.source.path),
            method=self.config.method or (f"16 bit, quantized online to {self._online_name}" if self.online else ""),
            device=self.device.name,
            dtype=self.dtype,
            decisions=tuple(decisions),
            caches=tuple(caches),
            plugins={row.distribution: row.version for row in self.registry.plugins if row.state == "ready"},
            policy={**self.policy.to_json(), **({"tuning": self.tuning.digest} if self.tuning else {})},
            notes=(*self._notes(), *kv_notes),
            kept=tuple(slot for slot in slots if slot.note and (self.online or self.format is not None)),
        )

    def method(self, decision: Decision, device: str = "cpu") -> QuantMethod:
        """What holds the weight of one layer: ``load`` reads it from the source, ``apply`` multiplies, quantized or not."""
        own = self.config.get_quant_method(decision.layer, decision)
        return own or HubMethod(decision, self.resolver, self.layout, getattr(torch, self.dtype), device)

    @property
    def _online_name(self) -> str:
        return " and ".join(dict.fromkeys(str(scheme) for scheme in self.online.values()))

    def _notes(self) -> list[str]:
        notes = [*self.config.inferred]
        if self._tuning_note:
            notes.append(self._tuning_note)
        notes += filter(None, self._meanings)
        notes += [f"rule {rule.matcher} of the config meant no module" for rule in self.config.stale()]
        by_reason: dict[str, int] = {}
        for reason in self.cover.ignored.values():
            by_reason[reason] = by_reason.get(reason, 0) + 1
        notes += [f"{count} tensors were left unread: {reason}" for reason, count in by_reason.items()]
        if self.config.metadata:
            notes.append(f"config keys that change no number: {', '.join(sorted(self.config.metadata))}")
        return notes

    def _decide(self, layer: LayerSpec) -> Decision:
        parts = self._stored_parts(layer)
        notes: list[str] = []
        quants = [self._part(layer, part, len(parts) == 1, notes) for part in parts]
        runs: list[tuple[list[StoredPart], LayerQuant | None]] = []
        for part, quant in zip(parts, quants, strict=True):
            if runs and runs[-1][1] == quant:
                runs[-1][0].append(part)
            else:
                runs.append(([part], quant))
        if len(runs) > 1:
            notes.append("its parts have different quantizations, so they run as separate weights")
        segments = tuple(self._segment(layer, tuple(run), quant) for run, quant in runs)
        if layer.op in self.online and not layer.online:
            notes.append("it is no part of the language model, and quantization at load leaves it at 16 bit")
        if any(segment.weight_only for segment in segments):
            notes.append("activations stay 16 bit, as activations='16bit' asks, though the scheme quantizes them")
        return Decision(layer, segments, tuple(notes))

    def _stored_parts(self, layer: LayerSpec) -> tuple[StoredPart, ...]:
        for parts in () if self.assumed else layer.alternatives:
            if all(self._present(part.name) for part in parts):
                return parts
        return layer.alternatives[0]

    def _present(self, module: str) -> bool:
        """True where some tensor is stored under ``module``: ``module.weight``, or ``module_scales`` of a template."""
        for start in (f"{module}.", f"{module}_"):
            at = bisect.bisect_left(self._names, start)
            if at < len(self._names) and self._names[at].startswith(start):
                return True
        return module in self.source.tensors

    def _part(self, layer: LayerSpec, part: StoredPart, alone: bool, notes: list[str]) -> LayerQuant | None:
        """Claim the tensors of one part, and say how it is quantized."""
        own = (layer.name,) if alone else ()
        names = tuple(dict.fromkeys([part.name, *own, *layer.names]))
        quant = self.config.quant_for(ModuleName(names, layer.module_class))
        if self.assumed:
            return quant
        if layer.tied_to and not self._present(part.name):
            return None  # The owner of the weight supplies it.
        if quant is not None and layer.op == "embedding" and not self._has(part, quant):
            quant = None
        plain = plain_name(self.source, part)
        if quant is not None and self._is_float(plain) and not self._holds_more(part, quant, plain):
            notes.append(STORED_PLAIN)
            quant = None
        if quant is None:
            if not (layer.tied_to and plain not in self.source.tensors):
                self._claim_plain(plain, layer, part)
            return None
        self._claim_quantized(layer, part, quant)
        return quant

    def _has(self, part: StoredPart, quant: LayerQuant) -> bool:
        """True where every tensor that the layout requires is stored with a dtype that it takes."""
        required = [t for t in self.layout(quant.layout).tensors(quant) if not t.optional]
        found = [self.source.tensors.get(t.full_name(part.name)) for t in required]
        return all(info is not None and info.dtype in t.dtypes for info, t in zip(found, required, strict=True))

    def _holds_more(self, part: StoredPart, quant: LayerQuant, plain: str) -> bool:
        """True where more than a 16-bit weight is stored: then the layer was meant to be quantized, and has to be whole."""
        names = [t.full_name(part.name) for t in self.layout(quant.layout).tensors(quant)]
        return any(name in self.source.tensors for name in names if name != plain) or self._has(part, quant)

    def _is_float(self, name: str) -> bool:
        info = self.source.tensors.get(name)
        return info is not None and info.dtype in FLOATS

    def _claim_plain(self, name: str, layer: LayerSpec, part: StoredPart) -> None:
        info = self.source.tensors.get(name)
        if info is None:
            self.cover.miss(name, layer.name)
            return
        self.cover.claim(name, layer.name, _span(part))
        shape = (part.stored_n or part.n, layer.k)
        shape = shape[::-1] if part.transposed else shape
        stored = info.shape[1:] if part.expert is not None else info.shape
        if info.dtype not in FLOATS:
            self.cover.mistake(f"{name} is {info.dtype} where the config leaves the layer at 16 bit")
        elif stored != shape:
            self.cover.mistake(f"{name} has shape {list(info.shape)} where {layer.name} needs {list(shape)}")

    def _claim_quantized(self, layer: LayerSpec, part: StoredPart, quant: LayerQuant) -> None:
        sizes = sizes_of(layer, part)
        for tensor in self.layout(quant.layout).tensors(quant):
            name = tensor.full_name(part.name)
            info = self.source.tensors.get(name)
            if info is None:
                if not tensor.optional:
                    self.cover.miss(name, f"{layer.name} as {quant.layout} {quant.scheme}")
                continue
            self.cover.claim(name, layer.name, None if tensor.shared else _span(part), tensor.shared)
            shape = info.shape
            if part.expert is not None and shape and "E" in "".join(tensor.axes):
                sizes = {**sizes, "E": shape[0]}
            if info.dtype not in tensor.dtypes:
                self.cover.mistake(f"{name} is {info.dtype} where {quant.layout} has {' or '.join(tensor.dtypes)}")
            elif tensor.match(shape, sizes) is None:
                self.cover.mistake(
                    f"{name} has shape {list(shape)} where {quant.layout} {quant.scheme} of [{sizes['N']}, {sizes['K']}] needs "
                    f"{tensor.shapes(sizes)}"
                )

    def _segment(self, layer: LayerSpec, parts: tuple[StoredPart, ...], quant: LayerQuant | None) -> Segment:
        online = None
        wanted = self.online.get(layer.op) if layer.online else None
        if quant is None and wanted is not None:
            online = online_scheme(wanted, layer.local_k)
        scheme = online or (quant.scheme if quant else None)
        if scheme is None:
            return Segment(parts, quant, None, None)
        weight_only = self.policy.activations == "16bit" and scheme.act is not None
        segment = Segment(parts, quant, online, None, weight_only)
        return replace(segment, choice=self.resolver.choose(problem_of_segment(layer, segment, self.dtype), layer.name))

    def _fill(self, slot: PlainSlot) -> None:
        for name in slot.names:
            # Routers and norms are plain parameters, and rules that name them are not stale.
            self.config.count_plain(ModuleName((name.removesuffix(".weight"),), "Parameter"))
        for names in (*((name,) for name in slot.names), *slot.pieces):
            if all(name in self.source.tensors for name in names):
                self._claim_slot(slot, names)
                return
        if not slot.optional:
            self.cover.miss(slot.names[0] if slot.names else slot.pieces[0][0], slot.name)

    def _claim_slot(self, slot: PlainSlot, names: tuple[str, ...]) -> None:
        infos = [self.source.tensors[name] for name in names]
        for info in infos:
            self.cover.claim(info.name, slot.name)
            if info.dtype not in (*FLOATS, "F64", "I64", "I32", "BOOL"):
                self.cover.mistake(f"{info.name} is {info.dtype} where {slot.name} is a plain parameter")
        rows = sum(info.shape[0] for info in infos) if slot.shape and all(i.shape for i in infos) else 0
        shape = infos[0].shape if len(infos) == 1 else (rows, *infos[0].shape[1:])
        if len(infos) > 1 and len(shape) < len(slot.shape) and math.prod(shape) == math.prod(slot.shape):
            shape = slot.shape
        if shape != slot.shape:
            self.cover.mistake(f"{names[0]} has shape {list(shape)} where {slot.name} needs {list(slot.shape)}")


def problem_of_segment(layer: LayerSpec, segment: Segment, dtype: str) -> Problem:
    """What a quantized segment of a layer asks of a kernel, as far as headers and config say."""
    quant, scheme = segment.quant, segment.scheme
    assert scheme is not None
    facts = {name: quant.opt(name) for name in ("encoding", "shift") if quant is not None and quant.opt(name)}
    return Problem(layer.op, scheme, segment.n, layer.local_k, dtype, **facts)


def sizes_of(layer: LayerSpec, part: StoredPart) -> dict[str, int]:
    """Logical N and K of a part as it is stored, whole."""
    return {"N": part.stored_n or part.n, "K": layer.k}


def _span(part: StoredPart) -> tuple[int, int] | None:
    """What of a stored tensor a part takes, for the cover: an expert, rows, or all."""
    if part.expert is not None:
        return (part.expert, part.expert + 1)
    if part.rows is not None and (part.rows != (0, part.stored_n)):
        return part.rows
    return None


def plan(
    checkpoint: str | Path | Source | dict[str, Any],
    layers: Sequence[LayerSpec],
    slots: Sequence[PlainSlot] = (),
    *,
    device: str | Device | None = None,
    dtype: str = "bfloat16",
    tp: tuple[int, int] = (0, 1),
    parallel: dict[str, str] | None = None,
    policy: Policy | None = None,
    quantize: str | QuantScheme | None = None,
    kv_cache: str | None = None,
    complete: bool | None = None,
    registry: Registry | None = None,
) -> QuantPlan:
    """The plan of a checkpoint for an engine's layers. Reads headers only.

    checkpoint
        A path, an opened :class:`Source`, or a ``quantization_config`` as a dict, where an engine knows the config before the
        files: then tensors are taken to be as the config says, and the cover is checked when they come.
    layers, slots
        What the engine needs; whole layers, of which ``tp`` ``(rank, world)`` takes its part where ``parallel`` (pattern of
        layer names to ``"N"`` or ``"K"``) says so.
    kv_cache
        See :func:`qplug_core.kv.kv_scheme`.
    complete
        The layers and slots are the whole model; default: True where slots are given.
    """
    if isinstance(checkpoint, Source):
        source = checkpoint
    elif isinstance(checkpoint, dict):
        source = assumed_source(checkpoint)
    else:
        source = open_checkpoint(checkpoint, registry or get_registry(), headers=True)
    target = Device.from_name(device) if isinstance(device, str) else device
    assumed = isinstance(checkpoint, dict)
    planner = Planner(source, target, dtype, policy, quantize, registry, assumed, kv_cache)
    rank, world = tp
    if not 0 <= rank < world:
        raise UsageError(f"tp=({rank}, {world}) was given; a rank from 0 to {world - 1} of at least 1 is needed")
    local = [_shard(layer, rank, world, parallel or {}) for layer in layers]
    return planner.plan(local, slots, bool(slots) if complete is None else complete)


def _shard(layer: LayerSpec, rank: int, world: int, parallel: dict[str, str]) -> LayerSpec:
    axis = next((a for pattern, a in parallel.items() if fnmatchcase(layer.name, pattern)), None)
    if axis is None or world == 1:
        return layer
    if axis not in ("N", "K"):
        raise UsageError(
            f"parallel axis {axis!r} was given for {layer.name}; 'N' (column parallel) or 'K' (row parallel) is needed"
        )
    return layer.sharded("N" if axis == "N" else "K", rank, world)


def assumed_source(quant_config: dict[str, Any]) -> Source:
    """A source without files, for an engine that knows the config before the tensors."""
    return Source(Path("config"), {"quantization_config": quant_config}, quant_config, "quantization_config", {}, {}, {})
