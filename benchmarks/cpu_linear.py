"""Linear kernels on this CPU against the goals of the project: parts that are measured one by one, in one result file.

    python benchmarks/cpu_linear.py measure OUT.json 4096x4096 W4A16_g128 W8A8 [--peers] [--m 1,8,512] [--threads 2] [--seconds 0.25]
    python benchmarks/cpu_linear.py parts OUT.json | sh
    python benchmarks/cpu_linear.py table OUT.json [--into docs/kernels.md]
    python benchmarks/cpu_linear.py plot OUT.json OUT.svg

A part is one shape: bf16, a sum over memory as the read limit, the best kernel for each scheme, and with ``--peers`` other libraries, which take
turns as in ``qplug bench``. A new part replaces what the file holds of the same shape, schemes and ``--peers``. Ratios are taken within a part, and
the table has one line for each scheme, shape and M. ``parts`` prints the commands that measure everything which has a goal.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qplug_core.bench.contender import Call, Contender, beyond_cache, copies, of_bf16, of_kernel
from qplug_core.bench.limits import Limits, measure_limits
from qplug_core.bench.peer import ROUNDS
from qplug_core.bench.peers import peers_of
from qplug_core.bench.results import machine_facts, rows_of
from qplug_core.bench.run import SHAPES, others, parsed, sample_weight, screen, taking
from qplug_core.bench.timing import take_turns
from qplug_core.device import Device
from qplug_core.quantizer import online_scheme
from qplug_core.registry import get_registry
from qplug_core.resolve import Policy, Resolver

Row = dict[str, Any]
Goal = tuple[str, float]
PEERLESS: list[Goal] = [("of_w4", 1.0)]
"""For schemes of fewer or other codes: milliseconds of W4A16_g128 in the same part, by theirs."""
BYTE: dict[int, list[Goal]] = {1: [("of_limit", 0.8), ("of_peer", 1.3)], 8: [("of_peer", 1.5)], 512: [("of_bf16", 1.0)]}
SMALL: dict[int, list[Goal]] = {1: PEERLESS, 8: PEERLESS, 512: [("of_bf16", 0.9)]}
GOALS: dict[str, dict[int, list[Goal]]] = {
    "W4A16_g128": {
        1: [("of_limit", 0.85), ("of_peer", 1.3)],
        8: [("of_peer", 2.0)],
        512: [("of_bf16", 1.0), ("of_peer", 1.3)],
    },
    "W8A16": BYTE,
    "Wfp8A16": BYTE,
    "W8A8": {
        1: [("of_limit", 0.85), ("of_onednn", 1.0)],
        8: [("of_onednn", 1.0)],
        512: [("of_bf16", 1.9), ("of_onednn", 0.95)],
    },
    **dict.fromkeys(("W2A16_g128", "WNF4A16", "Wmxfp4A16", "Wnvfp4A16"), SMALL),
}
WORDS = {
    "of_limit": "of read limit", "of_peer": "x best peer", "of_onednn": "x oneDNN", "of_bf16": "x bf16", "of_w4": "x W4A16_g128",
}  # fmt: skip
ONEDNN = ("vLLM oneDNN W8A8", "torch._int_mm")
AS_LARGE = {"Wfp8A16": "W8A16"}
"""Schemes that no other library multiplies with: those whose peers read as much."""
PARTS = (
    ("W4A16_g128 --peers", 0.3),
    ("W8A16 Wfp8A16 --peers", 0.3),
    ("W8A8 --peers", 0.3),
    ("W4A16_g128 W2A16_g128 WNF4A16 Wmxfp4A16 Wnvfp4A16", 0.3),
)
"""Schemes of each part of the whole table, and seconds for each contender and M."""
START, END = "<!-- cpu_linear: generated -->", "<!-- cpu_linear: end -->"


def measure(n: int, k: int, schemes: list[str], tokens: list[int], peers: bool, seconds: float) -> dict[str, Any]:
    """One part."""
    device = Device.cpu()
    registry = get_registry()
    resolver = Resolver(registry, device, Policy())
    beyond = beyond_cache(device)
    present, missing = peers_of(device) if peers else ([], {})
    notes: list[str] = []
    groups = []
    for scheme in map(parsed, schemes):
        weight = sample_weight(online_scheme(scheme, k), n, k)
        name = taking(resolver, weight, "bfloat16")[0].name
        group = [of_kernel(resolver.kernel(name), weight, name, beyond)]
        group += others([p for p in present if p.takes(weight.scheme, n, k)], weight, beyond, device, notes)
        groups.append((weight, weight.dequantize(), group))
    plain = of_bf16(groups[0][1], beyond)
    reader = reading(2 * n * k, beyond)
    limits, found, reads = Limits(0.0, 0.0), [], {}
    for m in tokens:
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).bfloat16()
        limits = limits.best(measure_limits(device))
        screened: list[tuple[list[Contender], dict[str, float]]] = []
        for weight, exact, group in groups:
            # Of bf16 the error is that of this scheme's weight, the time that of any.
            own = of_bf16(exact, 1)
            screened.append(screen([*group, own], x, exact.double(), device, notes, f"{weight.scheme}, M={m}"))
        everyone = [plain, reader, *(c for order, _ in screened for c in order if c.kind != "bf16")]
        samples = take_turns(everyone, [c.prepare(x) for c in everyone], seconds, device)
        timed = {id(c): sample for c, sample in zip(everyone, samples, strict=True)}
        reads[str(m)] = reader.nbytes / timed[id(reader)].p10 / 1e9
        for (weight, _, _), (order, errors) in zip(groups, screened, strict=True):
            found.append((weight, m, [(c, timed[id(plain if c.kind == "bf16" else c)], errors[c.name]) for c in order]))
    rows = [
        asdict(row)
        for weight, m, results in found
        for row in rows_of(results, weight, m, Limits(reads[str(m)] * 1e9, limits.matmul), resolver)
    ]
    return {
        "n": n, "k": k, "schemes": schemes, "peers": peers, "read_gb_per_s": reads,
        "matmul_tflop_per_s": limits.matmul / 1e12, "machine": machine_facts(device, registry) | {"command": command()},
        "missing": missing, "notes": notes, "rows": rows,
    }  # fmt: skip


def reading(nbytes: int, beyond: int) -> Contender:
    """A sum over ``nbytes`` of memory that no cache holds, in turns with the others: on a machine that shares its memory the limit of
    another minute may be half of it, or twice."""

    def make(index: int) -> Call:
        data = torch.ones(nbytes // 8, dtype=torch.int64)
        return lambda x: data.sum()

    return Contender("reading", "limit", copies(beyond, nbytes, make), nbytes)


def command() -> str:
    return " ".join(["python benchmarks/cpu_linear.py", *sys.argv[1:]])


def read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"schema": 3, "kind": "cpu_linear", "parts": []}
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def keep(path: Path, part: dict[str, Any]) -> None:
    """Put a part into the file, in place of the same one."""
    body = read(path)
    same = ("n", "k", "schemes", "peers")
    body["parts"] = [p for p in body["parts"] if any(p[key] != part[key] for key in same)] + [part]
    body["parts"].sort(key=lambda p: (-p["peers"], p["schemes"], p["n"] * p["k"], p["k"]))
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def latest(body: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Row, list[Row]]]:
    """One row of ours for each scheme, shape and M: that of the newest part, its part, and peers with ``ratio``, times theirs by ours.

    Peers are those of the newest part that has any for the row, and their ratios are to our row there.
    """
    found: dict[tuple[Any, ...], list[tuple[dict[str, Any], Row]]] = {}
    for part in sorted(body["parts"], key=lambda p: p["machine"]["date"]):
        for row in (r for r in part["rows"] if r["kind"] == "qplug"):
            found.setdefault((place(row["scheme"]), row["scheme"], row["n"] * row["k"], row["k"], row["m"]), []).append(
                (part, row)
            )
    for key in sorted(found):
        part, row = found[key][-1]
        peers = next((p for each in reversed(found[key]) if (p := peers_beside(*each))), [])
        yield part, row, peers


def place(scheme: str) -> int:
    """Where a scheme stands in the table: those with goals first."""
    return list(GOALS).index(scheme) if scheme in GOALS else len(GOALS)


def peers_beside(part: dict[str, Any], row: Row) -> list[Row]:
    """Rows of peers for the weights of ``row``, fastest first, with ``ratio``; where there are none, for others that are as large."""
    here = [r for r in part["rows"] if r["kind"] == "peer" and r["m"] == row["m"]]
    own = [r for r in here if r["scheme"] == row["scheme"]]
    near = [r | {"name": f"{r['name']} ({r['scheme']})"} for r in here if r["scheme"] == AS_LARGE.get(row["scheme"])]
    return sorted(({**r, "ratio": r["ms"] / row["ms"]} for r in own or near), key=lambda r: float(r["ms"]))


def keeps_x(peer: Row) -> bool:
    """Whether a peer multiplies with 16-bit activations, and does not round them to int8."""
    return ROUNDS not in peer["note"] and not peer["scheme"].endswith("A8")


def judged(body: dict[str, Any]) -> Iterator[tuple[Row, Row | None, dict[str, float], list[tuple[Goal, float | None]]]]:
    """Each row of :func:`latest` with its fastest peer, its ratios, and its goals, each with what was reached."""
    for part, row, peers in latest(body):
        ratios = {"of_limit": row["gb_per_s"] / part["read_gb_per_s"][str(row["m"])]}
        if row["of_bf16"] is not None:
            ratios["of_bf16"] = row["of_bf16"]
        if peers:
            ratios["of_peer"] = peers[0]["ratio"]
        here = [r for r in part["rows"] if r["m"] == row["m"] and r["kind"] == "qplug"]
        first = next((r for r in here if r["scheme"] == "W4A16_g128"), None)
        if first is not None:
            ratios["of_w4"] = first["ms"] / row["ms"]
        if library := [r["ratio"] for r in peers if r["name"] in ONEDNN]:
            ratios["of_onednn"] = min(library)
        goals = GOALS.get(row["scheme"], {}).get(row["m"], [])
        yield row, peers[0] if peers else None, ratios, [(goal, ratios.get(goal[0])) for goal in goals]


def table(body: dict[str, Any]) -> str:
    """Markdown: what was measured where, and a line for each kernel."""
    lines_of = list(latest(body))
    parts = list({id(part): part for part, _, _ in lines_of}.values())
    facts = [p["machine"] for p in parts]
    reads = [gb for p in parts for gb in p["read_gb_per_s"].values()]
    products = [p["matmul_tflop_per_s"] for p in parts]
    dates = sorted(f["date"] for f in facts)
    lines = [
        f"{facts[0]['device']} ({facts[0]['arch']}), {facts[0]['threads']} threads, torch {facts[0]['torch']}, {len(parts)} parts from "
        f"{dates[0][:16]} to {dates[-1][:16]} UTC. Reading {min(reads):.1f} to {max(reads):.1f} GB/s, bf16 products {min(products):.2f} to "
        f"{max(products):.2f} TFLOP/s; ratios are within a part.",
        "",
        "| scheme | [N, K] | M | ms | GB/s | of read limit | x bf16 | best peer with 16-bit x | best peer with int8 x | goals |",
        "|---" * 10 + "|",
    ]
    met = total = 0
    for (row, _, ratios, goals), (_, _, peers) in zip(judged(body), lines_of, strict=True):
        said = []
        for (key, least), reached in goals:
            total, met = total + 1, met + (reached is not None and reached >= least)
            if reached is None:
                said.append(f"{WORDS[key]} >= {least:g}: **not measured**")
            else:
                said.append(f"{WORDS[key]} {reached:.2f}, {'met' if reached >= least else f'**missed** ({least:g})'}")
        beside = [next((p for p in peers if keeps_x(p) == kept), None) for kept in (True, False)]
        others_of = ["-" if p is None else f"{p['name']}, {p['ms']:.3f} ms: {p['ratio']:.2f}" for p in beside]
        lines.append(
            f"| {row['scheme']} | [{row['n']}, {row['k']}] | {row['m']} | {row['ms']:.3f} | {row['gb_per_s']:.1f} | "
            f"{ratios['of_limit']:.0%} | {ratios.get('of_bf16', 0.0):.2f} | {' | '.join(others_of)} | {'; '.join(said)} |"
        )
    return "\n".join(
        [*lines, "", f"{met} of {total} goals met. Goals that name the best peer count the faster one of both columns."]
    )


def commands(out: Path) -> Iterator[str]:
    """A command for each part of the whole table, each short enough that other processes can be held up while it runs."""
    for n, k in SHAPES:
        for schemes, seconds in PARTS:
            yield f"{sys.executable} {sys.argv[0]} measure {out} {n}x{k} {schemes} --seconds {seconds}"


def into(path: Path, text: str) -> None:
    """Replace what stands between the marks."""
    before, rest = path.read_text(encoding="utf-8").split(START)
    path.write_text(before + START + "\n" + text + "\n" + END + rest.split(END)[1], encoding="utf-8")


def plot(body: dict[str, Any], target: Path) -> None:
    """Speed by M relative to bf16, a panel for each shape and a line for each scheme."""
    from matplotlib.figure import Figure

    lines: dict[tuple[int, int], dict[str, dict[int, float]]] = {}
    for row, _, ratios, _ in judged(body):
        lines.setdefault((row["n"], row["k"]), {}).setdefault(row["scheme"], {})[row["m"]] = ratios["of_bf16"]
    figure = Figure(figsize=(4 * len(lines), 5), layout="constrained")
    for axes, ((n, k), schemes) in zip(
        figure.subplots(1, len(lines), sharey=True, squeeze=False)[0], lines.items(), strict=True
    ):
        for i, (scheme, points) in enumerate(schemes.items()):
            at = sorted(points)
            axes.plot(range(len(at)), [points[m] for m in at], marker="osv^D"[i % 5], color=f"C{i % 10}", label=scheme)
            axes.set_xticks(range(len(at)), [f"M={m}" for m in at])
        axes.axhline(1, color="black", linestyle="--", linewidth=1)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(f"[{n}, {k}]", loc="left", fontsize=9)
    figure.axes[0].set_ylabel("times faster than F.linear in bf16")
    facts = body["parts"][0]["machine"]
    figure.suptitle(f"{facts['device']} ({facts['arch']}), {facts['threads']} threads, {facts['date'][:10]}", fontsize=9)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("measure", help="measure one part")
    one.add_argument("out", type=Path)
    one.add_argument("shape", help="rows by columns, as 4096x4096")
    one.add_argument("schemes", nargs="+")
    one.add_argument("--peers", action="store_true")
    one.add_argument("--m", default="1,8,512")
    one.add_argument("--threads", type=int, default=2)
    one.add_argument("--seconds", type=float, default=0.25, help="of calls for each contender and M")
    show = verbs.add_parser("table", help="Markdown of all parts, with goals met and missed")
    show.add_argument("out", type=Path)
    show.add_argument("--into", type=Path, help="a file with marks, between which the table goes")
    every = verbs.add_parser("parts", help="print the commands that measure the whole table")
    every.add_argument("out", type=Path)
    picture = verbs.add_parser("plot", help="speed by M relative to bf16 (needs matplotlib)")
    picture.add_argument("out", type=Path)
    picture.add_argument("target", type=Path)
    options = parser.parse_args()
    if options.verb == "measure":
        torch.set_num_threads(options.threads)
        n, k = map(int, options.shape.split("x"))
        with torch.inference_mode():
            part = measure(n, k, options.schemes, [int(m) for m in options.m.split(",")], options.peers, options.seconds)
        keep(options.out, part)
        print(table({"parts": [part]}))
    elif options.verb == "parts":
        print("\n".join(commands(options.out)))
    elif options.verb == "plot":
        plot(read(options.out), options.target)
    elif options.into:
        into(options.into, table(read(options.out)))
    else:
        print(table(read(options.out)))


if __name__ == "__main__":
    main()
