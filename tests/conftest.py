"""Checkpoints that tests share. Torch is imported where it is used, because discovery is tested without it."""

from __future__ import annotations

import os
import subprocess
import sys
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


MEASURED = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
def peak():
    status = Path('/proc/self/status').read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in status if line.startswith('VmHWM')))
import qplug_core
"""


def measure_memory(code: str, *arguments: Path) -> list[int]:
    """The integers that ``code`` prints in a process of its own; ``peak()`` there is the most bytes it ever held.

    glibc keeps freed blocks for a while, how many differs from run to run by more than a layer; here each block goes back at once.
    """
    command = [sys.executable, "-c", MEASURED + code, *map(str, arguments)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=arguments[0].parent, env=environment)
    return [int(word) for word in done.stdout.split()]
