"""The README's figures of speed, from the result files beside this script.

python benchmarks/readme.py            # writes them
python benchmarks/readme.py --check    # exit code 1 where the README says something else
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cpu_linear import judged

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- speed: generated -->", "<!-- speed: end -->"
SHAPE = (11008, 4096)
DEVICE = "cpu-avx512_bf16"


def _read(kind: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{kind}-{DEVICE}.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def linear() -> list[str]:
    """A line for each scheme: one layer, by M."""
    body = _read("cpu_linear")
    schemes: dict[str, dict[int, str]] = {}
    for row, peer, ratios, _ in judged(body):
        if (row["n"], row["k"]) == SHAPE:
            beside = f", {ratios['of_peer']:.2f} {peer['name'].partition(',')[0]}" if peer is not None else ""
            schemes.setdefault(row["scheme"], {})[row["m"]] = f"{row['ms']:.2f} ms: {ratios['of_bf16']:.2f} bf16{beside}"
    facts = body["parts"][0]["machine"]
    tokens = sorted({m for cells in schemes.values() for m in cells})
    return [
        f"One layer [{SHAPE[0]}, {SHAPE[1]}] on {facts['device']} ({facts['arch']}), {facts['threads']} threads; how many times faster than "
        "`F.linear` in bf16, and than the fastest other library (ONNX Runtime and llama.cpp round 16-bit activations to int8, qplug does not):",
        "",
        "| scheme | " + " | ".join(f"M={m}" for m in tokens) + " |",
        "|---" * (len(tokens) + 1) + "|",
        *(f"| {scheme} | {' | '.join(cells.get(m, '-') for m in tokens)} |" for scheme, cells in schemes.items()),
    ]


def decoding() -> list[str]:
    """A line for each whole model."""
    body = _read("decode")
    contexts = ("64", "1024")
    lines = [
        "Whole models in the reference engine, same file, ms per token (and as a part of llama.cpp's better setting: below 1 is faster):",
        "",
        f"| model | threads | {' | '.join(f'behind {c} tokens' for c in contexts)} | prefill of 512, tokens/s (times llama.cpp's) |",
        "|---" * (len(contexts) + 3) + "|",
    ]
    for row in sorted(body["rows"], key=lambda r: (r["bits"], r["model"] != "llama", r["threads"])):
        cells = []
        for context in contexts:
            ms = row["decode_ms"].get(context)
            cells.append("-" if ms is None else f"{ms['qplug']:.1f} ({ms['qplug'] / _best(ms, min):.2f})")
        speed = row.get("prefill_tokens_per_second")
        cells.append("-" if speed is None else f"{speed['qplug']:.0f} ({speed['qplug'] / _best(speed, max):.2f})")
        heads = "16 key-value heads" if row["model"] == "llama" else "4 key-value heads"
        lines.append(f"| 0.5 B, {heads}, Q{row['bits']}_0 | {row['threads']} | {' | '.join(cells)} |")
    return lines


def _best(values: dict[str, float], choose: Any) -> float:
    return float(choose(values["llama.cpp"], values["llama.cpp flash"]))


def loading() -> list[str]:
    """A line for each checkpoint."""
    cases = _read("loading")["cases"]
    return [
        "Loading a model of 1.0 billion parameters, 2 threads, page cache warm:",
        "",
        "| file | MB | read s | load s | times reading |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {case['file_mb']:.0f} | {case['read_s']:.2f} | {case['load_s']:.2f} | {case['times_reading']:.1f} |"
            for name, case in cases.items()
        ),
    ]


def written(text: str) -> str:
    """The README with the present figures."""
    before, rest = text.split(START)
    body = "\n".join([*linear(), "", *decoding(), "", *loading()])
    return before + START + "\n" + body + "\n" + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = written(old)
    if options.check:
        sys.exit(0 if new == old else "README.md differs from benchmarks/results; run python benchmarks/readme.py")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
