"""``python -m qplug_core.demo``: the main job on the embedded model, end to end.

Prints the capability report and the plan of the embedded GPTQ checkpoint (a file of GPTQModel, not of qplug), generates from it
and from its bf16 parent, and holds quantized versions against the parent: size and perplexity on held-out text.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..engine.engine import Engine, load
from ..engine.perplexity import perplexity

HERE = Path(__file__).parent
PROMPT = 'import os\n\n\ndef read_lines(path):\n    """Return'
ONLINE = ("W8A16", "W8A8", "W4A16_g128")


def main() -> int:
    """Run everything; the exit code says whether the quantized model still predicts like its parent."""
    console = Console(highlight=False, width=100)
    for command in (["list-methods"], ["explain", str(HERE / "gptq")]):
        console.rule(f"qplug {command[0]}")
        subprocess.run([sys.executable, "-m", "qplug_core", *command], check=True)
    text = (HERE / "heldout.txt").read_text(encoding="utf-8")
    table = Table(box=None, header_style="bold")
    for heading in ("model", "scheme", "weights MB", "perplexity", "kernels"):
        table.add_column(heading)
    parent = _row(table, "bf16 parent", load(HERE / "bf16"), text)
    for name in ("bf16", "gptq"):
        console.rule(f"qplug generate {name}")
        console.print(PROMPT, end="", markup=False, style="dim")
        start = time.perf_counter()
        engine = load(HERE / name)
        answer = engine.generate(PROMPT, 48)
        console.print(answer, markup=False)
        console.print(f"\n({time.perf_counter() - start:.1f} s with loading)", style="dim")
    quantized = _row(table, "GPTQModel file", load(HERE / "gptq"), text)
    worst = quantized
    for scheme in ONLINE:
        worst = max(worst, _row(table, "online, from bf16", load(HERE / "bf16", quantize=scheme), text))
    console.rule("size and perplexity on held-out text")
    console.print(table)
    ok = quantized < 1.15 * parent
    console.print(
        f"\nGPTQ W4A16 is at {quantized / parent:.3f} of its parent's perplexity"
        + ("" if ok else ": too far, something is wrong")
    )
    return 0 if ok else 1


def _row(table: Table, name: str, engine: Engine, text: str) -> float:
    score = perplexity(engine, text)
    schemes = {str(s.scheme) for d in engine.plan.decisions for s in d.segments if s.scheme} or {"16 bit"}
    kernels = {s.choice.kernel for d in engine.plan.decisions for s in d.segments if s.choice} or {"torch"}
    table.add_row(name, ", ".join(sorted(schemes)), f"{engine.nbytes / 1e6:.2f}", f"{score:.3f}", ", ".join(sorted(kernels)))
    return score


if __name__ == "__main__":
    raise SystemExit(main())
