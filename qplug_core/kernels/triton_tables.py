"""Tiles of Triton kernels by architecture and number of tokens, from ``triton_tiles.json``, and the number of splits of K.

A tile that ``qplug tune`` measured here for the shape comes first. Otherwise rows are tried from the first to the last. ``arch``: shell patterns;
``bits``, ``kinds``, ``n``, ``k``: only those, where they stand; ``tokens``: up to that many; ``tile``: tile sizes, warps and stages; ``splits``: a
measured number, otherwise it is computed. A row without n and k gives way to the one before it where its tile does not fit into the
shared memory of the device, or leaves half of the processors idle. Nothing is tuned while a model runs, and the compile matrix
compiles every row.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("triton_tiles.json")
MOST_SPLITS = 16
WAVES = 2
"""Programs for each processor that splitting K aims at: enough to hide the latency of memory."""
DEPTH = 128
"""Columns of one step of the families whose tiles do not say it."""


@dataclass(frozen=True)
class Tile:
    """Constants of one compiled kernel: ``sizes`` (BN, BM, ...) and launch options (num_warps, num_stages, ...)."""

    sizes: tuple[tuple[str, int], ...]
    options: tuple[tuple[str, int], ...]
    splits: int = 0

    def __getitem__(self, name: str) -> int:
        return dict(self.sizes)[name]

    def arguments(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return dict(self.sizes + self.options)

    @classmethod
    def of(cls, tile: Mapping[str, int], splits: int = 0) -> Tile:
        """From the names and values of a table: sizes are upper case."""
        sizes = tuple((name, value) for name, value in tile.items() if name.isupper())
        return cls(sizes, tuple((name, value) for name, value in tile.items() if not name.isupper()), splits)


@dataclass(frozen=True)
class Asked:
    """What a launch asks of the tables: a kernel family, the architecture, and the shape. ``kind``: of the weights, where it matters."""

    family: str
    arch: str
    bits: int
    tokens: int
    n: int
    k: int
    kind: str = ""


_tuned: dict[str, dict[Asked, Tile]] = {}
_asked: list[Asked] | None = None
_forced: Tile | None = None


def tile_for(
    family: str, arch: str, bits: int, tokens: int, n: int, k: int, *, kind: str = "", processors: int = 0, shared: int = 0
) -> Tile | None:
    """The tile for a shape, or None where there are more tokens than any row is for.

    ``processors``, ``shared``: of the device, bytes for one block; 0 where unknown.
    """
    if _asked is not None:
        _asked.append(Asked(family, arch, bits, tokens, n, k, kind))
        if _forced is not None:
            return _forced
    if _tuned.get(arch):
        shape = Asked(family, arch, bits, 0, n, k, kind)
        # A measurement of many tokens says nothing of a few.
        same = [a for a in _tuned[arch] if a.tokens >= tokens > a.tokens // 2 and replace(a, tokens=0) == shape]
        if same:
            return _tuned[arch][min(same, key=lambda a: a.tokens)]
    rows = _rows(family, arch, bits, kind)
    place = next(
        (i for i, r in enumerate(rows) if tokens <= r["tokens"] and r.get("n", n) == n and r.get("k", k) == k), len(rows)
    )
    if place == len(rows):
        return None
    if "n" in rows[place] or "k" in rows[place]:
        return _tile(rows[place])
    while place and (
        (shared and shared_of(family, bits, _tile(rows[place])) > shared)
        or (processors and idle(_tile(rows[place]), tokens, n, k, processors))
    ):
        place -= 1
    return _tile(rows[place])


def tiles(family: str, arch: str, bits: int, kind: str = "") -> list[Tile]:
    """Every tile that :func:`tile_for` may return for an architecture: what the compile matrix has to compile."""
    return list(dict.fromkeys(_tile(row) for row in _rows(family, arch, bits, kind)))


def splits_of(units: int, tiles_of_output: int, processors: int) -> int:
    """Parts that K is cut into: a power of two that fills the processors :data:`WAVES` times, of at least two units each."""
    splits = 1
    while splits < MOST_SPLITS and tiles_of_output * splits * 2 <= processors * WAVES and units >= splits * 4:
        splits *= 2
    return splits


def idle(tile: Tile, tokens: int, n: int, k: int, processors: int) -> bool:
    """Whether a tile leaves half of the processors without a program, also where K is split."""
    programs = -(-n // tile["BN"]) * -(-tokens // tile["BM"])
    return programs * splits_of(k // DEPTH, programs, processors) * 2 < processors


def shared_of(family: str, bits: int, tile: Tile) -> int:
    """An estimate of the bytes of shared memory that a tile takes: the operands of every stage, as they are in memory."""
    sizes, options = dict(tile.sizes), dict(tile.options)
    wide = 2 if family in ("weight_only", "wint2") else 1
    step = sizes.get("BK", DEPTH) * (sizes["BN"] * bits // 8 + sizes["BM"] * wide)
    return step * options.get("num_stages", 1)


def use(tuned: Iterable[tuple[Asked, Tile]]) -> None:
    """Take these measured tiles from now on. One that no row of the tables has was never compiled here, and is passed over."""
    for asked, tile in tuned:
        if replace(tile, splits=0) in [
            replace(t, splits=0) for t in tiles(asked.family, asked.arch, asked.bits, asked.kind)
        ]:
            _tuned.setdefault(asked.arch, {})[asked] = tile


@contextmanager
def watched(forced: Tile | None = None) -> Iterator[list[Asked]]:
    """What launches inside ask for; with ``forced`` that tile is the answer to all. For measuring, in one thread."""
    global _asked, _forced
    before, _asked, _forced = (_asked, _forced), [], forced
    try:
        yield _asked
    finally:
        _asked, _forced = before


@functools.cache
def _rows(family: str, arch: str, bits: int, kind: str) -> tuple[Mapping[str, Any], ...]:
    """Rows in order, up to the first that takes any shape with as many tokens as any other."""
    fits = [
        row
        for row in _tables()[family]
        if any(fnmatchcase(arch, pattern) for pattern in row["arch"])
        and bits in row.get("bits", (bits,))
        and kind in row.get("kinds", (kind,))
    ]
    most = max((row["tokens"] for row in fits), default=0)
    last = next((i for i, r in enumerate(fits) if r["tokens"] == most and "n" not in r and "k" not in r), len(fits))
    return tuple(fits[: last + 1])


def _tile(row: Mapping[str, Any]) -> Tile:
    return Tile.of(row["tile"], row.get("splits", 0))


@functools.cache
def _tables() -> dict[str, list[dict[str, Any]]]:
    tables: dict[str, list[dict[str, Any]]] = json.loads(PATH.read_text(encoding="utf-8"))
    return tables
