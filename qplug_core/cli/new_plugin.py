"""``qplug new-plugin NAME``: a working plugin that passes the conformance kit unedited."""

from __future__ import annotations

import keyword
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import UsageError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

SUFFIX = ".in"


@click.command("new-plugin")
@click.argument("name")
@click.option("--directory", default=".", type=click.Path(file_okay=False, path_type=Path), help="Where qplug_NAME is made.")
def new_plugin(name: str, directory: Path) -> None:
    """Write the package qplug_NAME: a format, a kernel, and their conformance tests.

    NAME is a lower-case Python identifier.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UsageError(
            f"{name!r} was given; a plugin name of lower-case letters, digits and '_' that starts with a letter is needed"
        )
    if name == "core":
        raise UsageError("'core' is qplug's own name; choose another")
    target = directory / f"qplug_{name}"
    if target.exists():
        raise UsageError(f"{target} exists; choose another name or directory, nothing was written")
    try:
        _copy(_skeleton(), target, name)
    except OSError as error:
        raise UsageError(f"{target} cannot be written ({error.strerror}); choose another directory") from None
    click.echo(f"{target} is ready. Now:\n  cd {target}\n  pip install -e . pytest\n  pytest")


def _skeleton() -> Traversable:
    """The folder of templates. Found beside this package, because importing ``qplug_core.testing`` imports torch."""
    return files("qplug_core").joinpath("testing").joinpath("skeleton")


def _copy(source: Traversable, target: Path, name: str) -> None:
    target.mkdir(parents=True)
    for item in source.iterdir():
        made = target / item.name.replace("NAME", name).removesuffix(SUFFIX)
        if item.is_dir():
            _copy(item, made, name)
        elif item.name.endswith(SUFFIX):
            made.write_text(item.read_text(encoding="utf-8").replace("NAME", name), encoding="utf-8")
