"""Schemes that stand for a pattern: what the capability matrix counts and the conformance kit tries."""

from __future__ import annotations

from .decl import SchemePattern
from .errors import SchemeError
from .scheme import QuantScheme

GROUPS = (32, 128)
"""Group sizes that stand for ``g*``."""
EVERYTHING = ("W4A16_g128", "W4A16_g32_asym", "W8A8", "Wfp8Afp8_b128x128", "Wnvfp4A16", "WNF4A16")
"""Schemes that stand for the pattern ``*``."""


def schemes_of(patterns: tuple[str, ...]) -> list[QuantScheme]:
    """Schemes that stand for the sets of ``patterns``: every base, granularity, sign, order and activation that they name."""
    found: dict[QuantScheme, None] = {}
    for text in patterns:
        if text == "*":
            found.update(dict.fromkeys(QuantScheme.parse(name) for name in EVERYTHING))
            continue
        pattern = SchemePattern(text)
        bases, conditions = pattern.parts()
        for base in bases:
            act = QuantScheme.parse(base).act is not None
            options = [_words(c) for c in conditions if act or not c.startswith(("a:", "rules=", "rule="))]
            for name in _products(base, options):
                try:
                    scheme = QuantScheme.parse(name)
                except SchemeError:
                    continue  # A combination that is no scheme, such as floats with zero points.
                if pattern.matches(scheme) and _is_distinct(scheme):
                    found[scheme] = None
    return list(found)


def _words(condition: str) -> list[str]:
    """The alternatives of one condition, as suffixes of a scheme name."""
    if condition.startswith("rule="):
        return ["", *(f"a:rule={word}" for word in condition[5:].split("|"))]
    kind, _, text = condition.rpartition("=" if condition.startswith("rules=") else ":")
    if kind == "rules":
        return ["", *(f"a:rule={word}" for word in text.split("|"))]
    if kind == "a":
        return [f"a:{each}" for word in text.split("|") for each in _concrete(word)]
    if condition in ("actorder", "2:4"):
        return ["", condition]
    return [each for word in condition.split("|") for each in _concrete(word)]


def _is_distinct(scheme: QuantScheme) -> bool:
    """False where a word changes nothing: act order without groups, a rule for a scale that is stored."""
    grouped = scheme.weight is not None and scheme.weight.granularity == "group"
    ruled = scheme.act is not None and scheme.act.rule != ""
    return (grouped or not scheme.act_order) and not (ruled and scheme.act is not None and scheme.act.dynamic is not True)


def _concrete(word: str) -> list[str]:
    if word.startswith("g*"):
        return [f"g{group}{word[2:]}" for group in GROUPS]
    if word.endswith(".outlier"):
        return [f"{word}=6"]
    return ["b128x128", "b64x32"] if word == "b*" else [word]


def _products(name: str, options: list[list[str]]) -> list[str]:
    if not options:
        return [name]
    return [text for word in options[0] for text in _products(f"{name}_{word}" if word else name, options[1:])]
