"""The dialect of ``modules_to_not_convert``, which transformers and vLLM read differently."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from qplug_core.config import Rule
from qplug_core.errors import ConfigError
from qplug_core.keys import list_of_names
from qplug_core.match import Matcher, Named


@dataclass
class ModuleBoundary(Matcher):
    """transformers: a regular expression from the start of the name up to the end of a component, or the end of the name.

    ``gate`` means ``mlp.gate`` and not ``mlp.gate_proj``; ``model.layers.1`` means all below it and not ``model.layers.11``.
    vLLM compares whole names, which this contains.
    """

    pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pattern = re.compile(rf"(?:{self.text})(?:(?<=\.)|(?=\.|$))")

    def matches(self, module: Named) -> bool:
        """True where one of the module's names is meant."""
        return any(self.pattern.match(name) or name.endswith(self.text) for name in module.all_names)

    def __str__(self) -> str:
        return f"{self.text} (up to a module boundary, or suffix)"


def ignored(raw: dict[str, Any], method: str) -> list[Rule]:
    """Rules "stays 16 bit" of all lists of a config that say so.

    :raises ConfigError: for a list that is not one of names, and for lists that contradict each other.
    """
    keys = ("modules_to_not_convert", "ignored_layers", "exclude")
    lists = {key: list_of_names(raw[key], f"the {method} config says {key}") for key in keys if raw.get(key)}
    if len({frozenset(names) for names in lists.values()}) > 1:
        raise ConfigError(
            f"the {method} config has {' and '.join(lists)} with different names; engines read one of the two, so make them equal"
        )
    for key, names in list(lists.items())[:1]:
        return [Rule(_matcher(name), None, origin=key) for name in names]
    return []


def _matcher(name: str) -> Matcher:
    # AutoFP8 writes the patterns of its recipe with the prefix that it knows them by.
    if name.startswith("re:"):
        return Matcher(name[3:], "regex")
    return ModuleBoundary(name, "regex")
