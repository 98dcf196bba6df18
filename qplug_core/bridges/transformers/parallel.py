"""Tensor parallelism: the rows and columns of each layer that this rank of a transformers model holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ...engine.describe import Description, up_name
from ...errors import UsageError
from ...layer import LayerSpec, StoredPart

COLUMNS = ("colwise", "colwise_rep", "colwise_gather_output")
ROWS = ("rowwise", "rowwise_rep", "rowwise_split_input")
EXPERTS = "moe_tp_experts"


def world_of(model: Any) -> tuple[int, int]:
    """Rank and number of ranks that share every layer; (0, 1) for a model that is not distributed.

    :raises UsageError: for a kind of parallelism that cuts anything but layers.
    """
    config = getattr(model.config, "distributed_config", None)
    if config is None:
        return 0, 1
    sizes = {name: int(getattr(config, f"{name}_size", 1) or 1) for name in ("tp", "pp", "ep", "dp")}
    if others := [f"{name}_size={size}" for name, size in sizes.items() if name != "tp" and size > 1]:
        raise UsageError(f"{', '.join(others)} was asked for; qplug loads a quantized model with tp_size alone")
    if sizes["tp"] == 1:
        return 0, 1
    import torch.distributed as dist

    return dist.get_rank() % sizes["tp"], sizes["tp"]


def plan_of(model: Any, world: int) -> dict[str, str]:
    """Styles by name of a module or parameter; empty for one rank."""
    return {} if world == 1 else dict(model._resolve_parallel_plans(model.config.distributed_config)[0])


def local_layers(model: Any, described: Description, plan: dict[str, str], rank: int, world: int) -> list[LayerSpec]:
    """The layers of ``described`` as this rank holds them, by the model's own plan.

    :raises UsageError: for a style that qplug has no cut for, or a length that the ranks do not divide.
    """
    if world == 1:
        return described.layers
    of_expert = {f"{name}.{e}.": name for name, count in described.experts.items() for e in range(count)}
    local = []
    for layer in described.layers:
        prefix, _, leaf = layer.name.rpartition(".")
        module = of_expert.get(f"{prefix}.")
        if layer.op == "experts" and module is not None:
            local.append(_expert(model.get_submodule(module), module, layer, leaf, plan, rank, world))
        else:
            local.append(_cut(layer, plan.get(layer.name, plan.get(f"{layer.name}.weight", "")), rank, world))
    return local


def _cut(layer: LayerSpec, style: str, rank: int, world: int) -> LayerSpec:
    if style in ("", "replicate") or layer.op == "kv_cache":
        return layer
    if style not in (*COLUMNS, *ROWS) or layer.op == "embedding":
        # Not an error yet: where the layer turns out to be 16 bit, transformers cuts it itself.
        return layer
    axis, length = ("N", layer.n) if style in COLUMNS else ("K", layer.k)
    if length % world:
        raise UsageError(
            f"{layer.name} has {length} {'rows' if axis == 'N' else 'columns'}, which {world} ranks do not divide"
        )
    return layer.sharded("N" if axis == "N" else "K", rank, world)


def check_style(plan: dict[str, str], layer: LayerSpec) -> None:
    """Refuse a quantized layer whose style qplug has no cut for.

    :raises UsageError: naming the style.
    """
    style = "" if layer.op == "experts" else plan.get(layer.name, "")
    if style not in ("", "replicate", *COLUMNS, *ROWS) or (layer.op == "embedding" and style):
        raise UsageError(
            f"{layer.name} is quantized and the model's plan cuts it {style!r}, which qplug does not; load it with tp_size=1, or override "
            "its rule in DistributedConfig(tp_plan=...)"
        )


def _expert(
    module: nn.Module, name: str, layer: LayerSpec, leaf: str, plan: dict[str, str], rank: int, world: int
) -> LayerSpec:
    if plan.get(name, "") != EXPERTS:
        return layer
    if not getattr(module, "is_concatenated", True) or getattr(module, "down_proj_bias", None) is not None:
        raise UsageError(f"{name} interleaves its halves or has biases, which qplug does not cut; load it with tp_size=1")
    length = layer.k if leaf == "down_proj" else layer.n // (2 if up_name(module) == "gate_up_proj" else 1)
    if length % world:
        raise UsageError(f"{layer.name} is {length} wide, which {world} ranks do not divide")
    if leaf == "down_proj":
        return layer.sharded("K", rank, world)
    halves = [_halves(parts, layer.n) if up_name(module) == "gate_up_proj" else parts for parts in layer.alternatives]
    return replace(layer, stored=tuple(halves)).sharded("N", rank, world)


def _halves(parts: Sequence[StoredPart], n: int) -> tuple[StoredPart, ...]:
    """Gate and up as two parts, where they are stored as one: each is cut by itself."""
    if len(parts) > 1:
        return tuple(parts)
    (part,) = parts
    half = n // 2
    return tuple(replace(part, n=half, rows=(start, start + half), stored_n=n) for start in (0, half))
