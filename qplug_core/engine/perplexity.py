"""Perplexity: how well a model predicts a text."""

from __future__ import annotations

import math

import torch

from ..errors import UsageError
from .engine import Engine


def perplexity(engine: Engine, text: str, context: int = 256, batch: int = 8) -> float:
    """exp of the mean negative log-likelihood of each token after the first of its window of ``context`` tokens.

    Log-probabilities are float32.

    :raises UsageError: for a text that is shorter than one window.
    """
    ids = torch.tensor(engine.tokenizer(text)["input_ids"])
    windows = ids[: len(ids) // context * context].view(-1, context)
    if not len(windows):
        raise UsageError(f"the text has {len(ids)} tokens; perplexity needs at least {context}")
    total = 0.0
    for part in windows.split(batch):
        scores = torch.log_softmax(engine.logits(part)[:, :-1], dim=-1)
        total -= scores.gather(-1, part[:, 1:, None]).sum().item()
    return math.exp(total / (len(windows) * (context - 1)))
