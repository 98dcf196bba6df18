"""Checkpoints of ERNIE as PaddlePaddle writes them, seen as transformers has them: names, and the orientation of plain weights.

Names begin with ``ernie.`` where transformers has ``model.``; ``qkv_proj`` and ``up_gate_proj`` (gate rows first) are fused; every
16-bit matrix is ``[K, N]``, the router and an untied ``lm_head`` too, except the embedding. A file whose names begin with ``model.``
was converted, matrices included. Both are told by ``tools/paddle2torch/tran_4_5t.py`` of PaddlePaddle/ERNIE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .axes import FLOATS

if TYPE_CHECKING:
    from .source import Source

PREFIX = "ernie."


def model_name(stored: str) -> str:
    """The Hugging Face name of a stored tensor: ``ernie.layers.0.mlp.up_gate_proj.bias`` is ``model.layers.0.mlp.gate_up_proj.bias``."""
    name = f"model.{stored.removeprefix(PREFIX)}" if stored.startswith(PREFIX) else stored
    return name.replace(".up_gate_proj.", ".gate_up_proj.")


def orient(source: Source) -> str:
    """See the 16-bit matrices of a Paddle file as ``[N, K]``; one sentence that says so, empty where there is nothing to turn."""
    if not any(name.startswith(PREFIX) for name in source.tensors):
        return ""
    vocabulary = source.config.get("vocab_size")
    turned = 0
    for name, info in list(source.tensors.items()):
        matrix = name.endswith(".weight") and len(info.shape) == 2 and info.dtype in FLOATS
        if not matrix or name.endswith("embed_tokens.weight"):
            continue
        # A tied one is a copy of the embedding, and lies as that does.
        if name == "lm_head.weight" and info.shape[0] == vocabulary != info.shape[1]:
            continue
        source.transpose(name)
        turned += 1
    return f"names begin with {PREFIX}, so {turned} 16-bit matrices are read as Paddle stores them, [K, N]" if turned else ""
