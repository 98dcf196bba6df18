"""A QuantPlan on a terminal: one row for each group of equal layers, the refused kernels, and the notes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..quant_plan import Decision, QuantPlan
from ..scheme import QuantScheme

WIDTH = 100


def render_plan(plan: QuantPlan, decisions: Sequence[Decision], detailed: bool) -> None:
    """Print ``decisions`` of a plan; ``detailed`` adds every reason for every layer group."""
    console = Console(width=WIDTH if not Console().is_terminal else None, soft_wrap=False, highlight=False)
    console.print(
        f"[bold]{escape(plan.source)}[/]: {escape(plan.method or '16 bit')}, on {plan.device}, {plan.dtype} activations"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("layers", "count", "[N, K]", "scheme", "stored as", "kernel"):
        table.add_column(heading.replace("[", r"\["), overflow="fold")
    for group in plan.groups(decisions):
        kernel = "16 bit" if group.choice is None else group.choice.kernel
        mode = "" if group.choice is None or group.choice.mode == "native" else f" ({group.choice.mode})"
        table.add_row(
            escape(group.name),
            str(len(group.layers)),
            f"{group.n} x {group.k}",
            group.scheme or "-",
            group.stored,
            kernel + mode,
        )
    for name, count, shape in [] if detailed else plan.kept_rows():
        table.add_row(escape(name), str(count), shape, "-", "16 bit", "16 bit")
    console.print(table)
    for cache in plan.caches[:1]:
        console.print(f"KV cache: {QuantScheme(kv=cache.scheme)} in {len(plan.caches)} attention layers")
    taken = plan.taken(decisions)
    if taken:
        console.print("\n[bold]kernels that were taken[/]")
        for kernel, reasons in taken.items():
            console.print(f"  {kernel}: {escape(reasons[0])}" if len(reasons) == 1 else f"  {kernel}")
            for reason in reasons if len(reasons) > 1 else ():
                console.print(f"    {escape(reason)}")
    refused = plan.refused(decisions)
    if refused:
        console.print("\n[bold]kernels that were not taken[/]")
        for kernel, reasons in refused.items():
            shown = reasons if detailed else reasons[:2]
            console.print(f"  {kernel}: {escape('; '.join(shown))}")
    notes = list(plan.all_notes())
    if notes:
        console.print("\n[bold]notes[/]")
        for note in notes:
            console.print(f"  {escape(note)}")
    console.print(f"\nplan {plan.digest[:16]}")
