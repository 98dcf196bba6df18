"""Train the embedded model: a small Llama that completes Python code.

The text is the source of the running interpreter's standard library (PSF-2.0 licence), which every Python
installation carries, so that nobody needs a data set to repeat this. Every 40th file (by the hash of its path) is
held out; the perplexity on those is written into ``training.json`` beside the model.

    python -m qplug_core.demo.train OUT [--steps 3000] [--threads 4]

OUT receives a Hugging Face checkpoint: ``config.json``, ``model.safetensors`` (bf16), the tokenizer, and
beside OUT go ``heldout.txt``, the text that perplexity is
measured on, and ``training.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import re
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048
CONTEXT = 256
BATCH = 16
PEAK_LEARNING_RATE = 2e-3
SEED = 20
HELD_OUT_CHARACTERS = 60_000
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "turtledemo", "__pycache__", "lib2to3", "pydoc_data"}
END = "<|end|>"


def corpus() -> tuple[list[str], list[str]]:
    """Source files of the standard library, as (training, held-out) lists of text, in path order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    training: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        # An installation writes its own path into the first line of some files.
        text = re.sub(r"\A#!.*", "#!/usr/bin/env python3", path.read_text(encoding="utf-8", errors="ignore"))
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        (held_out if digest[0] % 40 == 0 else training).append(text)
    return training, held_out


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``VOCABULARY`` entries, without loss on any input."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one LongTensor ``[T]``, each preceded by the end marker (id 0)."""
    end = tokenizer.convert_tokens_to_ids(END)
    ids: list[int] = []
    for text in texts:
        ids.append(end)
        ids.extend(tokenizer(text)["input_ids"])
    return torch.tensor(ids)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood over windows of ``CONTEXT`` tokens of ids ``[T]``."""
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(BATCH)]
    return math.exp(sum(losses) / len(windows))


def train(steps: int, threads: int, out: Path) -> None:
    """Train for ``steps`` batches and write the checkpoint to ``out``, text and record beside it."""
    torch.manual_seed(SEED)
    torch.set_num_threads(threads)
    training, held_out = corpus()
    tokenizer = train_tokenizer(training)
    stream = token_stream(tokenizer, training)
    held_out_text = "\n".join(held_out)[:HELD_OUT_CHARACTERS]
    held_out_ids = token_stream(tokenizer, [held_out_text])
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(stream):,} training tokens, {len(held_out_ids):,} held out, {parameters:,} parameters", flush=True)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    warm_up = min(200, steps // 10)

    def rate(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(SEED)
    start = time.perf_counter()
    for step in range(steps):
        offsets = torch.randint(len(stream) - CONTEXT - 1, (BATCH,), generator=generator)
        batch = torch.stack([stream[o : o + CONTEXT] for o in offsets.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            rate_now = (step + 1) * BATCH * CONTEXT / (time.perf_counter() - start)
            print(f"step {step + 1:5} of {steps}  loss {loss.item():.3f}  {rate_now:,.0f} tokens/s", flush=True)
    model = model.to(torch.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out.parent / "heldout.txt").write_text(held_out_text, encoding="utf-8")
    record = {
        "text": f"standard library of CPython {platform.python_version()} (PSF-2.0), every 40th file held out",
        "training_tokens": len(stream),
        "seen_tokens": steps * BATCH * CONTEXT,
        "parameters": parameters,
        "heldout_perplexity_bf16": round(perplexity(model, held_out_ids), 3),
        "seed": SEED,
        "torch": torch.__version__,
    }
    (out.parent / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=4)
    arguments = parser.parse_args()
    train(arguments.steps, arguments.threads, arguments.out)
