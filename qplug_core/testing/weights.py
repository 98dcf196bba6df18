"""Random weights for tests; see :mod:`qplug_core.random_weight`."""

from ..random_weight import random_weight

__all__ = ["random_weight"]
