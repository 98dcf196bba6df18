"""``python -m qplug_core.testing.compile_matrix``: compile every Triton kernel for every GPU that it is declared for, without one.

Each cell must compile, multiply on the matrix unit that it is meant for, stay in the shared memory of the target, and spill no
registers beyond a stated bound. Where all cells of a kernel and a target hold, ``proof.json`` of the plugin's package says
``compiled``, and where one does not, nothing is said. ``--subset ci`` compiles what stands for the rest and writes nothing. Results are kept
under the digest of the sources; a compiler that hangs or dies is a failed cell. Exits with 1 where a cell fails.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .. import kernels as parts
from ..decl import KernelDecl
from ..device import Device
from ..errors import UsageError
from ..kernels import triton_kv_cache
from ..kernels.triton_launch import CompileCase
from ..registry import Entry, Registry, get_registry
from .compile_cells import REPORTED, TARGETS, Cell, compile_cell, problem_of

KV_STORE = "core.triton_kv_store"
"""The one kernel that is no product: it writes a KV cache, whose schemes no declaration can name."""
COMMAND = "python -m qplug_core.testing.compile_matrix"


@dataclass
class Claim:
    """One kernel on one target: its cells decide whether it may be called compiled. ``entry``: None for one that no plugin declares."""

    entry: Entry[KernelDecl] | None
    target: str
    cases: list[CompileCase]
    cells: list[Cell] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The declared name, or that of the operation."""
        return self.entry.decl.name if self.entry else KV_STORE

    @property
    def holds(self) -> bool:
        """Whether every case was compiled and nothing is wrong with any."""
        return len(self.cells) == len(self.cases) and not any(cell.problem for cell in self.cells)


def claims(registry: Registry, targets: Iterable[str], subset: str, kernels: tuple[str, ...] = ()) -> list[Claim]:
    """Every Triton kernel with every target that it is declared for, and what there is to compile."""
    found = []
    for entry in registry.kernels:
        if kernels and entry.decl.name not in kernels:
            continue
        if not any(text.startswith("triton") for text in entry.decl.requires):
            continue
        kernel = registry.load(entry.decl)
        for target in targets:
            if Device.from_name(target).matches_any(entry.decl.devices):
                found.append(Claim(entry, target, kernel.compile_cases(target, subset)))
    if not kernels or KV_STORE in kernels:
        found += [Claim(None, target, triton_kv_cache.compile_cases(subset)) for target in targets]
    return found


def case_digest(case: CompileCase) -> str:
    """Hash of everything that decides what a cell says, but the target and Triton: the kernel, what it calls, and its constants."""
    digest = hashlib.sha256(repr(case).encode())
    spec = importlib.util.find_spec(case.function.partition(":")[0])
    assert spec is not None
    assert spec.origin is not None
    for text in _sources(Path(spec.origin)):
        digest.update(text)
    return digest.hexdigest()[:16]


@functools.cache
def _sources(path: Path) -> tuple[bytes, ...]:
    """The text of a kernel's file, and of those that it takes functions from."""
    text = path.read_bytes()
    called = re.findall(r"^from (\.|qplug_core\.kernels\.)(\w+) import", text.decode(), re.MULTILINE)
    folders = {".": path.parent, "qplug_core.kernels.": Path(parts.__file__).parent}
    return (text, *(t for place, name in called for t in _sources(folders[place] / f"{name}.py")))


def cases_digest(cases: Iterable[CompileCase]) -> str:
    """Hash of all cases of one kernel and target: what a proof was made from."""
    return hashlib.sha256(" ".join(case_digest(case) for case in cases).encode()).hexdigest()[:16]


def _cache_folder() -> Path:
    """Where cells are kept, for one version of Triton."""
    home = os.environ.get("XDG_CACHE_HOME")
    base = Path(home) if home else Path.home() / ".cache"
    folder = base / "qplug" / "compile_matrix" / importlib.metadata.version("triton")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(found: list[Claim], jobs: int, timeout: float) -> None:
    """Fill in the cells of all claims, one process for each target, ``jobs`` at a time; equal cases of kernels are compiled once."""
    by_target: dict[str, dict[str, CompileCase]] = {}
    for claim in found:
        by_target.setdefault(claim.target, {}).update({case.name: case for case in claim.cases})
    folder = _cache_folder()
    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(lambda item: _target(item[0], item[1], folder, timeout), by_target.items())
        cells = dict(zip(by_target, done, strict=True))
    for claim in found:
        claim.cells = [cells[claim.target][case.name] for case in claim.cases]


