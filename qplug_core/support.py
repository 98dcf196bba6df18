"""Refusal: why a kernel, a plugin or a format does not take something, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Refusal:
    """One reason: what is there, what was needed, and what to do about it.

    ``code`` is a stable word to test against: ``device``, ``scheme``, ``dtype``, ``shape``, ``group``, ``zeros``,
    ``act_order``, ``rule``, ``requires``, ``op``, ``policy``, ``import``, ``rank``, ``measured``.
    """

    code: str
    have: str
    need: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.have}; needs {self.need}"
        return f"{text}; {self.remedy}" if self.remedy else text

    def to_json(self) -> dict[str, str]:
        """The four fields."""
        return asdict(self)
