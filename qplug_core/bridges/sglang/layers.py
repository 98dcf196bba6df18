"""SGLang's layers as LayerSpecs: fused parts, tensor parallelism and stored names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear

from ...engine.describe import EXPERT_PARTS, FUSED, FUSED_EXPERT
from ...errors import UsageError
from ...layer import LayerSpec, Op, StoredPart

Stored = Callable[[str], str]


def part_names(prefix: str, packed: Mapping[str, Any]) -> list[str]:
    """Names of the parts that the layer ``prefix`` fuses; ``[prefix]`` where nothing says that it does."""
    parent, _, leaf = prefix.rpartition(".")
    return [f"{parent}.{name}" if parent else name for name in packed.get(leaf) or FUSED.get(leaf) or (leaf,)]


def linear_spec(layer: Any, prefix: str, heights: Sequence[int], packed: Mapping[str, Any], stored: Stored) -> LayerSpec:
    """A linear layer with the rows and columns of this rank. ``heights``: rows of each part on this rank.

    :raises UsageError: for a layer whose weights are cut on disk, or whose parts nothing names.
    """
    if getattr(layer, "use_presharded_weights", False):
        raise UsageError(
            f"{prefix} expects weights that are cut for each rank on disk, which qplug does not read; give the whole checkpoint"
        )
    rank, world = get_group_rank_size(layer.tp_group)
    if isinstance(layer, RowParallelLinear):
        width = int(layer.input_size_per_partition)
        columns = (rank * width, (rank + 1) * width) if world > 1 else None
        return LayerSpec(
            prefix, "linear", heights[0], layer.input_size, ((StoredPart(stored(prefix), heights[0]),),), columns=columns
        )
    cuts = [_cut(n, rank, world) for n in heights]
    if isinstance(layer, QKVParallelLinear):
        kv_rank, kv_world = get_group_rank_size(layer.kv_tp_group)
        copies = int(layer.num_kv_head_replicas)
        cuts[1:] = [_cut(n, kv_rank // copies, kv_world // copies) for n in heights[1:]]
    names = part_names(prefix, packed)
    alternatives: list[tuple[StoredPart, ...]] = []
    if len(names) == len(heights):
        alternatives.append(
            tuple(_part(stored(m), n, rows, whole) for m, n, (rows, whole) in zip(names, heights, cuts, strict=True))
        )
    elif len(heights) == 1:
        alternatives.append((_part(stored(prefix), heights[0], *cuts[0]),))
    if len(heights) > 1:
        total, start, fused = sum(whole for _, whole in cuts), 0, []
        for n, ((low, high), whole) in zip(heights, cuts, strict=True):
            fused.append(StoredPart(stored(prefix), n, (start + low, start + high), total))
            start += whole
        alternatives.append(tuple(fused))
    return LayerSpec(prefix, "linear", sum(heights), layer.input_size, tuple(alternatives))


def vocabulary_spec(layer: Any, prefix: str, op: Op, tied_to: str | None, stored: Stored) -> LayerSpec:
    """The head or the embedding with the rows of this rank, without SGLang's padding."""
    shard = layer.shard_indices
    rows = (int(shard.org_vocab_start_index), int(shard.org_vocab_end_index))
    part = _part(stored(prefix), rows[1] - rows[0], rows, int(layer.org_vocab_size))
    kind = "Embedding" if op == "embedding" else "Linear"
    return LayerSpec(prefix, op, part.n, layer.embedding_dim, ((part,),), module_class=kind, tied_to=tied_to)


def expert_specs(layer: Any, prefix: str, stored: Stored) -> list[tuple[LayerSpec, LayerSpec]]:
    """The two projections of every expert of this rank: gate and up rows of this rank, and columns of down."""
    inner, hidden = int(layer.intermediate_size_per_partition), int(layer.hidden_size_unpadded)
    rank, world = int(layer.moe_tp_rank), int(layer.moe_tp_size)
    rows, whole = _cut(inner, rank, world)
    gated = bool(layer.moe_runner_config.is_gated)
    specs = []
    for e in local_experts(layer):
        up: list[tuple[StoredPart, ...]] = []
        down: list[tuple[StoredPart, ...]] = []
        for gate_name, up_name, down_name in EXPERT_PARTS:
            halves = (gate_name, up_name) if gated else (up_name,)
            up.append(tuple(_part(stored(f"{prefix}.{e}.{name}"), inner, rows, whole) for name in halves))
            down.append((StoredPart(stored(f"{prefix}.{e}.{down_name}"), hidden),))
        for name in FUSED_EXPERT if gated else ():
            fused = stored(f"{prefix}.{e}.{name}")
            second = (whole + rows[0], whole + rows[1])
            up.append((StoredPart(fused, inner, rows, 2 * whole), StoredPart(fused, inner, second, 2 * whole)))
        columns = rows if world > 1 else None
        height = inner * (2 if gated else 1)
        specs.append(
            (
                LayerSpec(f"{prefix}.{e}.up", "experts", height, hidden, tuple(up)),
                LayerSpec(f"{prefix}.{e}.down", "experts", hidden, whole, tuple(down), columns=columns),
            )
        )
    return specs


def local_experts(layer: Any) -> list[int]:
    """Numbers of the experts that this rank holds, in the order of its own numbers."""
    return [e for e in range(int(layer.num_experts)) if layer._map_global_expert_id_to_local_expert_id(e) != -1]


def _cut(n: int, rank: int, world: int) -> tuple[tuple[int, int], int]:
    """The rows of ``rank`` where each of ``world`` has ``n``, and the rows of all."""
    return (rank * n, (rank + 1) * n), n * world


def _part(name: str, n: int, rows: tuple[int, int], whole: int) -> StoredPart:
    return StoredPart(name, n) if rows == (0, whole) else StoredPart(name, n, rows, whole)
