"""The reference kernel of embeddings: dequantize the rows that are asked for."""

from __future__ import annotations

from torch import Tensor

from ..kernel import PackedWeight
from .linear import ReferenceLinear


class ReferenceEmbedding(ReferenceLinear):
    """Rows of a quantized embedding ``[N, K]``; N is the vocabulary."""

    name = "core.reference_embedding"

    def apply(self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """Row indices ``x [*]``, a LongTensor, to float32 rows ``[*, K]``; the caller rounds to its dtype."""
        rows: Tensor = packed.meta["weight"].dequantize_rows(x)
        return rows if bias is None else rows + bias
