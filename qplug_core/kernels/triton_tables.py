"""Tiles of Triton kernels by architecture and number of tokens, from ``triton_tiles.json``, and the number of splits of K.

Rows are tried from the first to the last. ``arch``: shell patterns; ``bits``, ``n``, ``k``: only those, where they stand; ``tokens``: up to
that many; ``tile``: tile sizes, warps and stages; ``splits``: a measured number, otherwise it is computed. Nothing is tuned while a
model runs, and the compile matrix compiles every row.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("triton_tiles.json")
MOST_SPLITS = 16
WAVES = 2
"""Programs for each processor that splitting K aims at: enough to hide the latency of memory."""


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


def tile_for(family: str, arch: str, bits: int, tokens: int, n: int, k: int) -> Tile | None:
    """The tile of the first row that fits, or None where there are more tokens than any row is for."""
    for row in _rows(family, arch, bits):
        if tokens <= row["tokens"] and row.get("n", n) == n and row.get("k", k) == k:
            return _tile(row)
    return None


def tiles(family: str, arch: str, bits: int) -> list[Tile]:
    """Every tile that :func:`tile_for` may return for an architecture: what the compile matrix has to compile."""
    return list(dict.fromkeys(_tile(row) for row in _rows(family, arch, bits)))


def splits_of(units: int, tiles_of_output: int, processors: int) -> int:
    """Parts that K is cut into: a power of two that fills the processors :data:`WAVES` times, of at least two units each."""
    splits = 1
    while splits < MOST_SPLITS and tiles_of_output * splits * 2 <= processors * WAVES and units >= splits * 4:
        splits *= 2
    return splits


def _rows(family: str, arch: str, bits: int) -> Iterator[Mapping[str, Any]]:
    """Rows in order, up to the first that takes any shape with as many tokens as any other."""
    fits = [
        row
        for row in _tables()[family]
        if any(fnmatchcase(arch, pattern) for pattern in row["arch"]) and bits in row.get("bits", (bits,))
    ]
    most = max((row["tokens"] for row in fits), default=0)
    for row in fits:
        yield row
        if row["tokens"] == most and "n" not in row and "k" not in row:
            return


def _tile(row: Mapping[str, Any]) -> Tile:
    sizes = tuple((name, value) for name, value in row["tile"].items() if name.isupper())
    options = tuple((name, value) for name, value in row["tile"].items() if not name.isupper())
    return Tile(sizes, options, row.get("splits", 0))


@functools.cache
def _tables() -> dict[str, list[dict[str, Any]]]:
    tables: dict[str, list[dict[str, Any]]] = json.loads(PATH.read_text(encoding="utf-8"))
    return tables
