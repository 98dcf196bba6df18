"""CapabilityMatrix: method x operation x load mode x hardware, computed from the declarations and from proof files."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .decl import FormatDecl, KernelDecl, Rank, SchemePattern
from .device import Device
from .layer import OPS, Op
from .registry import Entry, Registry
from .samples import schemes_of
from .scheme import QuantScheme

Status = Literal["native", "weight-only", "emulated", "reference", "no"]
Proof = Literal["measured", "compiled", "declared"]
ORDER: tuple[Status, ...] = ("native", "emulated", "weight-only", "reference", "no")


@dataclass(frozen=True)
class Cell:
    """What one method can do for one operation on one device.

    status
        native: does what the scheme says; weight-only: leaves activations at 16 bit; emulated: quantizes them and
        multiplies wider; reference: runs, slowly; no: the method stores no such weights.
    kernel, proof
        The best kernel, and how well it is proven there: measured (ran on that hardware), compiled (its machine code
        was built for it), declared (nobody tried).
    reason
        What falls short of the status, and why no better kernel is taken.
    fast, total
        Of the scheme variants that stand for the method, how many a kernel other than the reference one takes.
    """

    status: Status
    kernel: str = ""
    proof: Proof = "declared"
    reason: str = ""
    fast: int = 0
    total: int = 0


@dataclass(frozen=True)
class Method:
    """One row: a checkpoint format with its schemes, and a cell for each operation and device."""

    name: str
    plugin: str
    summary: str
    schemes: tuple[str, ...]
    load: dict[str, bool]
    ops: tuple[Op, ...]
    cells: dict[tuple[Op, str], Cell]

    def cell(self, device: str, op: Op | None = None) -> Cell:
        """The cell of a device; of the method's first operation where none is named."""
        return self.cells[op or self.ops[0], device]

    def to_json(self, devices: Sequence[str]) -> dict[str, Any]:
        """The row of ``list-methods --json``."""
        return {
            "name": self.name,
            "plugin": self.plugin,
            "schemes": list(self.schemes),
            "load": self.load,
            "ops": list(self.ops),
            "devices": {d: asdict(self.cell(d)) for d in devices},
            "cells": {op: {d: asdict(self.cells[op, d]) for d in devices} for op in OPS},
        }


@dataclass(frozen=True)
class CapabilityMatrix:
    """All methods on some devices, by the name under which each device was asked for."""

    methods: tuple[Method, ...]
    devices: tuple[str, ...]

    @classmethod
    def of(cls, registry: Registry, devices: Iterable[tuple[str, Device]]) -> CapabilityMatrix:
        """The matrix of everything that ``registry`` holds."""
        columns = list(devices)
        rows = tuple(_method(entry, registry, columns) for entry in registry.formats)
        return cls(rows, tuple(name for name, _ in columns))


def _method(entry: Entry[FormatDecl], registry: Registry, columns: Sequence[tuple[str, Device]]) -> Method:
    decl = entry.decl
    schemes = schemes_of(decl.schemes)
    quantizers = [e.decl for e in registry.quantizers]
    online = any(q.makes(s) for q in quantizers if not q.calibrated for s in schemes)
    offline = decl.writes and any(q.makes(s) for q in quantizers for s in schemes)
    cells = {}
    fits = _fits(decl, schemes, registry)
    for op in OPS:
        for name, device in columns:
            cells[op, name] = _cell(decl, op, fits, device, name, registry)
    names = tuple(dict.fromkeys(str(s).split("_")[0] for s in schemes))
    load = {"prequantized": True, "online": online, "offline": offline}
    return Method(decl.name, entry.plugin.name, decl.summary, names, load, decl.ops, cells)


Fits = list[tuple[KernelDecl, list[QuantScheme]]]


