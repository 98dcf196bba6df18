"""``qplug quantize MODEL OUT --scheme SCHEME``: a quantized checkpoint from a 16-bit one."""

from __future__ import annotations

import sys

import click


@click.command()
@click.argument("model", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--scheme", required=True, help="What to make of linear layers and experts: W4A16_g128, Wfp8Afp8, wint8, ...")
@click.option("--algorithm", default=None, help="A quantizer that needs no data; default: the one that loading takes.")
@click.option("--format", "format_name", default=None, help="What to write; default: the first that stores it without loss.")
def quantize(model: str, out: str, scheme: str, algorithm: str | None, format_name: str | None) -> None:
    """Quantize MODEL, a 16-bit checkpoint, into the new folder OUT.

    The weights are those of `qplug generate MODEL --quantize SCHEME`, bit for bit. OUT appears when it is whole.
    """
    from ..offline import quantize as run

    done = run(model, out, scheme=scheme, algorithm=algorithm, format=format_name, progress=sys.stderr.isatty())
    why = "as asked" if format_name else "the first format that stores it without loss"
    click.echo(f"{done.path}: {done.layers} layers as {' and '.join(done.schemes)}, stored as {done.format} ({why})")
    click.echo(f"{done.nbytes_before / 1e6:.2f} MB of weights before, {done.nbytes / 1e6:.2f} MB now")
    for note in done.notes:
        click.echo(f"note: {note}", err=True)
