"""A picture of a report of ``qplug bench``: the time of each contender, and the time that the machine needs at best.

    pip install matplotlib
    qplug bench --json benchmarks/results/bench.json
    python benchmarks/plot.py benchmarks/results/bench.json benchmarks/results/bench.png [--m 1]

One panel for each scheme and shape; the dashed line is the limit for weights of the scheme.
"""

from __future__ import annotations

import argparse
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from qplug_core.bench.tables import read_report

COLORS = {"qplug": "#1b7837", "bf16": "#969696", "peer": "#762a83"}
WORDS = {"qplug": "kernels of plugins", "bf16": "bf16", "peer": "other libraries"}


def panel(axes: Any, title: str, rows: list[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda r: r["ms"])
    places = range(len(rows))
    axes.barh(places, [row["ms"] for row in rows], color=[COLORS[row["kind"]] for row in rows])
    for place, row in zip(places, rows, strict=True):
        axes.text(row["ms"], place, f" {row['ms']:.3g}", va="center", fontsize=7)
    # bf16 has a limit of its own, for twice or four times the bytes.
    limit = next((row["ms"] * row["of_limit"] for row in rows if row["kind"] != "bf16"), None)
    if limit is not None:
        axes.axvline(limit, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(list(places), [row["name"] for row in rows], fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlim(0, 1.1 * rows[-1]["ms"])
    axes.invert_yaxis()
    axes.set_title(title, fontsize=8, loc="left")


def draw(report: dict[str, Any], m: int, target: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    # Reference kernels are made to be read, and would be ten times as long as the rest.
    chosen = [row for row in report["rows"] if row["m"] == m and row["mode"] != "reference"]
    panels = [
        (f"{key[0]} [{key[1]}, {key[2]}]", list(rows))
        for key, rows in groupby(chosen, key=lambda r: (r["scheme"], r["n"], r["k"]))
    ]
    heights = [1 + len(rows) for _, rows in panels]
    figure = Figure(figsize=(9, 1 + 0.2 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), height_ratios=heights, squeeze=False)
    for axes, (title, rows) in zip(grid.flat, panels, strict=True):
        panel(axes, title, rows)
    facts = report["machine"]
    threads = f", {facts['threads']} CPU thread{'s' * (facts['threads'] > 1)}" if facts["threads"] else ""
    figure.suptitle(
        f"milliseconds at M={m}; dashed: the machine's limit; {facts['device']} ({facts['arch']}){threads}, {facts['date'][:10]}",
        fontsize=9,
    )
    figure.legend(
        handles=[Patch(color=COLORS[kind], label=word) for kind, word in WORDS.items()], loc="outside lower center", ncols=3
    )
    figure.savefig(target, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path, help="what to write: .png, .svg or .pdf")
    parser.add_argument("--m", type=int, default=1, help="number of tokens; default 1")
    arguments = parser.parse_args()
    report = read_report(arguments.report)
    if report is None or not any(row["m"] == arguments.m for row in report["rows"]):
        known = sorted({row["m"] for row in report["rows"]}) if report else []
        print(
            f"{arguments.report} has no rows with M={arguments.m}; it has {known or 'no benchmark at all'}", file=sys.stderr
        )
        return 2
    try:
        draw(report, arguments.m, arguments.picture)
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed: pip install matplotlib", file=sys.stderr)
        return 2
    print(f"written: {arguments.picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
