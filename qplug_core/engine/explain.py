"""The plan of a checkpoint for the reference engine, from headers alone."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch

from ..device import Device
from ..layer import LayerSpec
from ..planner import Planner
from ..quant_plan import QuantPlan
from ..registry import get_registry
from ..repository import open_checkpoint
from ..resolve import Policy
from .attention import kept_attention
from .describe import describe
from .names import StoredNames, left_out
from .skeleton import model_config, skeleton


def explain_checkpoint(
    path: str,
    device: Device | None,
    tp: int,
    dtype: str,
    quantize: str | None,
    kv_cache: str | None = None,
    policy: Policy | None = None,
) -> QuantPlan:
    """What ``load`` would do with ``path`` on ``device``, for rank 0 of ``tp``."""
    source = open_checkpoint(path, get_registry(), headers=True)
    planner = Planner(source, device, dtype, policy, quantize, kv_cache=kv_cache)
    model = skeleton(model_config(source), getattr(torch, dtype))
    described = describe(model, StoredNames(model, source.tensors, planner.model_name))
    planner.config.ignorable.update(left_out(model, source.tensors))
    layers = described.layers if tp == 1 else [shard(layer, model, 0, tp) for layer in described.layers]
    plan = planner.plan(layers, described.slots)
    if device is None or device.vendor == "cpu":
        plan.notes += kept_attention(model, described)
    return plan


def shard(layer: LayerSpec, model: Any, rank: int, world: int) -> LayerSpec:
    """The part of a layer that one rank holds, by the model's own tensor-parallel plan; layers outside of it stay whole."""
    style = next((s for pattern, s in (model.tp_plan or {}).items() if fnmatchcase(layer.name, pattern)), "")
    if style.startswith("colwise"):
        return layer.sharded("N", rank, world)
    return layer.sharded("K", rank, world) if style.startswith("rowwise") else layer
