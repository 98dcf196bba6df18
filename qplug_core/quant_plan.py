"""QuantPlan: every decision for one model, device and sharding, as a value. Made from headers; no weight is read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from .config import LayerQuant
from .layer import LayerSpec, PlainSlot, StoredPart
from .resolve import Choice
from .scheme import QuantScheme, TensorQuant


@dataclass(frozen=True)
class Segment:
    """Parts of a layer that become one weight: they have one quantization and one kernel.

    ``quant``: as stored, None where the file holds 16 bit. ``online``: the scheme that the 16-bit weight is quantized
    to at load. ``choice``: None where the segment stays at 16 bit. ``weight_only``: the policy leaves activations at 16 bit
    though the scheme quantizes them.
    """

    parts: tuple[StoredPart, ...]
    quant: LayerQuant | None
    online: QuantScheme | None
    choice: Choice | None
    weight_only: bool = False

    @property
    def scheme(self) -> QuantScheme | None:
        """What the segment computes with, None for 16 bit."""
        scheme = self.online or (self.quant.scheme if self.quant else None)
        return scheme.without_act() if scheme is not None and self.weight_only else scheme

    @property
    def n(self) -> int:
        """Rows."""
        return sum(p.n for p in self.parts)


@dataclass(frozen=True)
class Decision:
    """What is done for one layer, and why."""

    layer: LayerSpec
    segments: tuple[Segment, ...]
    notes: tuple[str, ...] = ()

    @property
    def quantized(self) -> bool:
        """True where any part is not 16 bit."""
        return any(s.scheme is not None for s in self.segments)

    def to_json(self) -> dict[str, Any]:
        """The decision as JSON data."""
        return {
            "layer": self.layer.name,
            "op": self.layer.op,
            "shape": [self.layer.n, self.layer.local_k],
            "columns": self.layer.columns,
            "segments": [
                {
                    "stored": [[p.name, p.rows, p.expert] for p in s.parts],
                    "scheme": None if s.scheme is None else str(s.scheme),
                    "layout": None if s.quant is None else s.quant.layout,
                    "online": s.online is not None,
                    "choice": None if s.choice is None else s.choice.to_json(),
                }
                for s in self.segments
            ],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class CacheDecision:
    """The KV cache of one attention layer: its scheme, and where its scales are stored by role.

    ``unit_scale``: the scheme has stored scales, the file has none, and they are 1, as its producer means.
    """

    layer: str
    scheme: TensorQuant
    scales: Mapping[str, str]
    unit_scale: bool = False


@dataclass
class QuantPlan:
    """All decisions. Two ranks that plan the same thing have the same ``digest``."""

    source: str
    method: str
    device: str
    dtype: str
    decisions: tuple[Decision, ...]
    caches: tuple[CacheDecision, ...] = ()
    plugins: Mapping[str, str] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What the reader should know: inferred facts, stale rules, ignored tensors, metadata that was not looked at."""
    kept: tuple[PlainSlot, ...] = ()
    """Parameters that stay at 16 bit where a reader would expect quantized layers: experts of an unknown layout."""

    def __getitem__(self, layer: str) -> Decision:
        """The decision for a layer by name."""
        return self._by_name[layer]

    def __contains__(self, layer: str) -> bool:
        return layer in self._by_name

    @property
    def _by_name(self) -> dict[str, Decision]:
        index: dict[str, Decision] | None = self.__dict__.get("_index")
        if index is None:
            index = self.__dict__["_index"] = {d.layer.name: d for d in self.decisions}
        return index

    @property
    def reference_only(self) -> bool:
        """True where there are quantized layers and only reference kernels run them."""
        modes = [s.choice.mode for d in self.decisions for s in d.segments if s.choice is not None]
        return bool(modes) and all(mode == "reference" for mode in modes)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data, ``"schema": 1``."""
        body = self._body()
        return {"schema": 1, "digest": self.digest, **body}

    @property
    def digest(self) -> str:
        """SHA-256 of everything that ranks have to agree on: not the path, the rows and columns that differ by rank, nor times."""
        body = self._body()
        body.pop("source")
        for layer in body["layers"]:
            layer.pop("shape")
            layer.pop("columns")
            for segment in layer["segments"]:
                segment["stored"] = [[name, expert] for name, _, expert in segment["stored"]]
                if segment["choice"] is not None:
                    segment["choice"] = {key: segment["choice"][key] for key in ("kernel", "mode")}
        return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()

    def _body(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "method": self.method,
            "device": self.device,
            "dtype": self.dtype,
            "plugins": dict(self.plugins),
            "policy": dict(self.policy),
            "layers": [d.to_json() for d in self.decisions],
            "kv_cache": [
                {"layer": c.layer, "scheme": str(QuantScheme(kv=c.scheme)), "scales": dict(c.scales)} for c in self.caches
            ],
            "notes": list(self.notes),
            **({"kept": [[slot.name, list(slot.shape), slot.note] for slot in self.kept]} if self.kept else {}),
        }

    def select(self, pattern: str) -> tuple[Decision, ...]:
        """Decisions whose layer name matches a shell pattern."""
        return tuple(d for d in self.decisions if fnmatchcase(d.layer.name, pattern))

    def groups(self, decisions: Sequence[Decision] | None = None) -> list[Group]:
        """Decisions that differ in a layer number only, as one row each."""
        rows: dict[tuple[Any, ...], Group] = {}
        for decision in self.decisions if decisions is None else decisions:
            for segment in decision.segments:
                group = Group.of(decision, segment)
                known = rows.setdefault(group.key, group)
                if known is not group:
                    known.layers.append(decision.layer.name)
        return list(rows.values())

    def report(self) -> str:
        """The plan as plain text: one line for each group of equal layers, and why other kernels were refused."""
        lines = [f"{self.source}: {self.method or '16 bit'}, {self.device}, {self.dtype} activations"]
        for group in self.groups():
            kernel = "16 bit" if group.choice is None else f"{group.choice.kernel} ({group.choice.mode})"
            scheme = group.scheme or "16 bit"
            lines.append(
                f"  {group.name}  x{len(group.layers)}  [{group.n}, {group.k}]  {scheme}  {group.stored}  ->  {kernel}"
            )
        lines += [f"  {name}  x{count}  {shape}  16 bit" for name, count, shape in self.kept_rows()]
        lines += [f"  {kernel}: {'; '.join(reasons)}" for kernel, reasons in self.taken().items()]
        for kernel, reasons in self.refused().items():
            lines.append(f"  not {kernel}: {'; '.join(reasons)}")
        if self.caches:
            lines.append(f"  KV cache: {QuantScheme(kv=self.caches[0].scheme)} in {len(self.caches)} attention layers")
        lines += [f"  note: {note}" for note in self.all_notes()]
        return "\n".join(lines)

    def kept_rows(self) -> list[tuple[str, int, str]]:
        """Name, number and shape of :attr:`kept`, those whose names differ in numbers only as one."""
        found: dict[tuple[str, str], int] = {}
        for slot in self.kept:
            row = (_pattern(slot.name), " x ".join(map(str, slot.shape)))
            found[row] = found.get(row, 0) + 1
        return [(name, count, shape) for (name, shape), count in found.items()]

    def taken(self, decisions: Sequence[Decision] | None = None) -> dict[str, list[str]]:
        """Kernels that were taken, each with what decided: a pin, a measurement (by shape), or the rank."""
        found: dict[str, dict[str, None]] = {}
        for group in self.groups(decisions):
            if group.choice is not None:
                shape = f"[{group.n}, {group.k}] " if group.choice.why.startswith("measured") else ""
                found.setdefault(group.choice.kernel, {})[shape + group.choice.why] = None
        return {kernel: list(reasons) for kernel, reasons in found.items()}

    def refused(self, decisions: Sequence[Decision] | None = None) -> dict[str, list[str]]:
        """Kernels that were not taken for some layer, each with its distinct reasons."""
        found: dict[str, list[str]] = {}
        for decision in self.decisions if decisions is None else decisions:
            for segment in decision.segments:
                for tried in segment.choice.tried if segment.choice else ():
                    reasons = found.setdefault(tried.kernel, [])
                    reasons += [text for r in tried.refusals if (text := str(r)) not in reasons]
        return found

    def all_notes(self) -> Iterator[str]:
        """Notes of the plan, then those of layers, equal ones once."""
        yield from self.notes
        grouped: dict[str, list[str]] = {}
        for decision in self.decisions:
            for note in decision.notes:
                grouped.setdefault(note, []).append(decision.layer.name)
        for slot in self.kept:
            grouped.setdefault(slot.note, []).append(slot.name)
        for note, layers in grouped.items():
            yield f"{layers[0]}{f' and {len(layers) - 1} more' if len(layers) > 1 else ''}: {note}"


@dataclass
class Group:
    """Equal decisions of layers whose names differ in numbers only."""

    name: str
    layers: list[str]
    op: str
    n: int
    k: int
    scheme: str
    stored: str
    choice: Choice | None

    @property
    def key(self) -> tuple[Any, ...]:
        """What equal rows share."""
        return (self.name, self.op, self.n, self.k, self.scheme, self.stored, self.choice)

    @classmethod
    def of(cls, decision: Decision, segment: Segment) -> Group:
        """The row of one segment."""
        layer = decision.layer
        stored = "online" if segment.online else segment.quant.layout if segment.quant else "16 bit"
        pattern = _pattern(layer.name)
        if len(decision.segments) > 1:
            pattern += " " + "+".join(p.name.rsplit(".", 1)[-1] for p in segment.parts)
        scheme = "" if segment.scheme is None else str(segment.scheme)
        return cls(pattern, [layer.name], layer.op, segment.n, layer.local_k, scheme, stored, segment.choice)


def _pattern(name: str) -> str:
    """A name with an asterisk for each number between dots."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
