"""Names: from what llama.cpp calls a tensor to what the Hugging Face model does, by the gguf package's own table, reversed."""

from __future__ import annotations

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
from torch import Tensor

OUTER = ("model.embed_tokens", "model.norm", "lm_head")
INNER = (
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""Modules of the models that are read; the table knows more names for each tensor, of other models."""

PERMUTED = ("llama",)
"""Architectures of which llama.cpp reorders the rows of queries and keys, for its rotary embedding."""


def model_names(architecture: str, layers: int) -> dict[str, str]:
    """Model tensor by GGUF tensor, both with ``.weight`` or ``.bias``, of a model with ``layers`` layers."""
    arch: MODEL_ARCH = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    table = get_tensor_name_map(arch, layers)
    modules = [*OUTER, *(f"model.layers.{i}.{name}" for i in range(layers) for name in INNER)]
    found: dict[str, str] = {}
    for module in modules:
        stored = table.get_name(module)
        if stored is not None:
            found |= {f"{stored}.{leaf}": f"{module}.{leaf}" for leaf in ("weight", "bias")}
    return found


def unpermuted_rows(rows: int, heads: int) -> Tensor:
    """Stored row by row of the model, LongTensor ``[rows]``, for queries or keys of ``heads`` heads.

    llama.cpp rotates neighbouring rows 2j and 2j + 1 of a head, the Hugging Face model rows j and j + D/2: the converter stores
    row s * D/2 + j as row 2j + s.
    """
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)
