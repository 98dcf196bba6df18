"""What the machine can do at best: reading memory, and multiplying in bf16. Measured in the same run as the kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..device import Device


@dataclass(frozen=True)
class Limits:
    """``read``: bytes a second of a sum over memory; ``matmul``: operations a second of a large bf16 product."""

    read: float
    matmul: float

    def floor(self, nbytes: int, operations: int) -> float:
        """Seconds that reading ``nbytes`` or doing ``operations`` takes at best, whichever is longer."""
        return max(nbytes / self.read, operations / self.matmul)

    def best(self, other: Limits) -> Limits:
        """The higher of both: what disturbed one measurement is no limit of the machine."""
        return Limits(max(self.read, other.read), max(self.matmul, other.matmul))


def measure_limits(device: Device, quick: bool = False) -> Limits:
    """Both limits, the best of a few tries, with as many threads as torch uses."""
    where = device.torch_device()
    nbytes = 2**28 if quick else 2**30
    # Adding 64-bit integers is slow on a GPU, and the fastest sum on a CPU.
    dtype = torch.int64 if device.vendor == "cpu" else torch.float32
    data = torch.ones(nbytes // dtype.itemsize, dtype=dtype, device=where)
    read = data.nbytes / _best(data.sum, device, 3 if quick else 8)
    del data
    m, n, k = (256, 1024, 1024) if quick else (2048, 4096, 4096)
    if device.vendor != "cpu":
        m, n, k = 8192, 8192, 8192
    x, weight = (torch.randn(rows, k, device=where).to(torch.bfloat16) for rows in (m, n))
    matmul = 2 * m * n * k / _best(lambda: torch.nn.functional.linear(x, weight), device, 3 if quick else 6)
    return Limits(read, matmul)


def _best(call: Callable[[], object], device: Device, tries: int) -> float:
    best = float("inf")
    for _ in range(tries + 1):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def synchronize(device: Device) -> None:
    """Wait for what was launched."""
    if device.vendor != "cpu":
        torch.cuda.synchronize(device.index)
