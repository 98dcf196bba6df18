"""Stored tensors as SGLang streams them, which is as vLLM does."""

from __future__ import annotations

from ..vllm.weights import Weights as Streamed
from ..vllm.weights import place, show

__all__ = ["Weights", "place", "show"]


class Weights(Streamed):
    """The tensors of one projection, collected until it is whole."""

    engine = "SGLang"
