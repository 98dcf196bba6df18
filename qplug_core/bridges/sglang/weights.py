"""Stored tensors as SGLang streams them: what the bridge into vLLM does, in SGLang's name."""

from __future__ import annotations

from ...errors import CheckpointError
from ...method import QuantMethod
from ...planner import Planner
from ...quant_plan import Decision
from ..vllm.weights import Weights as Streamed
from ..vllm.weights import place, show

__all__ = ["Weights", "place", "show"]


class Weights(Streamed):
    """The tensors of one projection, collected until it is whole."""

    def __init__(self, decision: Decision, method: QuantMethod, planner: Planner) -> None:
        try:
            super().__init__(decision, method, planner)
        except CheckpointError as error:
            raise CheckpointError(_named(error)) from None

    def finish(self) -> None:
        """All tensors were streamed.

        :raises ValueError: where some of this layer are missing.
        """
        try:
            super().finish()
        except ValueError as error:
            raise ValueError(_named(error)) from None


def _named(error: Exception) -> str:
    return str(error).replace("vLLM", "SGLang")
