"""``qplug explain MODEL``: what would load, how, and why not otherwise. Reads headers; no weights."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("model", type=click.Path())
@click.option(
    "--layer", default="*", help="Show only layers whose name matches this shell pattern, with every kernel tried."
)
@click.option("--device", default=None, help="Plan for a named device (sm_90, gfx942, avx512, cpu); default: this machine.")
@click.option("--tp", default=1, type=click.IntRange(min=1), help="Plan rank 0 of this many tensor-parallel ranks.")
@click.option("--dtype", default="bfloat16", type=click.Choice(["float32", "bfloat16", "float16"]), help="Activations.")
@click.option("--quantize", default=None, help="Plan a 16-bit checkpoint quantized at load, W8A16 for example.")
@click.option("--kv-cache", default=None, help="Plan a KV cache of fp8, int8, int4 or nvfp4.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def explain(
    model: str,
    layer: str,
    device: str | None,
    tp: int,
    dtype: str,
    quantize: str | None,
    kv_cache: str | None,
    as_json: bool,
) -> None:
    """Explain how MODEL would load: the scheme, layout and kernel of each layer, and why each other kernel was refused.

    Exit code 3 means that every quantized layer would run on a reference kernel.
    """
    from ..device import Device
    from ..engine.explain import explain_checkpoint
    from ..errors import UsageError

    target = Device.from_name(device) if device else None
    plan = explain_checkpoint(model, target, tp, dtype, quantize, kv_cache)
    decisions = plan.select(layer)
    if not decisions:
        names = ", ".join(d.layer.name for d in plan.decisions[:3])
        raise UsageError(f"no layer of {model} matches {layer!r}; its layers are called {names}, ...")
    if as_json:
        body = plan.to_json()
        body["layers"] = [d.to_json() for d in decisions]
        click.echo(json.dumps(body, indent=2))
    else:
        from .render import render_plan

        render_plan(plan, decisions, detailed=layer != "*")
    if plan.reference_only:
        raise SystemExit(3)
