"""Results: the rows and facts of one benchmark run, as data."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

import torch

from ..device import Device
from ..registry import Registry
from ..resolve import Resolver
from ..tuning import threads_of
from ..weight import QuantWeight
from .contender import Contender
from .limits import Limits
from .timing import Sample

Result = tuple[Contender, Sample, float]
"""A contender, its times, and its error."""


@dataclass(frozen=True)
class Row:
    """One contender on one problem.

    ms, ms_median
        10th percentile and median of single calls.
    gb_per_s, tflop_per_s
        Bytes of the packed weight, and ``2 M N K`` operations, by ``ms``.
    of_limit
        Time that the machine needs at best, by ``ms``: to read the scheme's bits (16 for bf16) or to multiply in bf16. Above 1 for
        units that are faster than bf16, or a cache that holds the weight.
    of_peer, of_bf16
        Time of the fastest peer, and of bf16, by ``ms``; None where there is none.
    error
        Relative Frobenius distance to the float64 product with the dequantized weight: rounding, and quantized activations.
    """

    scheme: str
    n: int
    k: int
    m: int
    name: str
    kind: str
    mode: str
    ms: float
    ms_median: float
    gb_per_s: float
    tflop_per_s: float
    of_limit: float
    of_peer: float | None
    of_bf16: float | None
    error: float
    nbytes: int
    calls: int
    note: str = ""


@dataclass
class Report:
    """Everything of one run. ``missing``: how to install each absent peer. ``notes``: what was left out, and why."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    limits: list[dict[str, Any]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as data, ``"schema": 1``."""
        return {"schema": 1, "kind": "bench", **asdict(self)}

    @property
    def reference_only(self) -> bool:
        """True where no kernel but reference ones ran."""
        return all(row.mode == "reference" for row in self.rows if row.kind == "qplug")


def rows_of(results: Sequence[Result], weight: QuantWeight, m: int, limits: Limits, resolver: Resolver) -> list[Row]:
    """What the report says of one problem."""
    peer = min((sample.p10 for c, sample, _ in results if c.kind == "peer"), default=None)
    plain = next((sample.p10 for c, sample, _ in results if c.kind == "bf16"), None)
    modes = {entry.decl.name: entry.decl.mode for entry in resolver.registry.kernels}
    return [_row(c, sample, weight, m, limits, error, peer, plain, modes) for c, sample, error in results]


def _row(
    c: Contender,
    sample: Sample,
    weight: QuantWeight,
    m: int,
    limits: Limits,
    error: float,
    peer: float | None,
    plain: float | None,
    modes: dict[str, Any],
) -> Row:
    n, k = weight.n, weight.k
    operations = 2 * m * n * k
    stored = 2 * n * k if c.kind == "bf16" else scheme_bytes(weight)
    floor = limits.floor(stored + 2 * m * (n + k), operations)
    best = sample.p10
    return Row(
        str(weight.scheme), n, k, m, c.name, c.kind, modes.get(c.name, ""),
        best * 1e3, sample.median * 1e3, c.nbytes / best / 1e9, operations / best / 1e12, floor / best,
        None if peer is None or c.kind == "peer" else peer / best, None if plain is None else plain / best,
        error, c.nbytes, len(sample.times), c.note,
    )  # fmt: skip


def scheme_bytes(weight: QuantWeight) -> int:
    """Bytes that the scheme itself needs: codes at their width, scales and zero points as they are stored."""
    assert weight.scheme.weight is not None
    bits = weight.scheme.weight.bits
    points = 0 if weight.zeros is None else weight.zeros.numel() * bits // 8
    return weight.n * weight.k * bits // 8 + weight.scales.nbytes + points


def machine_facts(device: Device, registry: Registry) -> dict[str, Any]:
    """What a reader needs to judge the figures, and to repeat them."""
    return {
        "device": device.name,
        "arch": device.arch,
        "cores": os.cpu_count(),
        "threads": threads_of(device),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "plugins": {row.distribution: row.version for row in registry.plugins if row.state == "ready"},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["qplug", *sys.argv[1:]]),
    }
