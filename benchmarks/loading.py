"""Loading: time against reading the same bytes and packing them, and peak memory against the packed model.

    python benchmarks/loading.py [--layers 22] [--threads 2] [--repeat 3] [--case NAME]... [--folder KEPT] [--json OUT]

Makes a random Llama (2048 wide, 5632 inner; 1.0 billion parameters with 22 layers) as W4 g128 checkpoints and as bf16, in a temporary
folder or in one that is kept, and loads each in a fresh process. Ratios are of one run, the
fastest of several; the page cache is warm.
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

CASES = {
    "gptq W4A16_g128": ("gptq", None),
    "awq W4A16_g128_asym": ("awq", None),
    "compressed-tensors W4A16_g128": ("compressed_tensors", None),
    "bf16 to W8A16 online": ("bf16", "W8A16"),
    "bf16": ("bf16", None),
}
SCHEMES = {"gptq": "W4A16_g128", "awq": "W4A16_g128_asym", "compressed_tensors": "W4A16_g128"}


def make(folder: Path, kinds: set[str], layers: int) -> None:
    """The checkpoints of ``kinds`` that are not there yet. Layers of one shape hold the same weight."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from qplug_core.quantizer import RoundToNearest
    from qplug_core.registry import get_registry
    from qplug_core.scheme import QuantScheme

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    torch.manual_seed(0)
    weights = {shape: torch.randn(shape, dtype=torch.bfloat16) / 50 for shape in dict.fromkeys(shapes.values())}
    registry = get_registry()
    for kind in kinds:
        if (folder / kind / "model.safetensors").exists():
            continue
        encoded: dict[Any, Any] = {}
        if kind != "bf16":
            fmt = registry.load(registry.format(kind).decl)
            scheme = QuantScheme.parse(SCHEMES[kind])
            for shape in dict.fromkeys(shape for name, shape in shapes.items() if "_proj" in name):
                weight = RoundToNearest(torch.float16).quantize(weights[shape], scheme)
                quant = fmt.quant_for_scheme(weight)
                encoded[shape] = quant, fmt.encode(weight, quant)
        stored: dict[str, Any] = {}
        quants: dict[str, Any] = {"lm_head": None}
        for name, shape in shapes.items():
            module = name.removesuffix(".weight")
            if "_proj" in name and kind != "bf16":
                quants[module], tensors = encoded[shape]
                stored |= {f"{module}.{suffix}": tensor.clone() for suffix, tensor in tensors.items()}
            else:
                stored[name] = weights[shape].clone()
        (folder / kind).mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder / kind)
        if kind != "bf16":
            body = json.loads((folder / kind / "config.json").read_text())
            body["quantization_config"] = fmt.quantization_config(quants)
            (folder / kind / "config.json").write_text(json.dumps(body))
        save_file(stored, folder / kind / "model.safetensors", {"format": "pt"})


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


def measure(path: Path, quantize: str | None, threads: int) -> dict[str, float]:
    """Seconds and bytes of one load, in this process."""
    import torch

    import qplug_core.method as method
    from qplug_core.engine.engine import load

    torch.set_num_threads(threads)
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
    reading = min(read_seconds(files) for _ in range(3))
    layer = max((d.layer.n * d.layer.k for d in engine.plan.decisions), default=0)
    return {
        "file_mb": sum(f.stat().st_size for f in files) / 1e6,
        "read_s": reading,
        "pack_s": work[0],
        "load_s": seconds,
        "ratio": seconds / (reading + work[0]),
        "times_reading": seconds / reading,
        "packed_mb": engine.nbytes / 1e6,
        "peak_growth_mb": (peak - before) / 1e6,
        "largest_layer_mb_16bit": layer * 2 / 1e6,
    }


def main() -> None:
    """Run every case in its own process and print one row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="runs, of which the fastest counts")
    parser.add_argument("--case", action="append", choices=list(CASES), help="all if none is named")
    parser.add_argument("--folder", type=Path, help="where checkpoints are made, and kept")
    parser.add_argument("--json", type=Path, help="where results are kept; cases that are not measured now stay")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        path, quantize = arguments.measure
        print(json.dumps(measure(Path(path), quantize or None, arguments.threads)))
        return
    rows = {}
    cases = arguments.case or list(CASES)
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        make(folder, {CASES[case][0] for case in cases}, arguments.layers)
        print(
            f"{'case':30} {'file MB':>8} {'read s':>7} {'pack s':>7} {'load s':>7} {'x read':>7} {'ratio':>6} {'packed MB':>9} {'growth MB':>9}"
        )
        for case in cases:
            kind, quantize = CASES[case]
            command = [
                sys.executable,
                __file__,
                "--threads",
                str(arguments.threads),
                "--measure",
                str(folder / kind),
                quantize or "",
            ]
            runs = [
                subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(arguments.repeat)
            ]
            found = sorted((json.loads(out.splitlines()[-1]) for out in runs), key=lambda run: run["load_s"])
            # The fastest: another process can only add to a time.
            row = rows[case] = {**found[0], "all_load_s": [run["load_s"] for run in found]}
            print(
                f"{case:30} {row['file_mb']:8.1f} {row['read_s']:7.2f} {row['pack_s']:7.2f} {row['load_s']:7.2f} {row['times_reading']:7.2f} "
                f"{row['ratio']:6.2f} {row['packed_mb']:9.1f} {row['peak_growth_mb']:9.1f}"
            )
    print(
        "x read: load / read, goal at most 4. ratio: load / (read + decode, quantize and pack), goal at most 1.3. Growth is of peak memory, over a "
        "process that has loaded a small model."
    )
    if arguments.json:
        from qplug_core.device import Device

        earlier = json.loads(arguments.json.read_text())["cases"] if arguments.json.exists() else {}
        about = {
            "date": datetime.date.today().isoformat(),
            "machine": Device.cpu().name,
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "command": f"python benchmarks/loading.py --layers {arguments.layers} --threads {arguments.threads} --repeat {arguments.repeat}",
        }
        rows = earlier | {case: {**row, **about} for case, row in rows.items()}
        arguments.json.write_text(json.dumps({"schema": 1, "cases": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
