"""Tuning: which kernel was measured to be the fastest, by device, thread count and shape. Read without torch or hardware.

``qplug tune`` writes one JSON file for each device, ``$XDG_CACHE_HOME/qplug/tuning/<device>.json`` (``~/.cache``). Where the file exists
it decides between kernels that the user did not pin; ``QPLUG_TUNING`` names another file, or ignores it with ``0``. A file that was
measured on another device or with other versions of the kernels is not used, and the plan says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .device import Device
from .errors import UsageError
from .kernel import Problem
from .kernels.triton_tables import Asked, Tile
from .registry import Registry

VARIABLE = "QPLUG_TUNING"
SCHEMA = 1
TOKENS = 128
"""A kernel is judged by the time of this many tokens at each measured M: single tokens decoded one after another, batches of 8
of them, and one prompt where M is larger."""

NOISE = 0.03
"""Kernels whose times differ by less are equal: a measurement repeats no better, and the choice should."""

Times = Mapping[str, Mapping[int, float]]
"""Milliseconds of one call, by kernel and by M."""


@dataclass(frozen=True)
class Key:
    """What one measurement is of. ``threads``: of the CPU, 0 on a GPU."""

    op: str
    scheme: str
    n: int
    k: int
    dtype: str
    threads: int

    @classmethod
    def of(cls, problem: Problem, threads: int) -> Key | None:
        """The key of a problem; None where it has what measurements have not, such as an opaque encoding."""
        plain = Problem(problem.op, problem.scheme, problem.n, problem.k, problem.dtype)
        if problem != plain:
            return None
        return cls(problem.op, str(problem.scheme), problem.n, problem.k, problem.dtype, threads)


@dataclass(frozen=True)
class Verdict:
    """The kernel to take of some that were measured: its times, and those of the others from fast to slow.

    ``even``: another one was faster by less than :data:`NOISE`, so rank and name decided between them.
    """

    kernel: str
    times: Mapping[int, float]
    others: tuple[tuple[str, Mapping[int, float]], ...]
    even: bool = False

    def why(self) -> str:
        """One line: the times of the kernel against those of the fastest other one."""
        name, slower = self.others[0]
        pairs = [(m, self.times[m], slower[m]) for m in sorted(self.times)]
        (m, mine, theirs), *rest = pairs
        text = f"measured: {_ms(mine)} ms against {_ms(theirs)} ms of {name} at M={m}"
        text = ", ".join([text, *(f"{_ms(mine)} against {_ms(theirs)} at M={m}" for m, mine, theirs in rest)])
        return f"{text}; less than {NOISE:.0%} apart, so by rank" if self.even else text


@dataclass(frozen=True)
class Tuning:
    """The content of a tuning file.

    device, arch
        Where it was measured: ``Device.name`` and ``Device.arch``.
    plugins
        Version of each distribution whose kernels were measured.
    measured
        Times by key.
    facts
        What else is known of the run (date, torch); it decides nothing.
    digest
        Of the file; empty where it was not read from one. Ranks that choose by the same file have the same.
    threads
        In use now, 0 on a GPU: measurements with others are not looked at.
    tiles
        The fastest tile of Triton kernels by what their launch asks for.
    """

    device: str
    arch: str
    plugins: Mapping[str, str]
    measured: Mapping[Key, Times]
    facts: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
    threads: int = 0
    tiles: Mapping[Asked, Tile] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Tuning:
        """The file at ``path``.

        :raises UsageError: where it cannot be read, or is no tuning file of this version.
        """
        try:
            raw = path.read_bytes()
            return cls._parse(json.loads(raw), hashlib.sha256(raw).hexdigest()[:16])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise UsageError(
                f"{path} cannot be read as a tuning file ({' '.join(str(reason).split())}); delete it, run `qplug tune` again, or set "
                f"{VARIABLE}=0"
            ) from None

    @classmethod
    def _parse(cls, body: Any, digest: str) -> Tuning:
        if body["schema"] != SCHEMA:
            raise ValueError(f"schema {body['schema']!r}, where {SCHEMA} was needed")
        measured = {}
        for row in body["measured"]:
            words = [str(row[name]) for name in ("op", "scheme", "dtype")]
            n, k, threads = (int(row[name]) for name in ("n", "k", "threads"))
            key = Key(words[0], words[1], n, k, words[2], threads)
            measured[key] = {name: {int(m): _positive(ms) for m, ms in times.items()} for name, times in row["ms"].items()}
        plugins = {str(name): str(number) for name, number in body["plugins"].items()}
        tiles = dict(map(_tile, body.get("tiles", [])))
        return cls(str(body["device"]), str(body["arch"]), plugins, measured, dict(body.get("facts", {})), digest, 0, tiles)

    def write(self, path: Path) -> None:
        """Put the file in place, whole or not at all.

        :raises UsageError: where the folder cannot be written.
        """
        body = {
            "schema": SCHEMA,
            "device": self.device,
            "arch": self.arch,
            "plugins": dict(sorted(self.plugins.items())),
            "facts": dict(self.facts),
            "measured": [
                {
                    "op": key.op, "scheme": key.scheme, "n": key.n, "k": key.k, "dtype": key.dtype, "threads": key.threads,
                    "ms": {name: {str(m): times[m] for m in sorted(times)} for name, times in sorted(found.items())},
                }
                for key, found in sorted(self.measured.items(), key=lambda item: str(item[0]))
            ],
            "tiles": [
                {**asdict(asked), "tile": tile.arguments(), "splits": tile.splits}
                for asked, tile in sorted(self.tiles.items(), key=lambda item: str(item[0]))
            ],
        }  # fmt: skip
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".tuning-", delete=False, encoding="utf-8") as out:
                json.dump(body, out, indent=1)
                out.write("\n")
            os.replace(out.name, path)
        except OSError as error:
            raise UsageError(
                f"{path} cannot be written ({error.strerror}); name a file that can with {VARIABLE}=FILE"
            ) from None

    def merged(self, old: Tuning) -> Tuning:
        """These measurements over those of ``old``, which stay where they are of the same device and versions."""
        shared = self.plugins.keys() & old.plugins.keys()
        same = (self.device, self.arch) == (old.device, old.arch) and all(
            self.plugins[name] == old.plugins[name] for name in shared
        )
        if not same:
            return self
        return replace(
            self,
            plugins={**old.plugins, **self.plugins},
            measured={**old.measured, **self.measured},
            tiles={**old.tiles, **self.tiles},
        )

    def stale(self, device: Device, versions: Mapping[str, str], threads: int) -> str:
        """Why these measurements say nothing here, or an empty string.

        ``versions``: of the distributions that are in use.
        """
        if (self.device, self.arch) != (device.name, device.arch):
            return f"was measured on {self.arch} ({self.device}) and this is {device}"
        for name, number in sorted(self.plugins.items()):
            if versions.get(name) != number:
                return f"was measured with {name} {number} and {versions.get(name, 'none')} is in use"
        known = sorted({key.threads for key in self.measured})
        if known and threads not in known:
            return f"was measured with threads={' and '.join(map(str, known))} and threads={threads} is in use"
        return ""

    def best(self, problem: Problem, kernels: Sequence[str], optional: Sequence[str] = ()) -> Verdict | str:
        """Which of ``kernels`` to take, or one of them that was not measured, or "" where none was or there is no choice.

        ``kernels``: by rank and name, which decide between equal times. ``optional``: kernels that may have no time, because a
        measurement leaves out what takes very long.
        """
        key = Key.of(problem, self.threads)
        times = self.measured.get(key) if key is not None else None
        if times is None or len(kernels) < 2:
            return ""
        missing = [name for name in kernels if name not in times and name not in optional]
        if missing:
            return missing[0]
        found = {name: times[name] for name in kernels if name in times}
        shared = set.intersection(*(set(each) for each in found.values())) if found else set()
        if len(found) < 2 or not shared:
            return ""
        cost = {name: sum(_calls(m) * times[m] for m in shared) for name, times in found.items()}
        ordered = sorted(found, key=lambda name: cost[name])
        taken = next(name for name in found if cost[name] <= cost[ordered[0]] * (1 + NOISE))
        kept = [(name, {m: found[name][m] for m in sorted(shared)}) for name in ordered]
        return Verdict(taken, dict(kept)[taken], tuple(item for item in kept if item[0] != taken), taken != ordered[0])


def find_tuning(
    device: Device, registry: Registry, environ: Mapping[str, str] | None = None, threads: int | None = None
) -> tuple[Tuning | None, str]:
    """The measurements that decide on ``device``, and a note where a file is there and is not used.

    ``threads``: in use; those of torch where it is None.

    :raises UsageError: for a file that cannot be read.
    """
    environ = os.environ if environ is None else environ
    path = tuning_path(device, environ)
    if path is None:
        return None, ""
    if not path.is_file():
        if not environ.get(VARIABLE):
            return None, ""
        return None, f"{VARIABLE} names {path.name}, which is no file, so kernels are chosen by rank; run `qplug tune`"
    tuning = Tuning.read(path)
    threads = threads_of(device) if threads is None else threads
    versions = {row.distribution: row.version for row in registry.plugins if row.state == "ready"}
    if reason := tuning.stale(device, versions, threads):
        # The name and not the path: notes are part of what ranks compare.
        return None, f"the tuning file {path.name} {reason}, so kernels are chosen by rank; run `qplug tune` again"
    return replace(tuning, threads=threads), ""


def tuning_path(device: Device, environ: Mapping[str, str]) -> Path | None:
    """Where the measurements of a device are kept; None where the user wants none."""
    named = environ.get(VARIABLE, "")
    if named == "0":
        return None
    if named:
        return Path(named)
    cache = environ.get("XDG_CACHE_HOME") or str(Path(environ.get("HOME", os.path.expanduser("~"))) / ".cache")
    slug = re.sub(r"[^a-z0-9_]+", "-", f"{device.arch} {device.name}".lower()).strip("-")
    return Path(cache) / "qplug" / "tuning" / f"{slug}.json"


def threads_of(device: Device) -> int:
    """Threads that kernels use on ``device`` in this process, 0 on a GPU."""
    if device.vendor != "cpu":
        return 0
    import torch

    return torch.get_num_threads()


def _calls(m: int) -> int:
    return max(1, TOKENS // m)


def _tile(row: Any) -> tuple[Asked, Tile]:
    """What a row of a tuning file says of tiles."""
    numbers = {name: int(row[name]) for name in ("bits", "tokens", "n", "k")}
    asked = Asked(str(row["family"]), str(row["arch"]), kind=str(row["kind"]), **numbers)
    return asked, Tile.of({str(name): int(value) for name, value in row["tile"].items()}, int(row["splits"]))


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError(f"a time of {value!r} ms")
    return number


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
