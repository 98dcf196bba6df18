"""Writes down what an engine was seen to serve: ``qplug list-methods --engines`` says what stands there and nothing else.

Only with QPLUG_PROVE=1, and only for what the calling test has asserted. One file in the package, qplug_core/bridges/proof.json: engine ->
version, date, machine, what was not run; and method -> feature -> test, error, contrast, or the sentence of a refusal.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[2] / "qplug_core" / "bridges" / "proof.json"
ENGINES = ("reference", "transformers", "vllm", "sglang")


def record(engine: str, version: str, method: str, feature: str, test: str, error: float, contrast: float) -> None:
    """``method`` works in ``engine``: ``error`` is the distance to what is right, ``contrast`` to what is wrong.

    method: the name of a checkpoint format, as list-methods has it. feature: ``checkpoint``, ``experts``, ``2 ranks``, ``reload``...
    test: its node id.
    """
    _write(
        engine,
        version,
        method,
        feature,
        {"test": test, "error": float(f"{error:.1e}"), "contrast": float(f"{contrast:.1e}")},
    )


def record_refusal(engine: str, version: str, method: str, feature: str, test: str, sentence: str) -> None:
    """``engine`` does not serve ``method``, or this feature of it, and says why."""
    _write(engine, version, method, feature, {"test": test, "refused": sentence})


def record_limits(engine: str, version: str, machine: str, not_run: Sequence[str]) -> None:
    """On what the tests of an engine run, and what they do not run."""
    _write(engine, version, "", "", {"machine": machine, "not_run": list(not_run)})


def method_of(folder: Path) -> str:
    """The name of the format that reads a checkpoint."""
    from qplug_core.planner import read_config
    from qplug_core.registry import get_registry
    from qplug_core.repository import open_headers

    config, fmt = read_config(open_headers(folder), get_registry())
    return config.method if fmt is None else fmt.name


def _write(engine: str, version: str, method: str, feature: str, entry: dict[str, Any]) -> None:
    if os.environ.get("QPLUG_PROVE") != "1":
        return
    assert engine in ENGINES, f"{engine} is none of {ENGINES}"
    # Tests of two engines may write at the same time.
    with (Path(tempfile.gettempdir()) / "qplug-proof.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        body = json.loads(TARGET.read_text()) if TARGET.exists() else {"schema": 1, "engines": {}}
        of = body["engines"].setdefault(engine, {})
        if of.get("version") != version:
            of.clear()  # What another version did is no proof of this one.
        of |= {"version": version, "date": datetime.date.today().isoformat()}
        if method:
            of.setdefault("methods", {}).setdefault(method, {})[feature] = entry
        else:
            of |= entry
        fresh = TARGET.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
        fresh.replace(TARGET)
