"""Experts on this CPU: all in one call for each projection, one call for each expert, and the model's own module in bf16.

    python benchmarks/experts.py [--threads 2] [--schemes W4A16_g128,W8A16,W8A8] [--json OUT]

One layer as Qwen3-30B-A3B has it, with half of its experts: 64 experts, 8 for each token, gate_up [1536, 2048] and down [2048, 768]. A time is of
everything between the router and the sum over experts; contenders take turns with fresh routing, and the 10th percentile counts. GB/s counts the
packed weights of the experts that were selected.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from qplug_core.device import Device
from qplug_core.engine.modules import QuantExperts
from qplug_core.kernel import Kernel
from qplug_core.kernels import builder
from qplug_core.layer import LayerSpec
from qplug_core.method import HubMethod, _Run
from qplug_core.registry import get_registry
from qplug_core.scheme import QuantScheme
from qplug_core.testing.weights import random_weight

EXPERTS, TOP, INNER, HIDDEN = 64, 8, 768, 2048
TOKENS = (1, 8, 64)
KERNELS = {"W4A16_g128": "gptq.cpu_wna16", "W8A16": "int8.cpu_w8a16", "W8A8": "int8.cpu_w8a8", "Wfp8A16": "fp8.cpu_wfp8a16"}


def quantized(scheme: str, original: Any) -> QuantExperts:
    """The module with random weights of ``scheme``."""
    registry = get_registry()
    kernel: Kernel = registry.load(registry.kernel(KERNELS[scheme]).decl)
    generator = torch.Generator().manual_seed(0)

    def methods(n: int, k: int) -> list[Any]:
        weight = random_weight(QuantScheme.parse(scheme), n, k, generator)
        made = []
        for e in range(EXPERTS):
            decision: Any = SimpleNamespace(layer=LayerSpec(f"experts.{e}", "experts", n, k))
            resolver: Any = SimpleNamespace(kernel=lambda name: kernel)
            method = HubMethod(decision, resolver, lambda name: None, torch.bfloat16)  # type: ignore[arg-type, return-value]
            method._runs = [_Run(kernel, kernel.pack(weight))]
            method._bind()
            made.append(method)
        return made

    return QuantExperts(methods(2 * INNER, HIDDEN), methods(HIDDEN, INNER), original, halves=False)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--schemes", default="W4A16_g128,W8A16,W8A8")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each contender and number of tokens")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = Qwen3MoeConfig(num_experts=EXPERTS, num_experts_per_tok=TOP, moe_intermediate_size=INNER, hidden_size=HIDDEN)
    config._experts_implementation = "eager"
    plain = Qwen3MoeExperts(config).to(torch.bfloat16).requires_grad_(False)
    for value in plain.parameters():
        value.normal_(std=0.02)
    contenders: dict[str, Any] = {}
    sizes: dict[str, float] = {}
    for scheme in arguments.schemes.split(","):
        module = quantized(scheme, plain)
        loop = QuantExperts.__new__(QuantExperts)
        loop.__dict__.update(module.__dict__)
        loop.groups = (None, None)
        contenders |= {f"{scheme} grouped": module, f"{scheme} one by one": loop}
        sizes |= dict.fromkeys((f"{scheme} grouped", f"{scheme} one by one"), module.up[0].nbytes + module.down[0].nbytes)
    contenders["bf16 of transformers"] = plain
    sizes["bf16 of transformers"] = 6.0 * INNER * HIDDEN
    rows: list[dict[str, Any]] = []
    print(f"{'contender':28} {'tokens':>6} {'ms':>8} {'GB/s':>6}")
    for m in TOKENS:
        times: dict[str, list[float]] = {name: [] for name in contenders}
        x = torch.randn(m, HIDDEN, dtype=torch.bfloat16)
        touched = []
        stop = time.perf_counter() + arguments.seconds * len(contenders)
        while time.perf_counter() < stop:
            logits = torch.randn(m, EXPERTS)
            weights, index = logits.softmax(-1).topk(TOP)
            weights = weights.to(torch.bfloat16)
            touched.append(len(index.unique()))
            for name, module in contenders.items():
                start = time.perf_counter()
                module(x, index, weights)
                times[name].append(time.perf_counter() - start)
        for name, found in times.items():
            ms = sorted(found)[len(found) // 10] * 1e3
            gbs = sum(touched) / len(touched) * sizes[name] / ms / 1e6
            rows.append({"contender": name, "tokens": m, "ms": ms, "gb_per_s": gbs, "calls": len(found)})
            print(f"{name:28} {m:6} {ms:8.3f} {gbs:6.1f}")
    if arguments.json:
        about = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": Device.cpu().name,
            "instruction_set": builder.instruction_set(Device.cpu()),
            "threads": arguments.threads,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "command": f"python benchmarks/experts.py --threads {arguments.threads} --schemes {arguments.schemes}",
        }
        arguments.json.write_text(json.dumps({"schema": 1, **about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
