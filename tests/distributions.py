"""Throwaway distributions for tests of discovery."""

from __future__ import annotations

from pathlib import Path

GOOD = """
from qplug_core.decl import FormatDecl, KernelDecl
from qplug_core.hookspecs import hookimpl
API = "1.0"
@hookimpl
def qplug_formats():
    return [FormatDecl("{name}", impl="{package}.code:Format", detects=("{name}",), layouts=("{name}",), schemes=("W8A16 channel",))]
@hookimpl
def qplug_kernels():
    return [KernelDecl("{name}.fast", impl="{package}.code:Kernel", ops=("linear",), schemes=("W8A16 channel",), devices=("any",), rank=70)]
"""


def install(folder: Path, name: str, source: str = GOOD, distribution: str = "", claims: str = "") -> None:
    """A distribution with one plugin, as pip would leave it in ``folder``; ``claims``: the name that it declares."""
    distribution = distribution or f"dist-{name}"
    package = distribution.replace("-", "_")
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text("")
    (folder / package / "plugin.py").write_text(source.replace("{name}", claims or name).replace("{package}", package))
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[qplug.plugins]\n{name} = {package}.plugin\n")
    (info / "RECORD").write_text("")
