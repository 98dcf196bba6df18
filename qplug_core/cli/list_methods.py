"""``qplug list-methods``: the capability report."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from ..device import REPORTED, Device
from ..layer import OPS, Op
from ..matrix import CapabilityMatrix, Cell, scheme_cell
from ..registry import Registry, get_registry
from ..samples import schemes_of

if TYPE_CHECKING:
    from rich.console import Console

SHORT = {"native": "native", "weight-only": "w-only", "emulated": "emul.", "reference": "ref.", "no": "-"}


@click.command("list-methods")
@click.option("--device", default=None, help="A named device (sm_90, gfx942, avx512_vnni, cpu); default: this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole matrix as JSON.")
@click.option("--markdown", is_flag=True, help="Print the whole matrix as a Markdown table.")
@click.option("--schemes", is_flag=True, help="Report schemes instead of checkpoint formats, on every reported device.")
@click.option("--engines", is_flag=True, help="Report which engine serves which method, and the test that shows it.")
@click.option("--op", type=click.Choice(OPS), default=None, help="Report one operation instead of each method's first.")
def list_methods(device: str | None, as_json: bool, markdown: bool, schemes: bool, engines: bool, op: Op | None) -> None:
    """List what the installed plugins can do: on this machine, or on a named device.

    native: does what the scheme says on units made for it. weight-only: leaves activations at 16 bit. emulated: quantizes
    them, multiplies wider. reference: runs everywhere, slowly. Proof: measured on that hardware, compiled for it, or declared.
    """
    registry = get_registry()
    if engines:
        _engines(registry, as_json, markdown)
        return
    here = Device.from_name(device) if device else Device.current()
    column = device or here.arch
    if schemes:
        click.echo(
            schemes_markdown(registry, [(column, here)] if device else [(n, Device.from_name(n)) for n in REPORTED], op)
        )
        return
    if as_json or markdown:
        named = [(name, Device.from_name(name)) for name in REPORTED]
        cpu = [] if device else [("cpu", Device.cpu())]
        matrix = CapabilityMatrix.of(
            registry, [*cpu, *([(column, here)] if column not in (*REPORTED, "cpu") else []), *named]
        )
        click.echo(as_markdown(matrix, op) if markdown else json.dumps(as_json_data(matrix, registry, here), indent=2))
        return
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 100, highlight=False)
    _render(console, CapabilityMatrix.of(registry, [(column, here)]), registry, here, op)


def _engines(registry: Registry, as_json: bool, markdown: bool) -> None:
    from rich.console import Console

    from ..engines import EngineMatrix
    from .engines import engines_markdown, render_engines

    matrix = EngineMatrix.of(registry)
    if as_json:
        click.echo(json.dumps(matrix.to_json(), indent=2))
    elif markdown:
        click.echo(engines_markdown(matrix))
    else:
        render_engines(Console(width=None if Console().is_terminal else 100, highlight=False), matrix)


def as_json_data(matrix: CapabilityMatrix, registry: Registry, machine: Device) -> dict[str, object]:
    """The report as data, ``"schema": 1``."""
    return {
        "schema": 1,
        "machine": machine.to_json(),
        "plugins": [row.to_json() for row in registry.plugins],
        "conflicts": [str(c) for c in registry.conflicts],
        "methods": [m.to_json(matrix.devices) for m in matrix.methods],
    }


def as_markdown(matrix: CapabilityMatrix, op: Op | None) -> str:
    """Methods as rows, devices as columns, status and proof in each cell."""
    lines = ["| method | schemes | " + " | ".join(matrix.devices) + " |", "|---" * (len(matrix.devices) + 2) + "|"]
    for method in matrix.methods:
        cells = " | ".join(_word(method.cell(device, op)) for device in matrix.devices)
        lines.append(f"| {method.name} | {' '.join(method.schemes)} | {cells} |")
    return "\n".join(lines)


def schemes_markdown(registry: Registry, devices: list[tuple[str, Device]], op: Op | None) -> str:
    """Schemes of all formats as rows, devices as columns: what the best kernel of any plugin does."""
    found = dict.fromkeys(s for entry in registry.formats for s in schemes_of(entry.decl.schemes))
    lines = ["| scheme | " + " | ".join(name for name, _ in devices) + " |", "|---" * (len(devices) + 1) + "|"]
    for scheme in sorted(found, key=str):
        cells = [_word(scheme_cell(registry, scheme, op or "linear", device, name)) for name, device in devices]
        lines.append(f"| {scheme} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _word(cell: Cell) -> str:
    return cell.status if cell.status in ("no", "reference") else f"{_share(cell.status, cell)}, {cell.proof}"


def _share(word: str, cell: Cell) -> str:
    """A status, with how many of the scheme variants have it where not all do."""
    whole = cell.fast == cell.total or cell.status in ("no", "reference")
    return word if whole else f"{word} {cell.fast}/{cell.total}"


def _render(console: Console, matrix: CapabilityMatrix, registry: Registry, device: Device, op: Op | None) -> None:
    from rich.markup import escape
    from rich.table import Table

    console.print(f"[bold]methods on {escape(str(device))}[/]")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("method", "schemes", "load", *OPS, "kernel", "proof"):
        table.add_column({"kv_cache": "kv", "embedding": "embed"}.get(heading, heading), overflow="fold")
    column = matrix.devices[0]
    reasons = []
    for method in matrix.methods:
        best = method.cell(column, op)
        load = "/".join(word[:3] for word, able in method.load.items() if able)
        statuses = [_share(SHORT[cell.status], cell) for cell in (method.cells[each, column] for each in OPS)]
        table.add_row(method.name, " ".join(method.schemes), load, *statuses, best.kernel, best.proof)
        if best.reason:
            reasons.append(f"  {method.name}: {best.reason}")
    console.print(table)
    console.print(
        "load: pre = prequantized, onl = online from 16 bit, off = written offline; ref. = reference kernel, slow; "
        "native 3/8 = three of eight scheme variants, the others run on the reference kernel",
        style="dim",
    )
    for reason in reasons:
        console.print(escape(reason))
    console.print("\n[bold]plugins[/]")
    for row in registry.plugins:
        reason = f": {row.reason}" if row.reason else ""
        console.print(escape(f"  {row.name} {row.version} ({row.distribution}) {row.state}{reason}"))
    for conflict in registry.conflicts:
        console.print(escape(f"  conflict: {conflict}"))
