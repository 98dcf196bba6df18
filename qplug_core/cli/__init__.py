"""``qplug``: the command line. Commands are imported when they are called, so that ``list-methods`` imports no torch."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from ..errors import QplugError

COMMANDS = {
    "list-methods": "list_methods:list_methods",
    "explain": "explain:explain",
    "generate": "generate:generate",
    "quantize": "quantize:quantize",
    "bench": "bench:bench",
    "tune": "tune:tune",
    "doctor": "doctor:doctor",
    "new-plugin": "new_plugin:new_plugin",
}
"""Command name to ``module:function`` in this package."""


class LazyGroup(click.Group):
    """A group that imports a command when it is asked for, and prints a QplugError as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, function = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(f".{module}", __name__), function)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; exit codes: 0 done, 2 usage, 3 reference kernels only, 4 cannot load."""
        try:
            return super().invoke(ctx)
        except QplugError as error:
            click.echo(f"qplug: {error}", err=True)
            ctx.exit(error.exit_code)
        except BrokenPipeError:
            # The reader went away, as head does. Python would complain again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qplug-core", prog_name="qplug")
def main() -> None:
    """Quantization methods for LLM inference engines, from separately installed packages."""
