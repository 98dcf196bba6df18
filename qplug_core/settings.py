"""Settings: which plugins a user allows or denies, and which distribution a name is pinned to."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UsageError

VARIABLE = "QPLUG_PLUGINS"
CORE = "core"


@dataclass(frozen=True)
class Settings:
    """What was asked of discovery, and where it was said.

    ``allow``: only these plugins, where it is not empty. ``deny``: none of these. ``pin``: a name that two distributions
    claim (of a plugin, format, layout, kernel or quantizer) to the distribution that has it.
    ``source`` is where allow and deny were said, for messages.
    """

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    pin: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """The config file, with ``QPLUG_PLUGINS=gptq,-fp8`` in place of its allow and deny where that is set.

        The file is ``$QPLUG_CONFIG``, else ``qplug.toml`` in the working directory, else ``~/.config/qplug/qplug.toml``.

        :raises UsageError: for a file that is missing or not understood.
        """
        path = _find(environ)
        settings = cls() if path is None else _from_file(path)
        words = [word.strip() for word in environ.get(VARIABLE, "").split(",") if word.strip()]
        if not words:
            return settings
        allow = tuple(word.lstrip("+") for word in words if not word.startswith("-"))
        deny = tuple(word[1:] for word in words if word.startswith("-"))
        return cls(allow, deny, settings.pin, f"{VARIABLE}={environ[VARIABLE]}")

    def check(self, plugins: Iterable[str], distributions: Iterable[str]) -> None:
        """Check that every name means something that is installed.

        :raises UsageError: listing what was found.
        """
        found = sorted(set(plugins))
        for name in (*self.allow, *self.deny):
            if name not in (*found, CORE):
                raise UsageError(
                    f"{self.source} names the plugin {name!r}, which is not installed; found are {', '.join(found) or 'none'}; "
                    "correct the name, or install it"
                )
        if CORE in self.deny:
            raise UsageError(f"{self.source} denies {CORE!r}, the reference kernels, which cannot be denied; remove it")
        installed = sorted(set(distributions))
        for name, distribution in self.pin.items():
            if distribution not in installed:
                raise UsageError(
                    f"{name!r} is pinned to the distribution {distribution!r}, which brings no plugin; "
                    f"found are {', '.join(installed) or 'none'}; correct the pin, or install it"
                )

    def refuses(self, plugin: str) -> str:
        """Why a plugin is blocked, or an empty string."""
        if plugin in self.deny:
            return f"denied by {self.source}"
        if self.allow and plugin not in self.allow:
            return f"not among those allowed by {self.source}"
        return ""


def _find(environ: Mapping[str, str]) -> Path | None:
    if named := environ.get("QPLUG_CONFIG"):
        if not Path(named).is_file():
            raise UsageError(f"QPLUG_CONFIG names {named}, which is not a file; correct it, or unset it")
        return Path(named)
    home = Path(environ.get("HOME", os.path.expanduser("~")))
    return next((p for p in (Path("qplug.toml"), home / ".config" / "qplug" / "qplug.toml") if p.is_file()), None)


def _from_file(path: Path) -> Settings:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as TOML ({error}); correct it") from None
    _only(path, tree, ("plugins",))
    table = tree.get("plugins", {})
    _only(path, table, ("allow", "deny", "pin"), "[plugins] ")
    for key in ("allow", "deny"):
        value = table.get(key, [])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise UsageError(f'{path}: {key} is {value!r}; a list of plugin names was needed, such as ["gptq"]')
    pin = table.get("pin", {})
    if not isinstance(pin, dict) or not all(isinstance(name, str) for name in pin.values()):
        raise UsageError(f'{path}: pin is {pin!r}; a table was needed, such as {{"gptq" = "qplug-gptq"}}')
    return Settings(tuple(table.get("allow", ())), tuple(table.get("deny", ())), pin, str(path))


def _only(path: Path, table: Any, known: tuple[str, ...], where: str = "") -> None:
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {where}plugins is {table!r}; a table was needed")
    for key in table:
        if key not in known:
            raise UsageError(f"{path}: {where}key {key!r} is unknown; known are {', '.join(known)}")
