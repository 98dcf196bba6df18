"""``qplug generate MODEL --prompt TEXT``: the reference engine, streaming."""

from __future__ import annotations

import sys

import click


@click.command()
@click.argument("model", type=click.Path())
@click.option("--prompt", required=True, help="Text to continue; '-' reads it from standard input.")
@click.option("--max-new-tokens", default=64, type=click.IntRange(min=1), show_default=True)
@click.option("--quantize", default=None, help="Quantize a 16-bit checkpoint while it loads, to W8A16 for example.")
@click.option(
    "--kv-cache", default=None, help="Keep keys and values as fp8, int8, int4 or nvfp4; 16bit ignores the checkpoint's own."
)
@click.option("--dtype", default="bfloat16", type=click.Choice(["float32", "bfloat16", "float16"]), show_default=True)
@click.option("--kernels", default="auto", type=click.Choice(["auto", "reference"]), show_default=True)
@click.option("--stop", multiple=True, help="End before this text; may be given several times.")
@click.option("--temperature", default=0.0, type=click.FloatRange(min=0), show_default=True, help="0 is greedy.")
@click.option("--top-p", default=1.0, type=click.FloatRange(0, 1), show_default=True)
@click.option("--seed", default=None, type=int, help="Makes sampling repeatable.")
def generate(
    model: str,
    prompt: str,
    max_new_tokens: int,
    quantize: str | None,
    kv_cache: str | None,
    dtype: str,
    kernels: str,
    stop: tuple[str, ...],
    temperature: float,
    top_p: float,
    seed: int | None,
) -> None:
    """Load MODEL and continue a prompt; text streams to standard output.

    Exit code 3 means that every quantized layer ran on a reference kernel.
    """
    from ..engine.engine import load

    if prompt == "-":
        prompt = sys.stdin.read()
    engine = load(model, dtype=dtype, quantize=quantize, kv_cache=kv_cache, kernels=kernels, progress=sys.stderr.isatty())
    options = {"stop": stop, "temperature": temperature, "top_p": top_p, "seed": seed}
    for piece in engine.generate(prompt, max_new_tokens, stream=True, **options):  # type: ignore[arg-type]
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()
    if engine.cache_bytes_per_token is not None:
        click.echo(f"KV cache: {engine.cache_bytes_per_token} bytes per token", err=True)
    for note in engine.notes:
        click.echo(f"note: {note}", err=True)
    if engine.plan.reference_only and kernels == "auto":
        click.echo("note: every quantized layer ran on a reference kernel, which is slow; see `qplug explain`", err=True)
        raise SystemExit(3)
