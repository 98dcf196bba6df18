"""``qplug bench [SCHEME...]``: kernels side by side with bf16, other libraries, and the machine's limit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import UsageError

if TYPE_CHECKING:
    from ..device import Device


def shapes_of(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[tuple[int, int], ...] | None:
    """``4096x4096,11008x4096`` as rows and columns; a click callback."""
    if value is None:
        return None
    try:
        shapes = tuple((int(n), int(k)) for n, k in (word.lower().split("x") for word in value.split(",")))
    except ValueError:
        shapes = ()
    if not shapes or min(min(shape) for shape in shapes) < 1:
        raise click.BadParameter(f"{value!r} was given; rows by columns are needed, such as 4096x4096,11008x4096")
    return shapes


def tokens_of(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """``1,8,512`` as numbers of tokens; a click callback."""
    if value is None:
        return None
    words = [word.strip() for word in value.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise click.BadParameter(f"{value!r} was given; numbers of tokens are needed, such as 1,8,512")
    return tuple(map(int, words))


@click.command()
@click.argument("schemes", metavar="[SCHEME]...", nargs=-1)
@click.option(
    "--shapes",
    callback=shapes_of,
    metavar="NxK,...",
    help="Weights, rows by columns; default 4096x4096,11008x4096,4096x11008.",
)
@click.option("--m", "tokens", callback=tokens_of, metavar="M,...", help="Numbers of tokens; default 1,8,512.")
@click.option("--threads", type=click.IntRange(min=1), default=None, help="CPU threads; default: as many as torch takes.")
@click.option(
    "--device", default=None, help="A device of this machine: cpu, cuda, cuda:1, rocm; default: the first GPU, or the CPU."
)
@click.option(
    "--seconds", type=click.FloatRange(min=0, min_open=True), default=None, help="Of calls for each row; default 0.5."
)
@click.option(
    "--all", "every", is_flag=True, help="Every kind of scheme, not the common ones alone; takes several times as long."
)
@click.option("--quick", is_flag=True, help="A look: one shape of 1024x1024, M of 1 and 8, few calls. No figures to quote.")
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, path_type=Path), default=None, help="Write the report here too."
)
def bench(
    schemes: tuple[str, ...],
    shapes: tuple[tuple[int, int], ...] | None,
    tokens: tuple[int, ...] | None,
    threads: int | None,
    device: str | None,
    seconds: float | None,
    every: bool,
    quick: bool,
    target: Path | None,
) -> None:
    """Measure every kernel that takes SCHEME on this device, in one run with bf16, installed peers, and the machine's limit.

    Times are the 10th percentile of single calls on weights that no cache holds. "x peer" and "x bf16" are how many times
    faster than the fastest peer and than bf16; "of limit" is the machine's best time by this one. Exit code 3: only
    reference kernels ran.
    """
    from ..bench.report import render
    from ..bench.run import SHAPES, TOKENS, parsed, run_options
    from ..bench.run import bench as run
    from ..registry import get_registry

    if every and schemes:
        raise UsageError(f"--all was given together with {' '.join(schemes)}; name schemes, or give --all alone")
    for name in schemes:
        parsed(name)  # Before anything is measured.
    if target is not None and not target.parent.is_dir():
        raise UsageError(f"{target} was named for the report and its folder does not exist; create it, or name another")
    with run_options(threads), telling() as tell:
        report = run(
            get_registry(),
            schemes,
            shapes or ((1024, 1024),) if quick else shapes or SHAPES,
            tokens or (1, 8) if quick else tokens or TOKENS,
            device=chosen(device),
            seconds=seconds or (0.02 if quick else 0.5),
            quick=quick,
            every=every,
            tell=tell,
        )
    render(report)
    if target is not None:
        target.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
        click.echo(f"written: {target}", err=True)
    if report.reference_only:
        raise SystemExit(3)


def chosen(name: str | None) -> Device:
    """The device that was asked for, or the first of this machine."""
    from ..device import Device

    return Device.from_name(name) if name else Device.current()


@contextmanager
def telling() -> Iterator[Callable[[str], None]]:
    """Something to tell what is being done: a line on a terminal that changes, and nothing where stderr is piped."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("measuring") as status:
        yield lambda text: status.update(escape(text))
