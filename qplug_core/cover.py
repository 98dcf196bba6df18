"""Exact cover: every stored tensor is claimed exactly once, every slot is filled exactly once, or nothing is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from .errors import CoverError
from .source import TensorInfo

SHOWN = 8


@dataclass
class Cover:
    """Claims on the tensors of a checkpoint, and what is wrong with them."""

    tensors: Mapping[str, TensorInfo]
    claims: dict[str, list[tuple[str, tuple[int, int] | None]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    _unchecked: dict[str, None] = field(default_factory=dict)
    _seen: bool = False

    def claim(self, name: str, owner: str, rows: tuple[int, int] | None = None, shared: bool = False) -> None:
        """``owner`` takes tensor ``name``, or its rows (or experts) ``rows``; one claim stands for all who share it."""
        claims = self.claims.setdefault(name, [])
        self._unchecked[name] = None
        self.ignored.pop(name, None)
        if not (shared and claims):
            claims.append((owner, rows))

    def miss(self, name: str, owner: str) -> None:
        """``owner`` needs a tensor that is not there."""
        self.missing[name] = owner

    def mistake(self, text: str) -> None:
        """A tensor is there, but not as it has to be; one clause, without a full stop."""
        self.wrong.append(text)

    def check(self, ignorable: Mapping[str, str], complete: bool = True) -> None:
        """Refuse anything but an exact cover.

        ``ignorable``: exact suffixes that may be left unread, with the reason. ``complete``: False where an engine
        plans a part of the model, so that unclaimed tensors are somebody else's.

        :raises CoverError: with everything that is wrong, and near-miss names.
        """
        for name in self._unchecked:
            self._check_overlap(name, self.claims[name])
        self._unchecked = {}
        unclaimed = []
        if complete or not self._seen:  # An engine checks once for each layer: the whole file is walked the first time.
            self._seen = True
            for name in (n for n in self.tensors if n not in self.claims):
                reason = next((why for suffix, why in ignorable.items() if f".{name}".endswith(f".{suffix}")), None)
                if reason is not None:
                    self.ignored[name] = reason
                elif complete:
                    unclaimed.append(name)
        if self.missing or self.wrong or unclaimed:
            raise CoverError(self._describe(unclaimed))

    def _check_overlap(self, name: str, claims: list[tuple[str, tuple[int, int] | None]]) -> None:
        whole = [owner for owner, rows in claims if rows is None]
        if len(claims) > 1 and whole:
            self.mistake(f"{name} is claimed by {' and '.join(dict.fromkeys(owner for owner, _ in claims))}")
            return
        spans = sorted((rows, owner) for owner, rows in claims if rows is not None)
        for ((_, stop), one), ((start, _), other) in pairwise(spans):
            if start < stop and one != other:
                self.mistake(f"rows of {name} are claimed by both {one} and {other}")

    def _describe(self, unclaimed: list[str]) -> str:
        lines = []
        if self.wrong:
            lines.append(f"not as they have to be: {_some(self.wrong)}")
        if self.missing:
            shown = []
            for name, owner in self.missing.items():
                near = difflib.get_close_matches(name, unclaimed, n=1, cutoff=0.8)
                shown.append(f"{name} (needed by {owner}{f'; is {near[0]} meant?' if near else ''})")
            lines.append(f"missing: {_some(shown)}")
        if unclaimed:
            lines.append(f"not claimed by any layer: {_some(unclaimed)}")
        return (
            "the checkpoint does not cover the model exactly, so nothing was loaded; "
            + "; ".join(lines)
            + "; the file and its config must say the same, so correct the one that is wrong"
        )


def _some(items: Iterable[str]) -> str:
    listed = list(items)
    text = ", ".join(listed[:SHOWN])
    return text if len(listed) <= SHOWN else f"{text} and {len(listed) - SHOWN} more"
