"""vLLM's layers as LayerSpecs: fused parts, tensor parallelism and stored names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

from ...engine.describe import EXPERT_PARTS, FUSED, FUSED_EXPERT
from ...errors import UsageError
from ...layer import LayerSpec, StoredPart

_OTHER = re.compile(r"(^|\.)(visual|vision\w*|audio\w*|image\w*|multi_modal\w*|mm_\w*)(\.|$)")
"""Parts of a multimodal model that quantization at load leaves alone, by vLLM's names."""
Stored = Callable[[str], str]
STACKS = ("gate_up_proj", "down_proj")
"""Names of the tensors that hold the projections of all experts of a layer; their biases end with ``_bias``."""


def linear_spec(layer: Any, prefix: str, packed: dict[str, list[str]], stored: Stored) -> LayerSpec:
    """A linear layer with the rows and columns of this rank.

    :raises UsageError: for a fused layer whose parts vLLM does not name.
    """
    parent, _, leaf = prefix.rpartition(".")
    heights: list[int] = list(layer.output_partition_sizes)
    online = not _OTHER.search(prefix)
    if isinstance(layer, RowParallelLinear):
        rank, width = int(layer.tp_rank), int(layer.input_size_per_partition)
        columns = (rank * width, (rank + 1) * width) if layer.tp_size > 1 else None
        part = (StoredPart(stored(prefix), heights[0]),)
        return LayerSpec(prefix, "linear", heights[0], layer.input_size, (part,), columns=columns, online=online)
    # A replicated layer learns its rank only later, and is whole on each.
    rank, world = (int(layer.tp_rank), int(layer.tp_size)) if hasattr(layer, "input_size_per_partition") else (0, 1)
    copies = [1, *[int(layer.num_kv_head_replicas)] * 2] if isinstance(layer, QKVParallelLinear) else [1] * len(heights)
    names = [f"{parent}.{name}" if parent else name for name in packed.get(leaf, [leaf])]
    cuts = [_cut(n, rank // c, world // c) for n, c in zip(heights, copies, strict=True)]
    alternatives: list[tuple[StoredPart, ...]] = []
    if len(names) == len(heights):
        alternatives.append(
            tuple(_part(stored(name), n, rows, whole) for name, n, (rows, whole) in zip(names, heights, cuts, strict=True))
        )
    elif len(names) > 1:
        raise UsageError(
            f"{prefix} has {len(heights)} parts and vLLM names {len(names)} ({', '.join(names)}); qplug needs one name for each part"
        )
    if len(heights) > 1:
        total, start, fused = sum(whole for _, whole in cuts), 0, []
        for n, ((low, high), whole) in zip(heights, cuts, strict=True):
            fused.append(StoredPart(stored(prefix), n, (start + low, start + high), total))
            start += whole
        alternatives.append(tuple(fused))
        if len(names) == 1 and len(FUSED.get(leaf, ())) == len(heights):
            split = [stored(f"{parent}.{name}") for name in FUSED[leaf]]
            alternatives.append(tuple(_part(s, n, r, w) for s, n, (r, w) in zip(split, heights, cuts, strict=True)))
    return LayerSpec(prefix, "linear", sum(heights), layer.input_size, tuple(alternatives), online=online)


def vocabulary_spec(layer: Any, prefix: str, op: Any, tied_to: str | None, stored: Stored) -> LayerSpec:
    """The head or the embedding with the rows of this rank, without vLLM's padding."""
    shard = layer.shard_indices
    rows = (shard.org_vocab_start_index, shard.org_vocab_end_index)
    part = _part(stored(prefix), rows[1] - rows[0], rows, layer.org_vocab_size)
    kind = "Embedding" if op == "embedding" else "Linear"
    return LayerSpec(prefix, op, part.n, layer.embedding_dim, ((part,),), module_class=kind, tied_to=tied_to)


def expert_specs(layer: Any, prefix: str, stored: Stored) -> list[tuple[LayerSpec, LayerSpec]]:
    """The two projections of every expert of this rank: gate and up rows of this rank, and columns of down."""
    moe = layer.moe_config
    inner, hidden = int(moe.intermediate_size_per_partition_unpadded), int(moe.hidden_dim_unpadded)
    rank, world = int(moe.moe_parallel_config.tp_rank), int(moe.moe_parallel_config.tp_size)
    rows, whole = _cut(inner, rank, world)
    gated = moe.is_act_and_mul
    specs = []
    for e in local_experts(layer):
        up: list[tuple[StoredPart, ...]] = []
        down: list[tuple[StoredPart, ...]] = []
        for gate_name, up_name, down_name in (
            (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name),
            *EXPERT_PARTS,
        ):
            halves = tuple(
                _part(stored(f"{prefix}.{e}.{name}"), inner, rows, whole)
                for name in (gate_name, up_name)
                if name is not None
            )
            up.append(halves if gated else halves[:1])
            down.append((StoredPart(stored(f"{prefix}.{e}.{down_name}"), hidden),))
        for name in FUSED_EXPERT if gated else ():
            fused = stored(f"{prefix}.{e}.{name}")
            low = StoredPart(fused, inner, rows, 2 * whole)
            up.append((low, StoredPart(fused, inner, (whole + rows[0], whole + rows[1]), 2 * whole)))
        columns = rows if world > 1 else None
        height = inner * (2 if gated else 1)
        if gated and layer.activation == MoEActivation.SWIGLUOAI:  # gpt-oss: one stack, and gate and up rows take turns.
            both = _part(stored(f"{prefix}.{STACKS[0]}"), height, (2 * rows[0], 2 * rows[1]), 2 * whole)
            up.append((replace(both, expert=e),))
            down.append((StoredPart(stored(f"{prefix}.{STACKS[1]}"), hidden, expert=e),))
        specs.append(
            (
                LayerSpec(f"{prefix}.{e}.up", "experts", height, hidden, tuple(up)),
                LayerSpec(f"{prefix}.{e}.down", "experts", hidden, whole, tuple(down), columns=columns),
            )
        )
    return specs


def local_experts(layer: Any) -> Sequence[int]:
    """Numbers of the experts that this rank holds."""
    count = range(int(layer.moe_config.num_logical_experts))
    return [e for e in count if layer.expert_map_manager.map_global_to_local(e) != -1]


def _cut(n: int, rank: int, world: int) -> tuple[tuple[int, int], int]:
    """The rows of ``rank`` where each of ``world`` has ``n``, and the rows of all."""
    return (rank * n, (rank + 1) * n), n * world


def _part(name: str, n: int, rows: tuple[int, int], whole: int) -> StoredPart:
    return StoredPart(name, n) if rows == (0, whole) else StoredPart(name, n, rows, whole)
