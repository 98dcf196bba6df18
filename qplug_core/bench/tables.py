"""Markdown tables from reports of ``qplug bench``: ``python -m qplug_core.bench.tables benchmarks/results/*.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import UsageError

HEADINGS = (
    "scheme", "[N, K]", "M", "kernel", "ms", "GB/s", "TFLOP/s", "of limit", "error", "best peer", "its ms", "x peer", "bf16 ms", "x bf16",
)  # fmt: skip


def read_report(path: Path) -> dict[str, Any] | None:
    """A report as data; None where the file holds something else.

    :raises UsageError: where it cannot be read, or is of another version.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON ({error}); name reports that `qplug bench --json` wrote") from None
    if not isinstance(body, dict) or body.get("kind") != "bench":
        return None
    if body.get("schema") != 1:
        raise UsageError(f"{path} has schema {body.get('schema')!r} and this qplug reads 1; write it again")
    return body


def table(report: Mapping[str, Any]) -> str:
    """One row for each problem: the fastest kernel of a plugin beside the fastest peer and bf16, and where it was measured."""
    facts = report["machine"]
    threads = f", {facts['threads']} CPU thread{'s' * (facts['threads'] > 1)}" if facts["threads"] else ""
    reads = [limit["read_gb_per_s"] for limit in report["limits"]]
    products = [limit["matmul_tflop_per_s"] for limit in report["limits"]]
    lines = [
        f"{facts['device']} ({facts['arch']}){threads}, torch {facts['torch']}, {facts['date'][:10]}, load {facts['load']}: memory "
        f"{_span(reads)} GB/s, bf16 products {_span(products)} TFLOP/s; `{facts['command']}`",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---" * len(HEADINGS) + "|",
    ]
    for (scheme, n, k, m), rows in groupby(report["rows"], key=lambda r: (r["scheme"], r["n"], r["k"], r["m"])):
        lines.append(_line(f"{scheme} | [{n}, {k}] | {m}", list(rows)))
    return "\n".join(lines)


def _line(problem: str, rows: Iterable[Mapping[str, Any]]) -> str:
    fastest: dict[str, Mapping[str, Any]] = {}
    for row in sorted(rows, key=lambda r: r["ms"]):
        fastest.setdefault(row["kind"], row)
    mine, peer, plain = (fastest.get(kind) for kind in ("qplug", "peer", "bf16"))
    cells = [problem]
    if mine is None:
        cells += ["-"] * 6
    else:
        cells += [mine["name"], _number(mine["ms"]), _number(mine["gb_per_s"]), _number(mine["tflop_per_s"])]
        cells += [f"{mine['of_limit']:.0%}", f"{mine['error']:.1e}"]
    cells += [peer["name"], _number(peer["ms"]), _ratio(mine, peer)] if peer is not None else ["-"] * 3
    cells += [_number(plain["ms"]), _ratio(mine, plain)] if plain is not None else ["-"] * 2
    return "| " + " | ".join(cells) + " |"


def _ratio(mine: Mapping[str, Any] | None, other: Mapping[str, Any]) -> str:
    return "-" if mine is None else f"{other['ms'] / mine['ms']:.2f}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _span(values: Iterable[float]) -> str:
    ordered = sorted(values)
    low, high = _number(ordered[0]), _number(ordered[-1])
    return low if low == high else f"{low} to {high}"


def main(arguments: list[str]) -> int:
    """Print the tables of all reports among the files; the exit code."""
    if not arguments:
        print("usage: python -m qplug_core.bench.tables FILE...", file=sys.stderr)
        return 2
    found = 0
    for name in arguments:
        try:
            report = read_report(Path(name))
        except UsageError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        if report is None:
            print(f"{name} is no report of `qplug bench`, and is left out", file=sys.stderr)
            continue
        print("\n" * bool(found) + table(report))
        found += 1
    if not found:
        print("none of the files is a report; write one with `qplug bench --json FILE`", file=sys.stderr)
    return 0 if found else 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
