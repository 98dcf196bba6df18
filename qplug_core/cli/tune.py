"""``qplug tune [MODEL | SCHEME]...``: measure kernels, so that the choice between them is no guess."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .bench import chosen, shapes_of, telling, tokens_of

if TYPE_CHECKING:
    from ..kernel import Problem
    from ..tuning import Verdict


@click.command()
@click.argument("targets", metavar="[MODEL | SCHEME]...", nargs=-1, required=True)
@click.option(
    "--shapes", callback=shapes_of, metavar="NxK,...", help="Weights of a SCHEME; default 4096x4096,11008x4096,4096x11008."
)
@click.option(
    "--m",
    "tokens",
    callback=tokens_of,
    metavar="M,...",
    default="1,8,512",
    show_default=True,
    help="Numbers of tokens to judge by.",
)
@click.option("--dtype", default="bfloat16", type=click.Choice(["float32", "bfloat16", "float16"]), help="Activations.")
@click.option("--tp", default=1, type=click.IntRange(min=1), help="Shapes of rank 0 of this many tensor-parallel ranks.")
@click.option("--quantize", default=None, help="What a 16-bit MODEL is quantized to at load.")
@click.option("--threads", type=click.IntRange(min=1), default=None, help="CPU threads; default: as many as torch takes.")
@click.option("--device", default=None, help="A device of this machine; default: the first GPU, or the CPU.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=0.3, help="Of calls for each kernel and M.")
def tune(
    targets: tuple[str, ...],
    shapes: tuple[tuple[int, int], ...] | None,
    tokens: tuple[int, ...],
    dtype: str,
    tp: int,
    quantize: str | None,
    threads: int | None,
    device: str | None,
    seconds: float,
) -> None:
    """Measure the kernels that take each layer of MODEL, or weights of SCHEME, and write the tuning file of this device.

    From then on the fastest is taken where several fit: by the time of 128 tokens at each M, which are single calls for M of 128
    and more. A pin still decides first. QPLUG_TUNING names another file; QPLUG_TUNING=0 ignores it.
    """
    from ..bench.run import SHAPES, run_options
    from ..bench.tune import existing, problems_of
    from ..bench.tune import tune as run
    from ..registry import get_registry

    where = chosen(device)
    path, old, note = existing(where)

    def measured(problem: Problem, verdict: Verdict) -> None:
        click.echo(f"{problem.op} {problem.scheme} [{problem.n}, {problem.k}] {verdict.kernel}: {verdict.why()}")

    with run_options(threads), telling() as tell:
        problems = problems_of(targets, shapes or SHAPES, dtype, where, tp, quantize)
        found, notes = run(get_registry(), problems, tokens, device=where, seconds=seconds, tell=tell, measured=measured)
    for text in filter(None, [note, *notes]):
        click.echo(f"note: {text}", err=True)
    if not found.measured and not found.tiles:
        click.echo("nothing was measured, and nothing written", err=True)
        return
    (found.merged(old) if old else found).write(path)
    tiles = f", tiles of {len(found.tiles)}" if found.tiles else ""
    click.echo(f"{path}: {len(found.measured)} shapes measured{tiles}")
