"""Checkpoints that tests share. Torch is imported where it is used, because discovery is tested without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"


def oracles() -> list[Path]:
    """The committed checkpoints, and those of the folder $QPLUG_ORACLES."""
    extra = os.environ.get("QPLUG_ORACLES")
    found = {p.parent.name: p.parent for p in DATA.glob("*/ref.safetensors")}
    found |= {p.parent.name: p.parent for p in Path(extra).glob("*/ref.safetensors")} if extra else {}
    return [found[name] for name in sorted(found)]


@pytest.fixture
def llama(tmp_path):
    """A tiny random bf16 Llama on disk, untied, with a tokenizer of single characters."""
    return make_model(tmp_path / "llama")


def make_model(folder: Path, kind: str = "llama", **changes) -> Path:
    """A tiny random model of ``kind`` on disk."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": False,
        "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **{**sizes, **changes})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({**{c: i for i, c in enumerate(alphabet)}, "<end>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>").save_pretrained(folder)
    return folder
