"""The keys of a quantization config. What is not known is refused, because it may change the numbers; empty values say nothing."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from .errors import ConfigError


def says_nothing(value: Any) -> bool:
    """True for a value that leaves its key unsaid: null, or an empty string, list or object."""
    return value is None or value == "" or value == [] or value == {}


def check_keys(said: Mapping[str, Any], known: Container[str], where: str, plugin: str) -> None:
    """Refuse a key that says something and is not known.

    :param where: what holds the keys, as it begins a sentence: ``the AWQ config``.
    :param plugin: the distribution that may know more in a newer version.
    :raises ConfigError: naming the key.
    """
    for key, value in said.items():
        if key not in known and not says_nothing(value):
            raise ConfigError(
                f"{where} has the key {key!r} ({value!r}), which is not known and may change the numbers; remove it if it does not, "
                f"or use a newer {plugin}"
            )


def check_values(said: Mapping[str, Any], understood: Mapping[str, Sequence[Any]], where: str) -> None:
    """Refuse a value that is not understood. ``understood``: by key, the values that are; none for keys that must be empty.

    :raises ConfigError: naming the key and the value.
    """
    for key, allowed in understood.items():
        value = said.get(key)
        if not says_nothing(value) and not any(type(value) is type(one) and value == one for one in allowed):
            needed = " or ".join(map(repr, allowed)) or "no value"
            raise ConfigError(
                f"{where} says {key}: {value!r}; {needed} is understood, because others change the numbers: use the plugin of the "
                "tool that wrote it"
            )


def take(
    said: Mapping[str, Any], known: Mapping[str, Any], metadata: Sequence[str], where: str, plugin: str
) -> dict[str, Any]:
    """Values of the known keys, or their defaults in ``known``. ``metadata``: keys that change no number.

    :raises ConfigError: for any other key that says something.
    """
    check_keys(said, (*known, *metadata), where, plugin)
    return {key: said.get(key, default) for key, default in known.items()}


def resolve_aliases(
    said: Mapping[str, Any],
    aliases: Mapping[str, Sequence[str]],
    where: str,
    read: Callable[[str, Any], Any] = lambda key, value: value,
) -> dict[str, Any]:
    """Values by key, from the key itself or another name that tools give it; keys that nothing is said of are left out.

    :param read: makes ``(key, value)`` comparable where two names are spelled in two ways.
    :raises ConfigError: where two names of one key contradict each other.
    """
    values = {}
    for key, others in aliases.items():
        found = {name: read(key, said[name]) for name in (key, *others) if not says_nothing(said.get(name))}
        if len({repr(value) for value in found.values()}) > 1:
            text = " and ".join(f"{name}: {value!r}" for name, value in found.items())
            raise ConfigError(f"{where} says {text}, which contradict each other; keep the one that the file was made with")
        if found:
            values[key] = next(iter(found.values()))
    return values


def check_agreement(mine: Mapping[str, Any], other: Mapping[str, Any], name: str) -> None:
    """Refuse a file ``name`` beside ``config.json`` that says ``other`` about a key of both.

    :raises ConfigError: naming the key.
    """
    for key in mine.keys() & other.keys():
        if mine[key] != other[key]:
            raise ConfigError(
                f"config.json says {key}: {mine[key]!r} and {name} says {other[key]!r}; correct the one that is wrong, or remove "
                f"{name}"
            )


def list_of_names(value: Any, where: str) -> list[str]:
    """A list of names, each once; empty where it says nothing.

    :param where: the key and what holds it, as it begins a sentence: ``the AWQ config says ignore``.
    :raises ConfigError: for anything else.
    """
    if says_nothing(value):
        return []
    if not isinstance(value, list) or not all(isinstance(entry, str) and entry for entry in value):
        raise ConfigError(f"{where}: {value!r}; a list of names was needed, so correct it")
    return list(dict.fromkeys(value))
