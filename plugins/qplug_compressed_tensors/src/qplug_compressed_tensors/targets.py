"""Entries of ``targets`` and ``ignore``: a name, the class of modules, or ``re:`` and a pattern; read and written."""

from __future__ import annotations

import re

from qplug_core.match import Matcher


def matcher(text: str) -> Matcher:
    """The matcher of one entry. Patterns match from the start of a name, with an open end."""
    if text.startswith("re:"):
        return Matcher(text[3:], "regex")
    return Matcher(text, "class" if is_class(text) else "exact")


def is_class(text: str) -> bool:
    """True for text that names a class: no dot, and a capital at the beginning, as Python has them."""
    return "." not in text and text[:1].isupper()


def entry(name: str) -> str:
    """The entry that means exactly the module called ``name``."""
    return f"re:{re.escape(name)}$" if is_class(name) or name.startswith("re:") else name
