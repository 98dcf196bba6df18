"""WINT2 on this CPU beside W4A16, which it is to be as fast as, all in one run.

    python benchmarks/wint2.py [--threads 2] [--json OUT]

Every call reads another copy of the weight, together larger than the cache; contenders take turns; a time is the 10th percentile.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from qplug_int8.paddle.wint2 import CCQFormat

from qplug_core.config import LayerQuant
from qplug_core.device import Device
from qplug_core.kernel import Kernel, PackedWeight
from qplug_core.kernels import builder
from qplug_core.random_weight import random_weight
from qplug_core.registry import get_registry
from qplug_core.scheme import QuantScheme

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
TOKENS = (1, 8, 512)
CACHE = 96 * 2**20


def wint2(n: int, k: int) -> Any:
    """A random weight as FastDeploy stores it."""
    stored = {
        "quant_weight": torch.randint(0, 256, (k // 4, n), dtype=torch.uint8),
        "weight_scale": torch.randint(0, 256, (k // 128, n), dtype=torch.uint8),
        "super_scales": torch.rand(n) * 0.01,
        "code_scale": torch.rand(n) * 8 + 120,
        "code_zp": torch.rand(n) * 5,
    }
    return CCQFormat().decode(stored, LayerQuant(QuantScheme.parse("Wccq2A16_g64"), "ccq2"), n, k)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each shape and number of tokens")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    registry = get_registry()
    rows: list[dict[str, Any]] = []
    print(f"{'shape':>14} {'tokens':>6} {'W4A16 ms':>9} {'WINT2 ms':>9} {'bf16 ms':>9} {'WINT2 / W4A16':>14}")
    for n, k in SHAPES:
        weights = {"gptq.cpu_wna16": random_weight(QuantScheme.parse("W4A16_g128"), n, k), "int8.cpu_wint2": wint2(n, k)}
        packs: dict[str, tuple[Kernel, list[PackedWeight]]] = {}
        for name, weight in weights.items():
            kernel: Kernel = registry.load(registry.kernel(name).decl)
            first = kernel.pack(weight)
            packs[name] = kernel, [kernel.pack(weight) for _ in range(CACHE // first.nbytes + 1)]
        plain = [torch.randn(n, k).bfloat16() for _ in range(CACHE // (2 * n * k) + 2)]
        for m in TOKENS:
            x = torch.randn(m, k).bfloat16()
            times: dict[str, list[float]] = {name: [] for name in (*packs, "bf16")}
            stop, i = time.perf_counter() + arguments.seconds, 0
            while time.perf_counter() < stop or i < 3:
                for name, (kernel, copies) in packs.items():
                    start = time.perf_counter()
                    kernel.apply(x, copies[i % len(copies)])
                    times[name].append(time.perf_counter() - start)
                start = time.perf_counter()
                torch.nn.functional.linear(x, plain[i % len(plain)])
                times["bf16"].append(time.perf_counter() - start)
                i += 1
            ms = {name: sorted(found)[len(found) // 10] * 1e3 for name, found in times.items()}
            w4, w2, b16 = ms.values()
            rows.append({"n": n, "k": k, "tokens": m, "ms": ms, "calls": i})
            print(f"{f'{n} x {k}':>14} {m:6} {w4:9.3f} {w2:9.3f} {b16:9.3f} {w2 / w4:14.2f}")
    if arguments.json:
        about = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": Device.cpu().name,
            "instruction_set": builder.instruction_set(Device.cpu()),
            "threads": arguments.threads,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "command": f"python benchmarks/wint2.py --threads {arguments.threads} --seconds {arguments.seconds}",
        }
        arguments.json.write_text(json.dumps({"schema": 1, **about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
