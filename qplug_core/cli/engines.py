"""``qplug list-methods --engines``: method by engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engines import Engine, EngineMatrix, Proof

if TYPE_CHECKING:
    from rich.console import Console


def engines_markdown(matrix: EngineMatrix) -> str:
    """Methods as rows, engines as columns; each proof by its test, with the error and the contrast."""
    lines = [
        "| method | " + " | ".join(_heading(e) for e in matrix.engines) + " |",
        "|---" * (len(matrix.engines) + 1) + "|",
    ]
    for method in matrix.methods:
        cells = ["<br>".join(_line(p) for p in matrix.proofs(method, e)) or matrix.status(method, e) for e in matrix.engines]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def render_engines(console: Console, matrix: EngineMatrix) -> None:
    """A table of what is proven, then every proof and every reason against one."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("method")
    for engine in matrix.engines:
        table.add_column(escape(_heading(engine)), overflow="fold")
    for method in matrix.methods:
        table.add_row(method, *(_cell(matrix, method, engine) for engine in matrix.engines))
    console.print(table)
    console.print(
        "proven n = by n tests that ran the engine and compared its numbers; refused = a test shows the sentence; not run = nobody looked",
        style="dim",
    )
    for engine in matrix.engines:
        console.print(f"\n[bold]{escape(engine.name)}[/] {escape(_about(engine))}")
        for sentence in engine.not_run:
            console.print(escape(f"  not run: {sentence}"))
        for method in matrix.methods:
            for proof in matrix.proofs(method, engine):
                console.print(escape(f"  {method}, {_line(proof)}"))


def _heading(engine: Engine) -> str:
    return f"{engine.name} {engine.proven}".rstrip()


def _about(engine: Engine) -> str:
    ran = f"{engine.proven}, {engine.date}, {engine.machine}".strip(", ") if engine.proven else "no test run is on record"
    takes = f"; the bridge takes {engine.takes}" if engine.takes else ""
    return f"{ran}{takes}; {f'{engine.installed} is installed here' if engine.installed else 'not installed here'}"


def _cell(matrix: EngineMatrix, method: str, engine: Engine) -> str:
    status = matrix.status(method, engine)
    return f"proven {sum(not proof.refused for proof in matrix.proofs(method, engine))}" if status == "proven" else status


def _line(proof: Proof) -> str:
    if proof.refused:
        return f"{proof.feature}: refused ({proof.refused}), {proof.test}"
    return f"{proof.feature}: {proof.error:.0e}, contrast {proof.contrast:.0e}, {proof.test}"
