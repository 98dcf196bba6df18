"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

TRIM_BYTES = 2**24
"""About as much freed memory may stay with the process while it loads."""


@functools.cache
def _trimmer() -> Callable[[int], Any] | None:
    """glibc's malloc_trim, or None with another C library."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim() -> None:
    """Return freed heap pages. glibc keeps blocks of up to 32 MB, which a loader frees by the hundred."""
    trimmer = _trimmer()
    if trimmer is not None:
        trimmer(0)


class Heap:
    """Trims after every :data:`TRIM_BYTES` that were loaded: each time, the buffers of the next layer are faulted in anew."""

    def __init__(self) -> None:
        self._loaded = 0

    def loaded(self, nbytes: int) -> None:
        """Say that ``nbytes`` more of the model are in their place."""
        self._loaded += nbytes
        if self._loaded >= TRIM_BYTES:
            trim()
            self._loaded = 0
