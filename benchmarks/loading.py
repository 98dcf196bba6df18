"""Loading: time against reading the same bytes and packing them, and peak memory against the packed model.

    python benchmarks/loading.py [--layers 8] [--json OUT]

Makes a random Llama (2048 wide, 5632 inner) as a GPTQ W4 g128 checkpoint and as bf16, in a temporary folder, and loads
each in a fresh process. Ratios are of one run; the page cache is warm.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES = {"gptq W4A16_g128": ("gptq", None), "bf16 to W8A16 online": ("bf16", "W8A16"), "bf16": ("bf16", None)}


def make(folder: Path, layers: int) -> None:
    """The two checkpoints."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from qplug_core.quantizer import RoundToNearest
    from qplug_core.registry import get_registry
    from qplug_core.scheme import QuantScheme

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "bf16")
    registry = get_registry()
    gptq = registry.load(registry.format("gptq").decl)
    scheme = QuantScheme.parse("W4A16_g128")
    stored: dict[str, Any] = {}
    quants: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        module = name.removesuffix(".weight")
        if "_proj" not in name:
            stored[name] = value.contiguous()
            continue
        weight = RoundToNearest(torch.float16).quantize(value, scheme)
        quants[module] = gptq.quant_for_scheme(weight)
        for suffix, tensor in gptq.encode(weight, quants[module]).items():
            stored[f"{module}.{suffix}"] = tensor.contiguous()
    (folder / "gptq").mkdir()
    save_file(stored, folder / "gptq" / "model.safetensors", {"format": "pt"})
    body = json.loads((folder / "bf16" / "config.json").read_text())
    body["quantization_config"] = gptq.quantization_config({**quants, "lm_head": None})
    (folder / "gptq" / "config.json").write_text(json.dumps(body))


def peak_bytes() -> int:
    """Peak resident memory of this process (Linux). getrusage would also count what its parent held when it was started."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def warm_page_cache(files: list[Path]) -> None:
    """Read through all files in small pieces."""
    for file in files:
        with file.open("rb") as handle:
            while handle.read(2**22):
                continue


def read_seconds(files: list[Path]) -> float:
    """Seconds to read all files into memory."""
    start = time.perf_counter()
    for file in files:
        buffer = bytearray(file.stat().st_size)
        with file.open("rb") as handle:
            handle.readinto(buffer)
    return time.perf_counter() - start


def measure(path: Path, quantize: str | None) -> dict[str, float]:
    """Seconds and bytes of one load, in this process."""
    import torch

    import qplug_core.method as method
    from qplug_core.engine.engine import load

    torch.set_num_threads(2)
    work = [0.0]

    def timed(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            work[0] += time.perf_counter() - start
            return result

        return call

    load(Path(__file__).parents[1] / "qplug_core" / "demo" / "gptq")  # Imports and the compiler's cache.
    files = sorted(path.glob("*.safetensors"))
    warm_page_cache(files)
    # Decoding, quantizing and packing are the work that reading alone does not do.
    original = method.HubMethod._pack
    method.HubMethod._pack = timed(original)  # type: ignore[method-assign]
    before = peak_bytes()
    method.decode_part = timed(method.decode_part)
    quantizer = method.online_quantizer

    def timed_quantizer(*args: Any) -> Any:
        found = quantizer(*args)

        class Timed:
            quantize = staticmethod(timed(found.quantize))

        return Timed()

    method.online_quantizer = timed_quantizer  # type: ignore[assignment]
    start = time.perf_counter()
    engine = load(path, quantize=quantize)
    seconds = time.perf_counter() - start
    peak = peak_bytes()
    # Only now, because this holds a whole file, and the peak of a process never falls.
    reading = read_seconds(files)
    layer = max((d.layer.n * d.layer.k for d in engine.plan.decisions), default=0)
    return {
        "file_mb": sum(f.stat().st_size for f in files) / 1e6,
        "read_s": reading,
        "pack_s": work[0],
        "load_s": seconds,
        "ratio": seconds / (reading + work[0]),
        "packed_mb": engine.nbytes / 1e6,
        "peak_growth_mb": (peak - before) / 1e6,
        "largest_layer_mb_16bit": layer * 2 / 1e6,
    }


def main() -> None:
    """Run every case in its own process and print one row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        path, quantize = arguments.case
        print(json.dumps(measure(Path(path), quantize or None)))
        return
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, arguments.layers)
        print(
            f"{'case':22} {'file MB':>8} {'read s':>7} {'pack s':>7} {'load s':>7} {'ratio':>6} {'packed MB':>10} {'peak growth MB':>15}"
        )
        for case, (kind, quantize) in CASES.items():
            command = [sys.executable, __file__, "--case", str(folder / kind), quantize or ""]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = rows[case] = json.loads(out.splitlines()[-1])
            print(
                f"{case:22} {row['file_mb']:8.1f} {row['read_s']:7.2f} {row['pack_s']:7.2f} {row['load_s']:7.2f} {row['ratio']:6.2f} "
                f"{row['packed_mb']:10.1f} {row['peak_growth_mb']:15.1f}"
            )
    print(
        "ratio = load / (read + decode, quantize and pack); goal at most 1.3. Peak growth is over a process that has loaded a small model."
    )
    if arguments.json:
        about = {
            "date": datetime.date.today().isoformat(),
            "machine": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "command": " ".join(["python", "benchmarks/loading.py", *sys.argv[1:]]),
        }
        arguments.json.write_text(json.dumps({"schema": 1, **about, "cases": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
