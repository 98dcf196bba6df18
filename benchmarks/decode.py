"""Whole models in the reference engine against llama.cpp: ms per token and prefill, one file of weights for both, one run.

    python benchmarks/decode.py --prepare FOLDER                            # random models, as GGUF and as bf16, once
    python benchmarks/decode.py FOLDER --model llama --bits 4 --threads 1 --json benchmarks/results/decode-cpu-avx512_bf16.json
    python benchmarks/decode.py --show benchmarks/results/decode-cpu-avx512_bf16.json

A Llama of 8 layers, 2048 wide, 5632 inner, 32000 words, 16 heads of 128, `llama` with 16 of them for keys and values and `gqa` with 4; linear
layers and head in Q4_0 or Q8_0, blocks of 32, embedding bf16. Both load the same file; the engine in bfloat16, llama.cpp with its defaults but flash
attention, which is tried on and off, and the better counts. A time of a token is from one token to the next, as a streamer of
`generate` sees it (greedy), or around `llama_decode` and argmax. The contenders take turns; a figure is the 25th percentile of all tokens,
the fastest of the prefills. Each call measures one part and merges it into the JSON file.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYERS, WIDE, INNER, WORDS, HEADS = 8, 2048, 5632, 32000, 16
MODELS = {"llama": 16, "gqa": 4}
"""Heads of keys and values."""
CACHES = ("16bit", "fp8", "int8", "int4")
NEW = 20
"""Tokens that are timed at a stretch, after two that are not."""


def prepare(folder: Path) -> None:
    """The files of all models."""
    import gguf
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType as Kind
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, kv in MODELS.items():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=WORDS, hidden_size=WIDE, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=kv, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(folder / f"{name}-bf16")
        for bits, kind in ((4, Kind.Q4_0), (8, Kind.Q8_0)):
            writer = gguf.GGUFWriter(str(folder / f"{name}-q{bits}.gguf"), "llama")
            writer.add_block_count(LAYERS)
            writer.add_context_length(2048)
            writer.add_embedding_length(WIDE)
            writer.add_feed_forward_length(INNER)
            writer.add_head_count(HEADS)
            writer.add_head_count_kv(kv)
            writer.add_rope_dimension_count(WIDE // HEADS)
            writer.add_rope_freq_base(10000.0)
            writer.add_layer_norm_rms_eps(1e-5)
            writer.add_vocab_size(WORDS)
            writer.add_tokenizer_model("no_vocab")
            for stored, value in model.state_dict().items():
                short, number = _gguf_name(stored)
                array = value.float()
                if number is not None and short in ("attn_q", "attn_k"):
                    # llama.cpp turns neighbouring channels, transformers the two halves.
                    array = array.view(-1, 2, WIDE // HEADS // 2, WIDE).transpose(1, 2).reshape(array.shape)
                where = f"{short if number is None else f'blk.{number}.{short}'}.weight"
                stays = value.ndim == 1 or short == "token_embd"
                to = (Kind.F32 if value.ndim == 1 else Kind.BF16) if stays else kind
                data = gguf.quants.quantize(np.ascontiguousarray(array.numpy()), to)
                writer.add_tensor(where, data, raw_dtype=to)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            print(folder / f"{name}-q{bits}.gguf")


def _gguf_name(name: str) -> tuple[str, int | None]:
    parts = name.split(".")
    if parts[1] != "layers":
        return {"embed_tokens": "token_embd", "norm": "output_norm", "weight": "output"}[parts[1]], None
    short = {
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
        "down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    return short[parts[-2]], int(parts[2])


class Engine:
    """Our side: ``generate`` of the reference engine. ``loop``: "own", or "transformers" for its attention, cache and loop."""

    def __init__(self, path: Path, loop: str = "own", kv_cache: str | None = None) -> None:
        import qplug_core

        self.engine = qplug_core.load(path, dtype="bfloat16", kv_cache=kv_cache)
        self.loop = loop
        if loop != "own":
            self.engine.model.set_attn_implementation("sdpa")

    def tokens(self, prompt: list[int], new: int) -> tuple[float, list[float]]:
        """Seconds of the prefill, and of each token after the first."""
        import torch
        from transformers import GenerationConfig

        stamps: list[float] = []

        class Clock:
            def put(self, value: Any) -> None:
                stamps.append(time.perf_counter())

            def end(self) -> None:
                pass

        ids = torch.tensor([prompt])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        config = GenerationConfig(max_new_tokens=new + 1, do_sample=False, pad_token_id=0)
        if self.loop == "own":
            self.engine._run(inputs, config, (), None, Clock())
        else:
            with torch.inference_mode():
                self.engine.model.generate(**inputs, generation_config=config, streamer=Clock())
        # The first stamp is that of the prompt.
        return stamps[1] - stamps[0], [b - a for a, b in itertools.pairwise(stamps[1:])]


class LlamaCpp:
    """llama.cpp through its C interface, with flash attention or without."""

    def __init__(self, path: Path, threads: int, flash: bool) -> None:
        import llama_cpp

        self.c: Any = llama_cpp
        self.c.llama_log_set(_quiet_log(llama_cpp), None)
        self.c.llama_backend_init()
        self.model = self.c.llama_model_load_from_file(str(path).encode(), self.c.llama_model_default_params())
        given = self.c.llama_context_default_params()
        given.n_ctx = given.n_batch = 1280
        given.n_threads = given.n_threads_batch = threads
        given.flash_attn_type = 1 if flash else 0
        self.context = self.c.llama_init_from_model(self.model, given)
        assert self.context, "llama.cpp made no context"

    def _decode(self, tokens: list[int]) -> int:
        import numpy as np

        array = (self.c.llama_token * len(tokens))(*tokens)
        failed = self.c.llama_decode(self.context, self.c.llama_batch_get_one(array, len(tokens)))
        assert not failed, failed
        logits = np.ctypeslib.as_array(self.c.llama_get_logits_ith(self.context, -1), (WORDS,))
        return int(logits.argmax())

    def tokens(self, prompt: list[int], new: int) -> tuple[float, list[float]]:
        """As :meth:`Engine.tokens`."""
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        begin = time.perf_counter()
        token = self._decode(prompt)
        first = time.perf_counter() - begin
        times = []
        for _ in range(new):
            begin = time.perf_counter()
            token = self._decode([token])
            times.append(time.perf_counter() - begin)
        return first, times


def _quiet_log(llama_cpp: Any) -> Any:
    global _log  # What C calls must live as long as the process.
    _log = llama_cpp.llama_log_callback(lambda level, text, data: None)
    return _log


def measure(folder: Path, model: str, bits: int, threads: int, contexts: list[int], rounds: int) -> dict[str, Any]:
    """ms per token by context, and tokens per second of the prefill of 512, of every contender."""
    import torch

    torch.set_num_threads(threads)
    file = folder / f"{model}-q{bits}.gguf"
    makers: dict[str, Callable[[], Any]] = {
        "qplug": lambda: Engine(file),
        "llama.cpp": lambda: LlamaCpp(file, threads, False),
        "llama.cpp flash": lambda: LlamaCpp(file, threads, True),
        "bf16": lambda: Engine(folder / f"{model}-bf16", loop="transformers"),
    }
    made = {name: make() for name, make in makers.items()}
    row: dict[str, Any] = {"model": model, "bits": bits, "threads": threads, "decode_ms": {}}
    generator = torch.Generator().manual_seed(0)
    for context in contexts:
        prompt = torch.randint(0, WORDS, (context,), generator=generator).tolist()
        times: dict[str, list[float]] = {name: [] for name in made}
        firsts: dict[str, list[float]] = {name: [] for name in made}
        for turn in range(rounds):
            names = list(made)[turn % len(made) :] + list(made)[: turn % len(made)]
            for name in names:
                first, steps = made[name].tokens(prompt, 0 if context == 512 else 4 if name == "bf16" else NEW + 2)
                firsts[name].append(first)
                times[name] += steps[2:]
        if context == 512:
            row["prefill_tokens_per_second"] = {name: context / min(f) for name, f in firsts.items()}
        else:
            row["decode_ms"][str(context)] = {name: statistics.quantiles(t, n=4)[0] * 1000 for name, t in times.items()}
    return row


def measure_caches(folder: Path, model: str, bits: int, threads: int, rounds: int) -> dict[str, Any]:
    """ms per token behind 1024 by KV cache."""
    import torch

    torch.set_num_threads(threads)
    made = {word: Engine(folder / f"{model}-q{bits}.gguf", kv_cache=word) for word in CACHES}
    times: dict[str, list[float]] = {word: [] for word in CACHES}
    prompt = torch.randint(0, WORDS, (1024,), generator=torch.Generator().manual_seed(0)).tolist()
    for turn in range(rounds):
        for word in CACHES[turn % len(CACHES) :] + CACHES[: turn % len(CACHES)]:
            times[word] += made[word].tokens(prompt, NEW + 2)[1][2:]
    found = {word: statistics.quantiles(t, n=4)[0] * 1000 for word, t in times.items()}
    return {"model": model, "bits": bits, "threads": threads, "decode_ms": {}, "kv_cache_ms": found}


def merge(path: Path, row: dict[str, Any], command: str) -> None:
    """Put a part into the file, in the place of the one of the same model, bits and threads; its contexts are joined."""
    import llama_cpp
    import torch
    import transformers

    data = json.loads(path.read_text()) if path.exists() else {"schema": 1, "machine": _machine(), "rows": []}
    data["versions"] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "llama-cpp-python": llama_cpp.__version__,
    }
    key = ("model", "bits", "threads")
    old = next((r for r in data["rows"] if all(r[k] == row[k] for k in key)), {"decode_ms": {}, "runs": []})
    run = {"command": command, "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")}
    part = {**old, **row, "decode_ms": {**old["decode_ms"], **row["decode_ms"]}, "runs": [*old.get("runs", []), run]}
    if old in data["rows"]:
        data["rows"].remove(old)
    data["rows"] = sorted([*data["rows"], part], key=lambda r: [str(r[k]) for k in key])
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(data, indent=2) + "\n")
    os.replace(temporary, path)


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {os.cpu_count()} CPUs"


def show(path: Path) -> str:
    """The figures as a Markdown table; ratios are to llama.cpp's better setting."""
    lines = [
        "| model | bits | threads | context | qplug ms | llama.cpp ms (flash off / on) | ratio | bf16 ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = json.loads(path.read_text())["rows"]
    for row in rows:
        for context, ms in row["decode_ms"].items():
            ratio = ms["qplug"] / min(ms["llama.cpp"], ms["llama.cpp flash"])
            lines.append(
                f"| {row['model']} | {row['bits']} | {row['threads']} | {context} | {ms['qplug']:.2f} | {ms['llama.cpp']:.2f} / "
                f"{ms['llama.cpp flash']:.2f} | {ratio:.2f} | {ms['bf16']:.1f} |"
            )
    lines += [
        "",
        "| model | bits | threads | prefill of 512: qplug tok/s | llama.cpp | times | bf16 | times |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if speed := row.get("prefill_tokens_per_second"):
            peer = max(speed["llama.cpp"], speed["llama.cpp flash"])
            lines.append(
                f"| {row['model']} | {row['bits']} | {row['threads']} | {speed['qplug']:.0f} | {peer:.0f} | {speed['qplug'] / peer:.2f} | "
                f"{speed['bf16']:.0f} | {speed['qplug'] / speed['bf16']:.2f} |"
            )
    lines += [
        "",
        f"| model | bits | threads | behind 1024 tokens, KV cache: {' | '.join(CACHES)} |",
        "|---|---|---" + "|---" * len(CACHES) + "|",
    ]
    for row in rows:
        if found := row.get("kv_cache_ms"):
            cells = " | ".join(f"{found[word]:.2f}" for word in CACHES)
            lines.append(f"| {row['model']} | {row['bits']} | {row['threads']} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--prepare", type=Path)
    parser.add_argument("--show", type=Path)
    parser.add_argument("--model", choices=list(MODELS), default="llama")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 1024, 512], help="512 is the prefill")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--caches", action="store_true", help="KV caches against each other instead")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.prepare:
        options.prepare.mkdir(parents=True, exist_ok=True)
        prepare(options.prepare)
        return
    if options.show:
        print(show(options.show))
        return
    part = (options.folder, options.model, options.bits, options.threads)
    row = measure_caches(*part, options.rounds) if options.caches else measure(*part, options.contexts, options.rounds)
    print(json.dumps(row, indent=2))
    if options.json:
        merge(options.json, row, "python benchmarks/decode.py FOLDER " + " ".join(sys.argv[2:]))


if __name__ == "__main__":
    main()
