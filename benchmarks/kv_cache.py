"""KV-cache schemes: bytes of one token as counted and as resident memory grows, and errors, from one run.

    python benchmarks/kv_cache.py --json benchmarks/results/kv_cache.json --page docs/kv_cache.md     # about a minute
    python benchmarks/kv_cache.py --json benchmarks/results/kv_cache.json --page docs/kv_cache.md --check

The model is a random Llama of 8 key-value heads of 128. Counted: codes, scales and zero points of all layers. Measured: growth of
resident memory over ``--tokens`` tokens divided by their number, after a warm-up: pages that are written. Errors are relative
Frobenius distances in float32: of keys and values read back, beside the bound that the scheme states, and of logits. Stored scales are
the largest magnitudes of the same tokens. ``--check`` runs nothing: it fails where the page does not hold the table of the results.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import shutil
import tempfile
from pathlib import Path

HEADS, DEPTH = 8, 128
MARKS = ("<!-- results -->\n", "<!-- end of results -->\n")
ASKED = ("16bit", "fp8", "fp8_e5m2", "int8", "int8.asym", "int4", "int4.asym", "int4.g32", "nvfp4")
STORED = {
    "FP8, one scale": ("compressed-tensors", "float", "tensor"),
    "FP8, a scale for each head": ("compressed-tensors", "float", "attn_head"),
    "INT8, one scale": ("compressed-tensors", "int", "tensor"),
    "INT8, a scale for each head": ("compressed-tensors", "int", "attn_head"),
    "INT8, a scale for each channel (FastDeploy C8)": ("fastdeploy", "int", "channel"),
}
"""Caches whose scales a checkpoint holds: the format, the type and what has a scale."""


def map_large_allocations() -> None:
    """Large allocations are pages of their own, which count when they are written: not the room that a cache keeps for more tokens."""
    ctypes.CDLL(None).mallopt(-3, 64 * 1024)  # M_MMAP_THRESHOLD, which glibc would raise as it frees.


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not report resident memory")


def fill(engine, tokens: int, step: int = 256):
    """A cache with ``tokens`` random tokens; only the cache grows, no attention is computed."""
    import torch

    from qplug_core.engine.cache import quant_cache
    from qplug_core.engine.memory import trim

    cache = quant_cache(engine.model.config, engine.coders)
    for _ in range(0, tokens, step):
        for index in range(len(cache.layers)):
            x = torch.randn(1, HEADS, step, DEPTH, dtype=torch.bfloat16)
            cache.update(x, x, index)
    trim()
    return cache


def bytes_of(engine, tokens: int) -> tuple[int, float]:
    """Bytes of one token: as counted, and as resident memory grew."""
    from qplug_core.engine.cache import bytes_per_token

    warm = fill(engine, 512)
    before = resident()
    cache = fill(engine, tokens)
    grown = (resident() - before) / tokens
    del warm
    return bytes_per_token(cache), grown


def calibrated(folder: Path, out: Path, kind: tuple[str, str, str], held) -> Path:
    """The 16-bit checkpoint in ``folder`` with a cache whose scales are stored, made from the keys and values ``held``."""
    import torch
    from safetensors.torch import load_file, save_file

    writer, number, place = kind
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    axes = {"tensor": (0, 1, 2, 3), "attn_head": (0, 2, 3), "channel": (0, 2)}[place]
    for index, pair in enumerate(held):
        for which, x in zip("kv", pair, strict=True):
            largest = x.abs().amax(axes)
            name = f"model.layers.{index}.self_attn."
            if writer == "fastdeploy":
                tensors[f"{name}cache{which}_matmul.activation_scale"] = largest.flatten()
            else:
                scale = largest / {"float": 448, "int": 127}[number]
                tensors[f"{name}{which}_scale"] = scale.reshape(-1, *(1, 1) if place == "attn_head" else ()).to(
                    torch.float32
                )
    save_file(tensors, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    args = {"num_bits": 8, "type": number, "strategy": place, "symmetric": True, "dynamic": False}
    ct = {"quant_method": writer, "format": "dense", "config_groups": {}, "ignore": [], "kv_cache_scheme": args}
    fd = {"quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "wint8", "kv_cache_quant_type": "int8"}
    config["quantization_config"] = {**fd, "is_quantized": False} if writer == "fastdeploy" else ct
    (out / "config.json").write_text(json.dumps(config))
    return out


def run(layers: int, tokens: int) -> dict:
    """All rows."""
    import torch
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    import qplug_core
    from qplug_core.engine.memory import trim
    from qplug_core.scheme import QuantScheme

    map_large_allocations()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 512, "vocab_size": 256, "num_attention_heads": HEADS}
    config = LlamaConfig(**sizes, num_key_value_heads=HEADS, head_dim=DEPTH, num_hidden_layers=layers)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        LlamaForCausalLM(config).save_pretrained(base)
        ids = torch.randint(0, 256, (1, 256))
        plain = qplug_core.load(base, dtype="float32")
        expected = plain.logits(ids)
        with torch.inference_mode():
            held = [(one.keys, one.values) for one in plain.model(ids, use_cache=True).past_key_values.layers]

        def row(name: str, asked: str, folder: Path, kv_cache: str | None) -> None:
            engine = qplug_core.load(folder, dtype="float32", kv_cache=kv_cache)
            counted, measured = bytes_of(engine, tokens)
            errors = [0.0]
            bound = 0.0
            for index, coders in engine.coders.items():
                bound = QuantScheme(kv=coders[0].kv).tolerance.cache
                for coder, x in zip(coders, held[index], strict=True):
                    errors.append(float((coder.decode(coder.encode(x), DEPTH, x.dtype) - x).norm() / x.norm()))
            logits = float((engine.logits(ids) - expected).norm() / expected.norm())
            one = {"name": name, "asked": asked, "counted": counted, "measured": round(measured)}
            rows.append({**one, "error": max(errors), "bound": bound, "logits": logits})
            trim()

        for word in ASKED:
            row("", f"`{word}`", base, word)
        for index, (name, kind) in enumerate(STORED.items()):
            row(name, f"a {kind[0]} file", calibrated(base, Path(scratch) / str(index), kind, held), None)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine()}
    return {"layers": layers, "tokens": tokens, "versions": versions, "rows": rows}


NAMES = {
    "16bit": "16 bit", "fp8": "FP8 e4m3", "fp8_e5m2": "FP8 e5m2", "int8": "INT8 (C8)", "int8.asym": "INT8 with zero points",
    "int4": "INT4 (C4)", "int4.asym": "INT4 with zero points", "int4.g32": "INT4, groups of 32 channels", "nvfp4": "NVFP4",
}  # fmt: skip


def table(report: dict) -> str:
    """The rows in Markdown."""
    base = report["rows"][0]["counted"]
    lines = [
        f"{report['layers']} layers of {HEADS} key-value heads of {DEPTH}; resident memory over {report['tokens']} tokens; "
        f"torch {report['versions']['torch']}, transformers {report['versions']['transformers']}, {report['versions']['machine']}.",
        "",
        "| cache | from | bytes per token | of 16 bit | resident memory | error of keys and values | bound | error of logits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        name = row["name"] or NAMES[row["asked"].strip("`")]
        error, bound = (f"{row['error']:.4f}", f"{row['bound']:g}") if row["bound"] else ("0", "-")
        cells = [name, row["asked"], row["counted"], f"{row['counted'] / base:.2f}", row["measured"], error, bound]
        lines.append(f"| {' | '.join(map(str, cells))} | {row['logits']:.4f} |")
    return "\n".join(lines) + "\n"


def page_with(text: str, report: dict) -> str:
    """The page ``text`` with the table of ``report`` between its marks."""
    head, rest = text.split(MARKS[0])
    _, tail = rest.split(MARKS[1])
    return f"{head}{MARKS[0]}{table(report)}{MARKS[1]}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path, help="Results are written here.")
    parser.add_argument("--page", type=Path, help="The table is written into this page.")
    parser.add_argument("--check", action="store_true", help="Run nothing; the page must hold the table of the results.")
    options = parser.parse_args()
    if options.check:
        if options.json is None or options.page is None:
            parser.error("--check needs --json and --page")
        text = options.page.read_text(encoding="utf-8")
        if page_with(text, json.loads(options.json.read_text())) != text:
            raise SystemExit(f"{options.page} does not hold the table of {options.json}; run without --check")
        return
    report = run(options.layers, options.tokens)
    print(table(report), end="")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.page:
        options.page.write_text(page_with(options.page.read_text(encoding="utf-8"), report), encoding="utf-8")


if __name__ == "__main__":
    main()
