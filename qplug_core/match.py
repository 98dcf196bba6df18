"""Matchers: every tool has its own dialect of saying which modules a rule means. One class for each dialect."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, Protocol

from .errors import ConfigError

Dialect = Literal["exact", "regex", "search", "fnmatch", "substring", "component", "prefix", "suffix", "class", "all"]


class Named(Protocol):
    """What a rule is matched against: all names of a module, and its class."""

    @property
    def all_names(self) -> tuple[str, ...]:
        """Every name that the module goes by."""
        ...

    @property
    def module_class(self) -> str:
        """Its class, without the module path."""
        ...


@dataclass
class Matcher:
    """One entry of a list of rules, in one dialect, counting how many modules it meant.

    exact      the whole name
    regex      ``re.match``: from the start, the end is open (GPTQ ``dynamic``, compressed-tensors ``re:``)
    search     ``re.search``
    fnmatch    shell wildcards over the whole name (ModelOpt); ``module`` also means everything below it
    substring  anywhere in the name (AutoAWQ): ``gate`` means ``gate_proj`` too
    component  one or more whole dotted components (bitsandbytes, torchao)
    prefix     the name or a parent module, at a dot (auto-round blocks)
    suffix     the name, or its end at a dot
    class      the class of the module (compressed-tensors ``Linear``)
    all        every module
    """

    text: str
    dialect: Dialect
    hits: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if self.dialect in ("regex", "search"):
            try:
                re.compile(self.text)
            except re.error as error:
                raise ConfigError(
                    f"the rule {self.text!r} is not a regular expression ({error}); correct it in the quantization config"
                ) from None

    def matches(self, module: Named) -> bool:
        """True where the rule means ``module``."""
        if self.dialect == "all":
            return True
        if self.dialect == "class":
            return module.module_class.lower() == self.text.lower()
        return any(self._name(name) for name in module.all_names)

    def _name(self, name: str) -> bool:
        text = self.text
        match self.dialect:
            case "exact":
                return name == text
            case "regex":
                return re.match(text, name) is not None
            case "search":
                return re.search(text, name) is not None
            case "fnmatch":
                return fnmatchcase(name, text) or fnmatchcase(name, f"{text}.*")
            case "substring":
                return text in name
            case "component":
                return f".{text}." in f".{name}."
            case "prefix":
                return f"{name}.".startswith(f"{text}.")
            case "suffix":
                return f".{name}".endswith(f".{text}")
        return False

    def __str__(self) -> str:
        return f"{self.text} ({self.dialect})"
