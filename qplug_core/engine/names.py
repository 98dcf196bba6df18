"""Names: from what a Hugging Face model calls a module to what a checkpoint may call it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming


def left_out(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Stored tensors that a model's class says it has no use for (DeepSeek's layer for multi-token prediction), with the reason."""
    patterns = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    reason = f"{type(model).__name__} has no use for them, as transformers says"
    return {name: reason for name in stored if any(pattern.search(name) for pattern in patterns)}


def _is_join(converter: WeightConverter) -> bool:
    """True where it does nothing but put tensors one below another."""
    ops = converter.operations
    return len(ops) == 1 and isinstance(ops[0], Concatenate) and ops[0].dim == 0 and len(converter.target_patterns) == 1


class StoredNames:
    """Stored modules by the name that the model has for them.

    transformers renames while it loads (``block_sparse_moe`` to ``mlp``), and checkpoints of a bare model lack the prefix
    that a model with a head has. Both are undone here, from transformers' own table.
    """

    def __init__(self, model: Any, stored: Iterable[str], tool: Callable[[str], str] | None = None) -> None:
        """``tool``: the names of the tool that wrote the checkpoint, turned into Hugging Face's."""
        table = get_model_conversion_mapping(model)
        renamings = [t for t in table if isinstance(t, WeightRenaming)]
        self._joins = [t for t in table if isinstance(t, WeightConverter) and _is_join(t)]
        prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
        self._stored: dict[str, list[str]] = defaultdict(list)
        own = set(model.state_dict())
        for name in stored:
            renamed = name if tool is None else tool(name)
            for transform in renamings:
                renamed, _ = transform.rename_source_key(renamed)
            self._add(renamed, name)
            if prefix and renamed.startswith(prefix):
                self._add(renamed.removeprefix(prefix), name)
            elif prefix and f"{prefix}{renamed}" in own:
                self._add(f"{prefix}{renamed}", name)
            elif prefix:
                self._add_module(f"{prefix}{renamed}", name)

    def _add(self, model_name: str, stored: str) -> None:
        if stored not in self._stored[model_name]:
            self._stored[model_name].append(stored)
        self._add_module(model_name, stored)

    def _add_module(self, model_name: str, stored: str) -> None:
        """Every parent of a tensor, as far as the tails of both names are the same."""
        ours, theirs = model_name.split("."), stored.split(".")
        while len(ours) > 1 and len(theirs) > 1 and ours[-1] == theirs[-1]:
            ours, theirs = ours[:-1], theirs[:-1]
            parent = ".".join(theirs)
            if parent not in self._stored[".".join(ours)]:
                self._stored[".".join(ours)].append(parent)

    def joined(self, name: str) -> tuple[tuple[str, ...], ...]:
        """Stored tensors that are the rows of a tensor of the model one after another, by transformers' table."""
        found = []
        for join in self._joins:
            (target,) = join.target_patterns
            if re.search(target, name):
                pieces = [re.sub(target, source.replace("\\", ""), name) for source in join.source_patterns]
                found.append(tuple(self.of(piece)[0] for piece in pieces))
        return tuple(found)

    def of(self, name: str) -> tuple[str, ...]:
        """Stored names of a module or tensor, the model's own name first where it is stored, or alone where nothing is."""
        found = self._stored.get(name, [])
        return tuple(sorted(found, key=lambda s: s != name)) or (name,)
