"""LayerSpec: all that an engine must say of one layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Op = Literal["linear", "experts", "embedding", "lm_head", "kv_cache"]
OPS: tuple[Op, ...] = ("linear", "experts", "embedding", "lm_head", "kv_cache")


@dataclass(frozen=True)
class StoredPart:
    """Where some rows of a layer are found in a checkpoint.

    ``name``: the stored module name. ``n``: rows that this part supplies. ``rows``: the range of the stored module's
    rows, where that module is larger (fused on disk, split in the model); None takes it whole. ``stored_n``: rows of
    the stored module as a whole. ``expert``: index along the E axis of tensors that hold all experts at once.
    ``transposed``: a 16-bit weight is stored ``[K, N]`` (gpt-oss, Llama 4).
    """

    name: str
    n: int
    rows: tuple[int, int] | None = None
    stored_n: int | None = None
    expert: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a model, as an engine describes it.

    name
        The engine's own dotted name. For ``op="experts"`` one LayerSpec is one projection of one expert.
    op, n, k
        Operation; rows that this rank holds; columns as stored.
    columns
        The columns ``(k0, k1)`` that this rank holds; None holds all. (A cut of rows is said by ``StoredPart.rows``.)
    stored
        Alternatives in order of preference, each a sequence of parts that are stacked along N. The first whose
        tensors are in the checkpoint is taken. Empty: ``name`` itself.
    names
        Further names under which the rules of a config may mean this layer (the engine's name is always one).
    module_class
        Class name that class-wide rules (``"Linear"``) are matched against.
    tied_to
        Name of the layer that owns the weight, where it is shared.
    online
        False for a layer that quantization at load leaves at 16 bit: the vision part of a multimodal model.
    """

    name: str
    op: Op
    n: int
    k: int
    stored: tuple[tuple[StoredPart, ...], ...] = ()
    names: tuple[str, ...] = ()
    module_class: str = "Linear"
    tied_to: str | None = None
    columns: tuple[int, int] | None = None
    online: bool = True

    @property
    def alternatives(self) -> tuple[tuple[StoredPart, ...], ...]:
        """``stored``, or the layer's own name where nothing was said."""
        return self.stored or ((StoredPart(self.name, self.n),),)

    @property
    def local_k(self) -> int:
        """Columns on this rank."""
        return self.k if self.columns is None else self.columns[1] - self.columns[0]

    def sharded(self, axis: Literal["N", "K"], rank: int, world: int) -> LayerSpec:
        """The part of this whole layer that ``rank`` of ``world`` holds: rows of each part (column parallel), or columns.

        Lengths that do not divide are cut as evenly as whole rows allow.
        """
        if axis == "K":
            return replace(self, columns=_cut(self.k, rank, world))
        alternatives = []
        for parts in self.alternatives:
            cut = []
            for part in parts:
                start, stop = _cut(part.n, rank, world)
                offset = part.rows[0] if part.rows else 0
                rows = (offset + start, offset + stop)
                cut.append(replace(part, n=stop - start, rows=rows, stored_n=part.stored_n or part.n))
            alternatives.append(tuple(cut))
        return replace(self, n=sum(p.n for p in alternatives[0]), stored=tuple(alternatives))


def _cut(length: int, rank: int, world: int) -> tuple[int, int]:
    return length * rank // world, length * (rank + 1) // world


@dataclass(frozen=True)
class PlainSlot:
    """A parameter or persistent buffer that stays as it is: a norm, a bias, a router, a layer left at 16 bit.

    ``names``: stored names in order of preference. ``shape``: as in the model. ``optional``: may be absent because
    another slot supplies it (a tied weight). ``rows``: ranges of stored tensors stacked along dimension 0, where the
    checkpoint holds it in several pieces: alternatives of sequences of names. Where the pieces have fewer dimensions (the
    biases of experts, one by one), the stack is viewed as ``shape``. ``note``: why it is no layer that could be quantized, where
    a reader would expect one.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    optional: bool = False
    pieces: tuple[tuple[str, ...], ...] = ()
    note: str = ""
