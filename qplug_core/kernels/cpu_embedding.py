"""``core.cpu_embedding``: rows of a quantized embedding on x86 CPUs, decoded from codes that are held at their own width. See ``embedding.c``."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ..device import Device
from ..kernel import Kernel, PackedWeight, Problem
from ..packing import pack as pack_bits
from ..scheme import NUMBER_TYPES
from ..support import Refusal
from ..weight import OpaqueWeight, QuantWeight
from . import builder
from .torch_c import address, operation


class CpuEmbedding(Kernel):
    """Every weight of the hub whose groups are columns side by side; rows are bit-equal to the reference."""

    name = "core.cpu_embedding"

    def supports(self, problem: Problem, device: Device) -> list[Refusal]:
        """Refuses opaque encodings, act order and sparsity, and machines without AVX2 or compiler."""
        refusals = builder.refusals("embedding", device)
        if problem.op != "embedding":
            refusals.append(Refusal("op", f"operation {problem.op}", "embedding"))
        weight = problem.scheme.weight
        if weight is None or problem.encoding or NUMBER_TYPES[weight.dtype].bits > 8 or weight.dtype == "ccq2":
            have = f"encoding {problem.encoding}" if problem.encoding else f"scheme {problem.scheme}"
            refusals.append(Refusal("scheme", have, "plain codes of at most 8 bits"))
        if problem.scheme.act_order:
            refusals.append(Refusal("act_order", "columns in groups by an index", "columns in groups by position"))
        if problem.scheme.sparsity:
            refusals.append(Refusal("scheme", f"{problem.scheme.sparsity} sparsity", "dense weights"))
        return refusals

    def pack(self, weight: QuantWeight | OpaqueWeight, out: PackedWeight | None = None) -> PackedWeight:
        """``codes`` uint8 ``[N, K*bits/8]``, ``table`` float32 ``[2**bits]``, and float32 grids; see ``embedding.c``."""
        assert isinstance(weight, QuantWeight)
        assert weight.scheme.weight is not None
        width = weight.scheme.weight.bits
        if weight.global_scale is not None and weight.global_scale.ndim >= 2:
            weight = weight.regroup(1, weight.block[1])
        n, k, (rows, group) = weight.n, weight.k, weight.block
        bits = width if width in (2, 4) else 8
        codes = weight.codes.view(torch.uint8).bitwise_and(2**bits - 1)
        if bits < 8:
            codes = pack_bits(torch.nn.functional.pad(codes, (0, -k % (8 // bits))), bits, torch.uint8)
        tensors = {"codes": codes.contiguous(), "table": _table(weight, bits), "scales": weight.scale_values().contiguous()}
        for name in ("zeros", "shift"):
            if (value := getattr(weight, name)) is not None:
                tensors[name] = value.float().contiguous()
        tensors = {name: t.clone() if t.data_ptr() == weight.scales.data_ptr() else t for name, t in tensors.items()}
        packed = PackedWeight(
            self.name, n, k, tensors, {"bits": bits, "rows": rows or max(n, 1), "group": group or max(k, 1)}
        )
        return packed if out is None else out.refill(packed)

    def apply(self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """Row indices ``x [*]``, a LongTensor, to float32 rows ``[*, K]``; the caller rounds to its dtype.

        :raises IndexError: for a row that does not exist.
        """
        t, meta = packed.tensors, packed.meta
        grids = (t["scales"], t.get("zeros"), t.get("shift"))
        rows: Tensor = embedding(x, t["codes"], t["table"], *grids, packed.k, meta["group"], meta["rows"], meta["bits"])
        return rows if bias is None else rows + bias


def _table(weight: QuantWeight, bits: int) -> Tensor:
    """float32 value of each field of ``bits``."""
    every = torch.arange(2**bits)
    if weight.codebook is not None:
        return torch.nn.functional.pad(weight.codebook.float(), (0, 2**bits - len(weight.codebook)))
    if weight.codes.dtype == torch.int8:
        return torch.where(every < 2 ** (bits - 1), every, every - 2**bits).float()
    return every.float() if weight.codes.dtype == torch.uint8 else every.to(torch.uint8).view(weight.codes.dtype).float()


@functools.cache
def _function() -> ctypes._NamedFuncPointer:
    function = builder.library("embedding").qplug_embedding
    function.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_long] * 5 + [ctypes.c_int] * 2
    function.restype = None
    return function


def _run(
    ids: Tensor,
    codes: Tensor,
    table: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    shift: Tensor | None,
    k: int,
    group: int,
    rows: int,
    bits: int,
) -> Tensor:
    ids = ids.long().contiguous()
    if ids.numel():
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= len(codes):
            raise IndexError(f"rows {low} to {high} were asked for; the embedding has rows 0 to {len(codes) - 1}")
    found = torch.empty(*ids.shape, k)
    _function()(
        found.data_ptr(), ids.data_ptr(), codes.data_ptr(), table.data_ptr(), scales.data_ptr(), address(zeros), address(shift), ids.numel(),
        k, scales.shape[-1], group, rows, bits, torch.get_num_threads(),
    )  # fmt: skip
    return found


def _fake(
    ids: Tensor,
    codes: Tensor,
    table: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    shift: Tensor | None,
    k: int,
    group: int,
    rows: int,
    bits: int,
) -> Tensor:
    return ids.new_empty((*ids.shape, k), dtype=torch.float32)


embedding = operation(
    "embedding(Tensor ids, Tensor codes, Tensor table, Tensor scales, Tensor? zeros, Tensor? shift, int k, int group, int rows, int bits)"
    " -> Tensor",
    _run,
    _fake,
)
