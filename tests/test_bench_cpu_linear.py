"""The table of CPU linear kernels: one line for each scheme, shape and M, with peers that keep 16-bit activations apart from those that do not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from qplug_core.bench.peer import ROUNDS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def cpu_linear(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "cpu_linear", raising=False)
    import cpu_linear

    return cpu_linear


def row(scheme: str, name: str, kind: str, ms: float, note: str = "") -> dict[str, Any]:
    return {
        "scheme": scheme, "n": 64, "k": 32, "m": 8, "name": name, "kind": kind, "ms": ms, "gb_per_s": 1.0, "note": note,
        "of_bf16": 2.0 if kind == "qplug" else None,
    }  # fmt: skip


def part(date: str, *rows: dict[str, Any]) -> dict[str, Any]:
    machine = {"date": f"2026-01-{date}T00:00:00", "device": "a CPU", "arch": "x", "threads": 2, "torch": "2"}
    return {"machine": machine, "read_gb_per_s": {"8": 2.0}, "matmul_tflop_per_s": 1.0, "rows": list(rows)}


def test_the_newest_part_wins_and_keeps_the_peers_of_an_older_one(cpu_linear: Any) -> None:
    ours = "W4A16_g128"
    older = part("01", row(ours, "a", "qplug", 5), row(ours, "p", "peer", 5))
    peers = part(
        "02", row(ours, "a", "qplug", 2), row(ours, "kept", "peer", 5), row(ours, "rounded", "peer", 3, f"x; {ROUNDS}")
    )
    body = {"parts": [part("03", row(ours, "a", "qplug", 1)), older, peers]}
    [(found, peer, ratios, goals)] = cpu_linear.judged(body)
    assert found["ms"] == 1
    assert peer["name"] == "rounded"
    assert ratios["of_peer"] == 1.5
    assert goals == [(("of_peer", 2.0), 1.5)]
    line = next(text for text in cpu_linear.table(body).splitlines() if text.startswith(f"| {ours} |"))
    assert "kept, 5.000 ms: 2.50 | rounded, 3.000 ms: 1.50 | x best peer 1.50, **missed** (2)" in line


def test_weights_without_peers_are_held_against_those_of_weights_as_large(cpu_linear: Any) -> None:
    body = {
        "parts": [part("01", row("Wfp8A16", "a", "qplug", 2), row("W8A16", "a", "qplug", 2), row("W8A16", "p", "peer", 4))]
    }
    found = {r["scheme"]: (peer["name"], ratios["of_peer"]) for r, peer, ratios, _ in cpu_linear.judged(body)}
    assert found == {"W8A16": ("p", 2), "Wfp8A16": ("p (W8A16)", 2)}


def test_a_goal_without_a_peer_is_no_goal_met(cpu_linear: Any) -> None:
    assert (
        cpu_linear.table({"parts": [part("01", row("W4A16_g128", "a", "qplug", 1))]})
        .splitlines()[-1]
        .startswith("0 of 1 goals met")
    )


def test_the_parts_measure_every_scheme_that_has_a_goal(cpu_linear: Any) -> None:
    commands = list(cpu_linear.commands(Path("out.json")))
    measured = {word for command in commands for word in command.split()}
    assert set(cpu_linear.GOALS) <= measured
    assert {"4096x4096", "11008x4096", "4096x11008"} <= measured
