"""Linear kernels on this CPU, side by side with torch's own and with the read limit of the memory, all in one run.

    python benchmarks/cpu_linear.py [--threads 2] [--quick] [--json OUT] [--schemes W4A16_g128,Wfp8A16]

Every call reads other copies of the weight than the last one, together larger than the cache. Contenders take turns in rounds; a time
is the 10th percentile of all calls; with one thread it is CPU time of that thread, which preemption does not spoil. GB/s counts the
packed weight, scales included. The error is relative Frobenius, against float64 on the dequantized weight (so it includes what quantizing
activations costs).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone

import torch
import torch.nn.functional as F
from torch import Tensor

from qplug_core.device import Device
from qplug_core.kernels import builder
from qplug_core.kernels.cpu_emulated import CpuEmulated
from qplug_core.kernels.cpu_w8a8 import CpuInt8
from qplug_core.kernels.cpu_weight_only import TYPES, CpuWeightOnly
from qplug_core.scheme import QuantScheme
from qplug_core.testing.weights import random_weight

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
TOKENS = (1, 8, 512)
CACHE = 96 * 2**20
"""Bytes of copies to go round: three times the largest L3 cache that one core sees today, roughly."""

SLOW = 4.0
"""Seconds: a contender that would take longer for one call is left out, with its estimate."""

Call = Callable[[Tensor], Tensor]


def now() -> float:
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


@dataclass
class Contender:
    """A way to multiply: calls on copies of one weight, bytes of one copy, dtype of x, and the weight it stands for.

    ``least``: rows of x that it needs; ``integers``: whether x must hold small integers.
    """

    name: str
    calls: list[Call]
    nbytes: int
    dtype: torch.dtype
    weight: Tensor
    least: int = 1
    integers: bool = False


@dataclass
class Row:
    """One measured time."""

    n: int
    k: int
    m: int
    name: str
    ms: float
    gb_per_s: float
    of_read_limit: float
    gflop_per_s: float
    error: float


class WeightOnly(CpuWeightOnly):
    name = "benchmark"
    numbers = tuple(TYPES)


class Emulated(CpuEmulated):
    name = "benchmark"
    numbers = tuple(TYPES)


class Int8(CpuInt8):
    name = "benchmark"


def read_limit(rounds: int) -> float:
    """Best GB/s of a sum over 1 GiB of int64, with as many threads as torch uses."""
    data = torch.ones(2**27, dtype=torch.int64)
    best = 0.0
    for _ in range(rounds):
        start = now()
        data.sum()
        best = max(best, data.nbytes / (now() - start) / 1e9)
    return best


def copies(nbytes: int, make: Callable[[], Call]) -> list[Call]:
    return [make() for _ in range(max(1, -(-CACHE // nbytes)))]


def ours(scheme: str, n: int, k: int, dtype: torch.dtype) -> Contender:
    parsed = QuantScheme.parse(scheme)
    kernel = WeightOnly() if parsed.act is None else Int8() if scheme.startswith("W8A8") else Emulated()
    weight = random_weight(parsed, n, k, torch.Generator().manual_seed(0), scale_dtype=torch.float16)
    packed = kernel.pack(weight)

    def make() -> Call:
        own = replace(packed, tensors={name: t.clone() for name, t in packed.tensors.items()})
        return lambda x: kernel.apply(x, own)

    name = f"qplug {scheme} {str(dtype).removeprefix('torch.')}"
    return Contender(name, copies(packed.nbytes, make), packed.nbytes, dtype, weight.dequantize())


def plain(n: int, k: int, dtype: torch.dtype) -> Contender:
    weight = torch.randn(n, k, dtype=dtype)

    def make() -> Call:
        own = weight.clone()
        return lambda x: F.linear(x, own)

    return Contender(
        f"F.linear {str(dtype).removeprefix('torch.')}", copies(weight.nbytes, make), weight.nbytes, dtype, weight.float()
    )


def int8pack(n: int, k: int) -> Contender:
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    scales = torch.rand(n).bfloat16()

    def make() -> Call:
        own = codes.clone()
        return lambda x: torch._weight_int8pack_mm(x, own, scales)

    weight = codes.float() * scales.float()[:, None]
    return Contender("torch._weight_int8pack_mm bfloat16", copies(codes.nbytes, make), codes.nbytes, torch.bfloat16, weight)


def int4pack(n: int, k: int) -> Contender:
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    scales = torch.rand(k // 128, n, 1).bfloat16()
    both = torch.cat([scales, torch.zeros_like(scales)], dim=-1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)

    def make() -> Call:
        own = packed.clone()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, own, 128, both)

    weight = (codes.float() - 8) * scales.float().squeeze(-1).T.repeat_interleave(128, dim=1)
    nbytes = packed.nbytes + both.nbytes
    return Contender("torch._weight_int4pack_mm_for_cpu bfloat16", copies(nbytes, make), nbytes, torch.bfloat16, weight)


def int_mm(n: int, k: int) -> Contender:
    codes = torch.randint(-127, 128, (k, n), dtype=torch.int8)

    def make() -> Call:
        own = codes.clone()
        # Codes only: no scale is computed or applied.
        return lambda x: torch._int_mm(x.to(torch.int8), own)

    calls = copies(codes.nbytes, make)
    return Contender(
        "torch._int_mm, codes only", calls, codes.nbytes, torch.float32, codes.T.float(), least=17, integers=True
    )


SCHEMES = (
    "W2A16_g128", "W3A16_g128", "W4A16_g128", "W4A16_g128_asym", "W4A16_g32", "WNF4A16", "Wnvfp4A16", "Wmxfp4A16", "W8A16", "Wfp8A16",
    "Wfp8A16_b128x128", "W8A8", "W4A8_g128", "Wfp8Afp8_b128x128",
)  # fmt: skip


def onednn_int8(n: int, k: int) -> Contender:
    """oneDNN's W8A8 as torch calls it, with one scale for x that is given: nothing is computed from x but its codes."""
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    scales = torch.rand(n) * 0.01 + 0.005
    zeros = torch.zeros(n, dtype=torch.int64)
    calls: list[Call] = []
    for _ in range(max(1, -(-CACHE // codes.nbytes))):
        packed = torch.ops.onednn.qlinear_prepack(codes.clone(), None)

        def call(x: Tensor, packed: Tensor = packed) -> Tensor:
            q = torch.clamp(torch.round(x.float() / 0.05) + 128, 0, 255).to(torch.uint8)
            y: Tensor = torch.ops.onednn.qlinear_pointwise(
                q, 0.05, 128, packed, scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
            )
            return y

        calls.append(call)
    return Contender(
        "onednn.qlinear_pointwise, given scale", calls, codes.nbytes, torch.bfloat16, codes.float() * scales[:, None]
    )


def contenders(n: int, k: int, schemes: Sequence[str]) -> list[Contender]:
    bf16 = torch.bfloat16
    return [
        *(ours(s, n, k, bf16) for s in schemes),
        ours("W4A16_g128", n, k, torch.float32),
        plain(n, k, torch.float32),
        plain(n, k, bf16),
        int8pack(n, k),
        int4pack(n, k),
        onednn_int8(n, k),
        int_mm(n, k),
    ]


def measure(shape: tuple[int, int], m: int, group: list[Contender], limit: float, seconds: float) -> list[Row]:
    """Rounds in which every contender is called twice, until each had ``seconds`` (and at least 3 rounds)."""
    n, k = shape
    x = torch.randn(m, k)
    errors: dict[str, float] = {}
    order, inputs = [], {}
    for c in group:
        if m < c.least:
            continue
        given = (x.round() if c.integers else x).to(c.dtype)
        rows = given[:32]
        start = now()
        y = c.calls[0](rows).double()
        expected = (now() - start) * m / len(rows)
        if expected > SLOW:
            print(f"  {c.name}: left out, one call would take about {expected:.0f} s")
            continue
        exact = rows.double() @ c.weight.double().T
        errors[c.name] = float((y - exact).norm() / exact.norm())
        order.append(c)
        inputs[c.name] = given
    times: dict[str, list[float]] = {c.name: [] for c in order}
    used = {c.name: 0.0 for c in order}
    turn = 0
    while any(used[c.name] < seconds or len(times[c.name]) < 6 for c in order):
        for c in order[turn % len(order) :] + order[: turn % len(order)]:
            if used[c.name] >= seconds and len(times[c.name]) >= 6:
                continue
            for _ in range(2):
                call = c.calls[len(times[c.name]) % len(c.calls)]
                start = now()
                call(inputs[c.name])
                times[c.name].append(now() - start)
                used[c.name] += times[c.name][-1]
        turn += 1
    rows_out = []
    for c in order:
        best = sorted(times[c.name])[len(times[c.name]) // 10]
        rate = c.nbytes / best / 1e9
        rows_out.append(Row(n, k, m, c.name, best * 1e3, rate, rate / limit, 2 * m * n * k / best / 1e9, errors[c.name]))
    return rows_out


def overhead() -> dict[str, float]:
    """Microseconds of one call on a weight [16, 32] at M = 1: the bare C function, the operation, and ``apply``."""
    import qplug_core.kernels.cpu_weight_only as module

    kernel = WeightOnly()
    packed = kernel.pack(random_weight(QuantScheme.parse("W4A16_g32"), 16, 32))
    t = packed.tensors
    x = torch.randn(1, 32).bfloat16()
    y = torch.empty(1, 16).bfloat16()
    function = module._function()
    arguments = (
        y.data_ptr(), x.data_ptr(), t["codes"].data_ptr(), None, t["scales"].data_ptr(), None, None, t["segments"].data_ptr(), None, None,
        None, 1, 16, 32, 32, 1, 1, 0, packed.meta["type"], 1, 1, 0, 0, 1,
    )  # fmt: skip
    int8 = Int8()
    int8_packed = int8.pack(random_weight(QuantScheme.parse("W8A8"), 16, 32))
    linear = torch.nn.Linear(32, 16, dtype=torch.bfloat16)
    operation = module.weight_only
    calls: dict[str, Callable[[], object]] = {
        "C function through ctypes": lambda: function(*arguments),
        "operation qplug::weight_only": lambda: operation(
            x, t["codes"], None, t["scales"], None, None, t["segments"], None, None, None, 16, packed.meta["type"], 0, None
        ),
        "apply of weight-only": lambda: kernel.apply(x, packed),
        "apply of W8A8": lambda: int8.apply(x, int8_packed),
        "nn.Linear bfloat16": lambda: linear(x),
    }
    found = {}
    with torch.inference_mode():
        for name, call in calls.items():
            samples = []
            for _ in range(30):
                start = now()
                for _ in range(500):
                    call()
                samples.append((now() - start) / 500 * 1e6)
            found[name] = sorted(samples)[3]
    return found


def machine() -> dict[str, object]:
    version = subprocess.run(["cc", "--version"], capture_output=True, text=True, check=False).stdout.splitlines()[:1]
    return {
        "cpu": Device.cpu().name,
        "kernels_for": builder.instruction_set(Device.cpu()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compiler": version[0] if version else "",
        "system": platform.platform(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each contender, shape and M")
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="ours, with commas")
    parser.add_argument("--json", metavar="OUT")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    facts = machine()
    print(", ".join(f"{name}: {value}" for name, value in facts.items()))
    calls = overhead()
    print("\nmicroseconds for one call, [16, 32], M = 1, inference mode")
    for name, us in calls.items():
        print(f"  {name:34s}{us:8.1f}")
    rows, limits = [], []
    with torch.inference_mode():
        for shape in SHAPES[:1] if options.quick else SHAPES:
            group = contenders(*shape, options.schemes.split(","))
            for m in TOKENS:
                limits.append(read_limit(8))
                print(f"\n[N, K] = {list(shape)}, M = {m}, read limit {limits[-1]:.1f} GB/s")
                print(f"  {'':44s}{'ms':>9s}{'GB/s':>8s}{'of limit':>10s}{'GFLOP/s':>10s}{'error':>11s}")
                for row in measure(shape, m, group, limits[-1], options.seconds):
                    rows.append(row)
                    print(
                        f"  {row.name:44s}{row.ms:9.3f}{row.gb_per_s:8.1f}{row.of_read_limit:10.0%}{row.gflop_per_s:10.1f}{row.error:11.1e}"
                    )
    if options.json:
        result = {
            "schema": 1,
            "machine": facts,
            "read_limits": limits,
            "overhead_us": calls,
            "rows": [asdict(r) for r in rows],
        }
        with open(options.json, "w") as out:
            json.dump(result, out, indent=1)


if __name__ == "__main__":
    main()