def _fits(decl: FormatDecl, schemes: Sequence[QuantScheme], registry: Registry) -> Fits:
    """Every kernel that takes some of ``schemes``, best first, with those: the same on all devices, so found once."""
    slow_only = {s for s in schemes if any(SchemePattern(text).matches(s) for text in decl.reference)}
    found = []
    for kernel in sorted((e.decl for e in registry.kernels), key=lambda d: (-d.rank, d.name)):
        reference = kernel.rank == Rank.REFERENCE
        taken = [s for s in schemes if not kernel.pattern_for(s) and (reference or s not in slow_only)]
        if taken:
            found.append((kernel, taken))
    return found


def _cell(decl: FormatDecl, op: Op, fits: Fits, device: Device, name: str, registry: Registry) -> Cell:
    if op not in decl.ops:
        return Cell("no", reason=f"{decl.name} stores no {op} weights")
    best: dict[QuantScheme, KernelDecl] = {}
    refused: dict[str, None] = {}
    for kernel, schemes in fits:
        if op not in kernel.ops:
            continue
        if not device.matches_any(kernel.devices):
            refused[f"{kernel.name} needs {' or '.join(kernel.devices)}"] = None
            continue
        for scheme in schemes:
            best.setdefault(scheme, kernel)
    if not best:
        return Cell("no", reason="; ".join(refused) or f"no kernel is declared for {op}")
    by_status = sorted(best.values(), key=lambda k: (ORDER.index(k.mode), -k.rank, k.name))
    taken = by_status[0]
    slow = [s for s, kernel in best.items() if kernel.rank == Rank.REFERENCE]
    reasons = list(refused) if taken.rank == Rank.REFERENCE else []
    if slow and taken.rank != Rank.REFERENCE:
        shown = ", ".join(dict.fromkeys(str(s) for s in slow[:3]))
        reasons.append(
            f"{len(slow)} of {len(best)} scheme variants run on the reference kernel: {shown}{'...' if len(slow) > 3 else ''}"
        )
    proof = proof_of(taken, name, device, registry)
    return Cell(taken.mode, taken.name, proof, "; ".join(reasons), len(best) - len(slow), len(best))


def scheme_cell(registry: Registry, scheme: QuantScheme, op: Op, device: Device, name: str) -> Cell:
    """What the best kernel of any plugin does with one scheme on ``device``, which was asked for as ``name``."""
    taken: KernelDecl | None = None
    refused = []
    for kernel in sorted((e.decl for e in registry.kernels if op in e.decl.ops), key=lambda d: (-d.rank, d.name)):
        if kernel.pattern_for(scheme):
            continue
        if not device.matches_any(kernel.devices):
            refused.append(f"{kernel.name} needs {' or '.join(kernel.devices)}")
        elif taken is None:
            taken = kernel
    if taken is None:
        return Cell("no", reason="; ".join(refused) or f"no kernel is declared for {op}")
    reference = taken.rank == Rank.REFERENCE
    reason = ("; ".join(refused) or "no installed plugin has a kernel for this scheme") if reference else ""
    return Cell(taken.mode, taken.name, proof_of(taken, name, device, registry), reason, int(not reference), 1)


def proof_of(kernel: KernelDecl, column: str, device: Device, registry: Registry) -> Proof:
    """How well a kernel is proven on a device, from the ``proof.json`` of its plugin's package and nothing else."""
    entry = next(e for e in registry.kernels if e.decl == kernel)
    proofs = _proofs(entry.plugin.module.partition(".")[0] if entry.plugin.module else "qplug_core")
    found = proofs.get(kernel.name, {})
    for key in (column, device.arch):
        status = found.get(key, {}).get("status")
        if status in ("measured", "compiled"):
            return status  # type: ignore[no-any-return]
    return "declared"


@functools.cache
def _proofs(package: str) -> dict[str, dict[str, dict[str, Any]]]:
    """``kernels`` of a package's ``proof.json``; the package is found, not imported."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "proof.json"
        if path.exists():
            found: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))["kernels"]
            return found
    return {}
