"""A report on a terminal, or as plain text where it is piped: one table for each problem, fastest first."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .results import Report, Row

WIDTH = 110
HEADINGS = ("", "ms", "median", "GB/s", "TFLOP/s", "x peer", "x bf16", "of limit", "error")


def render(report: Report) -> None:
    """Print everything."""
    console = Console(width=None if Console().is_terminal else WIDTH, highlight=False)
    facts = report.machine
    threads = f", {facts['threads']} CPU thread{'s' * (facts['threads'] > 1)}" if facts["threads"] else ""
    console.print(
        f"[bold]{escape(facts['device'])}[/] ({facts['arch']}){threads}, torch {facts['torch']}, load {facts['load']}"
    )
    limits = {(each["scheme"], each["n"], each["k"]): each for each in report.limits}
    for (scheme, n, k, m), rows in groupby(report.rows, key=lambda r: (r.scheme, r.n, r.k, r.m)):
        limit = limits.get((scheme, n, k)) or report.limits[-1]
        console.print(
            f"\n[bold]{scheme}[/] \\[{n}, {k}], M={m}; memory {limit['read_gb_per_s']:.1f} GB/s, "
            f"bf16 products {limit['matmul_tflop_per_s']:.2f} TFLOP/s"
        )
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in HEADINGS:
            table.add_column(heading, justify="right" if heading else "left", overflow="fold")
        for row in sorted(rows, key=lambda r: r.ms):
            table.add_row(*cells(row), style="bold" if row.kind == "qplug" else "")
        console.print(table)
    for name, reason in report.missing.items():
        console.print(f"not run: {escape(name)}; {escape(reason)}", style="dim")
    for note in [*report.notes, *dict.fromkeys(f"{r.name}: {r.note}" for r in report.rows if r.note)]:
        console.print(f"note: {escape(note)}", style="dim")


def cells(row: Row) -> tuple[str, ...]:
    """One row as text."""
    ratio = [("" if value is None else f"{value:.2f}") for value in (row.of_peer, row.of_bf16)]
    return (
        escape(row.name) + (" (reference)" if row.mode == "reference" else ""), f"{row.ms:.3f}", f"{row.ms_median:.3f}",
        f"{row.gb_per_s:.1f}", f"{row.tflop_per_s:.3f}", *ratio, f"{row.of_limit:.0%}", f"{row.error:.1e}",
    )  # fmt: skip
