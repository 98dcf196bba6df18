"""KV-cache schemes: bytes of one token as counted and as resident memory grows, and the error of logits, from one run.

    python benchmarks/kv_cache.py [--layers 8] [--tokens 4096] [--json benchmarks/results/kv_cache.json]

The model is a random Llama of 8 key-value heads of 128. Counted: codes, scales and zero points of all layers. Measured: growth of
resident memory over ``--tokens`` tokens divided by their number, after a warm-up. Error: relative Frobenius of float32 logits.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import qplug_core
from qplug_core.engine.cache import bytes_per_token, quant_cache
from qplug_core.engine.memory import trim

SCHEMES = ("16bit", "fp8", "fp8_e5m2", "int8", "int8.asym", "int4", "int4.g32", "nvfp4")


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not report resident memory")


def fill(engine, tokens: int, heads: int, depth: int, step: int = 256):
    """A cache with ``tokens`` random tokens; only the cache grows, no attention is computed."""
    cache = quant_cache(engine.model.config, engine.coders)
    for _ in range(0, tokens, step):
        for index in range(len(cache.layers)):
            x = torch.randn(1, heads, step, depth, dtype=torch.bfloat16)
            cache.update(x, x, index)
    trim()
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    heads, depth = 8, 128
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 512, "vocab_size": 256, "num_attention_heads": heads}
    config = LlamaConfig(**sizes, num_key_value_heads=heads, head_dim=depth, num_hidden_layers=options.layers)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        ids = torch.randint(0, 256, (1, 256))
        plain = qplug_core.load(folder, dtype="float32").logits(ids)
        for scheme in SCHEMES:
            engine = qplug_core.load(folder, dtype="float32", kv_cache=scheme)
            logits = engine.logits(ids)
            warm = fill(engine, 512, heads, depth)
            before = resident()
            cache = fill(engine, options.tokens, heads, depth)
            growth = (resident() - before) / options.tokens
            counted = bytes_per_token(cache)
            error = float((logits - plain).norm() / plain.norm())
            rows.append({"scheme": scheme, "counted": counted, "measured": round(growth), "error": error})
            del cache, warm
            trim()
    base = rows[0]["counted"]
    print(f"{options.layers} layers, {heads} heads of {depth}, {options.tokens} tokens")
    print(f"{'KV cache':12} {'bytes/token':>12} {'of 16 bit':>10} {'measured':>10} {'error':>9}")
    for row in rows:
        shown = f"{row['counted']:12} {row['counted'] / base:10.2f} {row['measured']:10} {row['error']:9.1e}"
        print(f"{row['scheme']:12} {shown}")
    if options.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine()}
        command = f"python benchmarks/kv_cache.py --layers {options.layers} --tokens {options.tokens}"
        options.json.write_text(json.dumps({"command": command, "versions": versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
