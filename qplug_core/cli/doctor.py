"""``qplug doctor``: what is wrong here, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil

import click

from ..decl import Rank
from ..device import local_devices
from ..registry import Registry, get_registry

PACKAGES = ("torch", "triton", "transformers", "safetensors", "pluggy")


@click.command()
@click.option("--verbose", is_flag=True, help="Show the tracebacks of what is broken.")
def doctor(verbose: bool) -> None:
    """Check the environment, the plugins and their kernels.

    Exit code 4: a plugin is broken, incompatible or in conflict. 3: only reference kernels would run. 0: all is well.
    """
    registry = get_registry()
    click.echo(f"python {platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        click.echo(f"  {name} {_version(name)}")
    click.echo(f"  C compiler {shutil.which('cc') or 'not found: install gcc for the CPU kernels'}")
    click.echo("devices")
    for device in local_devices():
        click.echo(f"  {device}: {', '.join(sorted(device.features)) or 'no special units'}")
    bad = _plugins(registry, verbose)
    fast = _kernels(registry, verbose)
    if bad:
        click.echo(f"{bad} thing{'s' * (bad > 1)} to repair", err=True)
        raise SystemExit(4)
    if not fast:
        click.echo(
            "only reference kernels run here: install a plugin with kernels for this device, or what they lack", err=True
        )
        raise SystemExit(3)
    click.echo("all is well")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _plugins(registry: Registry, verbose: bool) -> int:
    click.echo("plugins")
    bad = 0
    for row in registry.plugins:
        click.echo(f"  {row.name} {row.version} ({row.distribution}): {row.state}{f', {row.reason}' if row.reason else ''}")
        bad += row.state in ("broken", "incompatible")
        if verbose and row.traceback:
            click.echo(_indented(row.traceback))
    for conflict in registry.conflicts:
        click.echo(f"  {conflict}")
    return bad + len(registry.conflicts)


def _kernels(registry: Registry, verbose: bool) -> int:
    """Print every kernel with what keeps it from running here; the number of fast ones that do run."""
    click.echo("kernels")
    fast = 0
    for entry in registry.kernels:
        decl = entry.decl
        reasons = []
        if not any(device.matches_any(decl.devices) for device in local_devices()):
            reasons.append(f"no device here is {' or '.join(decl.devices)}")
        reasons += [str(refusal) for refusal in registry.kernel_requirements(decl)]
        if not reasons and (failed := registry.load_refusal(decl)) is not None:
            reasons.append(str(failed))
            if verbose:
                click.echo(_indented(registry.failures.get(decl.name, "")))
        fast += not reasons and decl.rank != Rank.REFERENCE
        click.echo(f"  {decl.name}: {'; '.join(reasons) or 'runs'}")
    return fast


def _indented(text: str) -> str:
    return "\n".join(f"      {line}" for line in text.splitlines())