def _target(target: str, cases: Mapping[str, CompileCase], folder: Path, timeout: float) -> dict[str, Cell]:
    """The cells of one target, from the cache or from a process that is started anew where it hangs or dies."""
    cells: dict[str, Cell] = {}
    worker: _Worker | None = None
    for name, case in cases.items():
        path = folder / f"{target}-{case_digest(case)}.json"
        if path.exists():
            cells[name] = Cell(**json.loads(path.read_text(encoding="utf-8")))
            cells[name].problem = problem_of(cells[name], case)
            continue
        worker = worker or _Worker()
        cell = worker.compile(case, target, timeout)
        if cell is None:
            cell = Cell(name, target, failed=f"the compiler took more than {timeout:.0f} s, or died")
            worker.stop()
            worker = None
        path.write_text(json.dumps(cell.to_json()), encoding="utf-8")
        cell.problem = problem_of(cell, case)
        cells[name] = cell
        print(f"{target:8} {cell.seconds:6.1f} s  {name}  {cell.problem or 'ok'}", file=sys.stderr, flush=True)
    if worker is not None:
        worker.stop()
    return cells


class _Worker:
    """A process that compiles one case after another."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def compile(self, case: CompileCase, target: str, timeout: float) -> Cell | None:
        """The cell, None where the process takes too long or ends."""
        self.pipe.send((case, target))
        try:
            if not self.pipe.poll(timeout):
                return None
            cell: Cell = self.pipe.recv()
        except EOFError:
            return None
        return cell

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection) -> None:
    # Triton 3.9 warns that its default changes; kernels here are written for fused multiply-add.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    while True:
        case, target = pipe.recv()
        pipe.send(compile_cell(case, target))


def write_proofs(found: list[Claim]) -> list[Path]:
    """Say in each plugin's ``proof.json`` which kernels are compiled for which targets; what was measured stays."""
    paths = []
    for package, of_package in _by_package(found):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        path = Path(spec.origin).parent / "proof.json"
        body: dict[str, Any] = (
            json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"schema": 1, "kernels": {}}
        )
        for claim in of_package:
            assert claim.entry is not None
            _record(claim, body["kernels"].setdefault(claim.name, {}))
        path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def _record(claim: Claim, proofs: dict[str, Any]) -> None:
    """Write one claim into the proofs of its kernel, by target.

    Another version of Triton over the same sources is a line of the proof that is there, ``also``: it replaces nothing and takes nothing away.
    """
    old = proofs.get(claim.target, {})
    if old.get("status") == "measured":
        return
    version = importlib.metadata.version("triton")
    if _same(old, claim) and old["versions"]["triton"] != version:
        also = set(old.pop("also", [])) - {version} | ({version} if claim.holds else set())
        if also:
            old["also"] = sorted(also)
        return
    proofs.pop(claim.target, None)
    if claim.holds:
        proofs[claim.target] = {**_proof(claim), **({"also": old["also"]} if _same(old, claim) and "also" in old else {})}


def _same(old: dict[str, Any], claim: Claim) -> bool:
    """Whether a proof is of the sources of this claim."""
    return bool(old.get("sources") == cases_digest(claim.cases))


def _by_package(found: list[Claim]) -> Iterator[tuple[str, list[Claim]]]:
    grouped: dict[str, list[Claim]] = {}
    for claim in found:
        if claim.entry is not None:
            grouped.setdefault(claim.entry.plugin.module.partition(".")[0] or "qplug_core", []).append(claim)
    yield from grouped.items()


def _proof(claim: Claim) -> dict[str, Any]:
    assert claim.entry is not None
    names = (claim.entry.plugin.distribution, "qplug-core", "triton")
    return {
        "status": "compiled",
        "cells": len(claim.cells),
        "matrix": sorted({name for cell in claim.cells for name in cell.matrix}),
        "most": {name: max(getattr(c, name) for c in claim.cells) for name in ("registers", "spill", "shared")},
        "sources": cases_digest(claim.cases),
        "date": datetime.date.today().isoformat(),
        "by": COMMAND,
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def main(arguments: list[str] | None = None) -> int:
    """Compile, print a table, write the proofs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, help="all where left out; with --subset ci those of list-methods"
    )
    parser.add_argument("--kernels", nargs="+", default=(), help="names of declared kernels; all where left out")
    parser.add_argument("--subset", choices=("ci", "all"), default="all")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4))
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one cell")
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("TRITON_INTERPRET=1 is set, which compiles nothing; unset it")
    start = time.perf_counter()
    targets = given.targets or (REPORTED if given.subset == "ci" else TARGETS)
    found = claims(get_registry(), targets, given.subset, tuple(given.kernels))
    run(found, given.jobs, given.timeout)
    for claim in found:
        failed = [cell for cell in claim.cells if cell.problem]
        state = "compiled" if claim.holds else f"{len(failed)} of {len(claim.cells)} fail"
        print(f"{claim.name:28} {claim.target:8} {len(claim.cells):4} cells  {state}")
        for cell in failed:
            print(f"    {cell.case}: {cell.problem}")
    if given.subset == "all":
        print(*write_proofs(found), sep="\n")
    print(f"{sum(len(c.cells) for c in found)} cells in {time.perf_counter() - start:.0f} s")
    return int(not all(claim.holds for claim in found))


if __name__ == "__main__":
    sys.exit(main())
