"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def _trimmer() -> Callable[[int], Any] | None:
    """glibc's malloc_trim, or None with another C library."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim() -> None:
    """Return freed heap pages. glibc keeps blocks of up to 32 MB, which a loader frees by the hundred."""
    trimmer = _trimmer()
    if trimmer is not None:
        trimmer(0)
