"""A trained model: sentence embeddings of all-MiniLM-L6-v2 (a BERT) before and after quantization."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import qplug_core
from qplug_core.engine.engine import Engine

SENTENCES = (
    "A man is playing a guitar.", "Someone plays an instrument.", "A cat sleeps on the sofa.", "A kitten is resting on the couch.",
    "The stock market fell sharply today.", "Shares dropped on Wall Street.", "How do I reset my password?",
    "I forgot my login credentials.", "The recipe needs two eggs and flour.", "Bake the cake for forty minutes.",
    "Neural networks are trained with gradient descent.", "It will rain in the afternoon.",
)  # fmt: skip
RELATED = {(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)}
"""Pairs that mean about the same; every other pair does not."""


@dataclass(frozen=True)
class Bound:
    """The least that a scheme must keep: cosine of a sentence with itself (worst sentence), rank correlation of all 66 pairs."""

    cosine: float
    rank: float


BOUNDS = {
    "W8A16": Bound(0.999, 0.998),
    "W8A8": Bound(0.99, 0.985),
    "Wfp8A16": Bound(0.99, 0.985),
    "Wfp8Afp8": Bound(0.99, 0.985),
    "Wfp8Afp8_tensor_a:tensor": Bound(0.99, 0.985),
    "Wfp8Afp8_b128x128": Bound(0.99, 0.985),
    "Wmxfp8Amxfp8": Bound(0.99, 0.985),
    "Wnvfp4A16": Bound(0.96, 0.94),
    "Wnvfp4Anvfp4": Bound(0.94, 0.90),
    "Wmxfp4A16": Bound(0.93, 0.92),
    "Wmxfp4Amxfp4": Bound(0.87, 0.83),
    "WNF4A16": Bound(0.95, 0.95),
    "W4A16_g32": Bound(0.93, 0.94),
    "W4A16_g128": Bound(0.92, 0.93),
    "W4A16_g128_asym": Bound(0.92, 0.93),
    "W4Afp8_g128": Bound(0.92, 0.93),
}
"""Round to nearest without calibration, measured and rounded down."""

TOO_FEW = "W2A16_g128"
"""Two bits without an algorithm: what the bounds must refuse."""


@dataclass(frozen=True)
class Kept:
    """``cosine``: worst and mean over sentences; ``rank``: Spearman's; ``related``: of the five closest pairs, those in RELATED."""

    worst: float
    mean: float
    rank: float
    related: int

    def holds(self, bound: Bound) -> bool:
        """True within the bound."""
        return self.worst >= bound.cosine and self.rank >= bound.rank


def embeddings(engine: Engine) -> Tensor:
    """Unit vectors ``[12, 384]``: the mean over tokens, as the model's own pooling config says."""
    tokenizer = engine.tokenizer
    tokenizer.padding_side = "right"
    batch = tokenizer(list(SENTENCES), return_tensors="pt", padding=True)
    hidden = engine.forward(**batch).last_hidden_state.float()
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def compare(folder: Path, scheme: str, plain: Tensor) -> Kept:
    """Embeddings of the model quantized to ``scheme`` against ``plain`` ones."""
    mine = embeddings(qplug_core.load(folder, dtype="float32", quantize=scheme))
    cosine = (mine * plain).sum(1)
    rows, columns = torch.triu_indices(len(SENTENCES), len(SENTENCES), 1)
    ours, theirs = ((x @ x.T)[rows, columns] for x in (mine, plain))
    ranks = torch.stack([x.argsort().argsort().double() for x in (ours, theirs)])
    closest = {(int(rows[i]), int(columns[i])) for i in ours.topk(len(RELATED)).indices}
    return Kept(float(cosine.min()), float(cosine.mean()), float(torch.corrcoef(ranks)[0, 1]), len(closest & RELATED))


def table(folder: Path) -> list[str]:
    """Rows of a table in Markdown, a scheme each."""
    plain = embeddings(qplug_core.load(folder, dtype="float32"))
    lines = [
        "| scheme | cosine, mean | cosine, worst | rank of 66 pairs | related pairs of the closest 5 | bounds |",
        "|---|---|---|---|---|---|",
    ]
    for scheme in (*BOUNDS, TOO_FEW):
        kept, bound = compare(folder, scheme, plain), BOUNDS.get(scheme)
        shown = f"{bound.cosine}, {bound.rank}" if bound else "none: shown for what they refuse"
        lines.append(f"| {scheme} | {kept.mean:.4f} | {kept.worst:.4f} | {kept.rank:.4f} | {kept.related} | {shown} |")
    return lines
