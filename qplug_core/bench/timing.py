"""Timing: contenders take turns in rounds, so that whatever disturbs the machine disturbs all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..device import Device
from .contender import Contender

LEAST = 6
"""Calls of each contender, however long they take."""
WARM = 1.0
"""Seconds at most that first calls of all copies take together; what allocates or compiles does so then."""
LONG = 0.01
"""Seconds of calls in a row before the next contender's turn, and two calls at least: the first of a turn finds threads asleep."""
PAUSE = 0.01
"""Seconds between two contenders, in which threads of the first that spin for work give up."""


@dataclass(frozen=True)
class Sample:
    """Seconds of single calls."""

    times: tuple[float, ...]

    @property
    def p10(self) -> float:
        """The 10th percentile: what a call takes when nothing disturbs it."""
        return sorted(self.times)[len(self.times) // 10]

    @property
    def median(self) -> float:
        """Half of the calls take longer."""
        return sorted(self.times)[len(self.times) // 2]


def take_turns(group: Sequence[Contender], inputs: Sequence[Any], seconds: float, device: Device) -> list[Sample]:
    """Times of ``group``, each with its input, about ``seconds`` of calls for each."""
    runs: list[Callable[[], list[float]]] = [
        (_Turns(c, x) if device.vendor == "cpu" else _GpuTurns(c, x, device)).turn
        for c, x in zip(group, inputs, strict=True)
    ]
    times: list[list[float]] = [[] for _ in runs]
    used = [0.0] * len(runs)
    first = 0

    def unfinished(i: int) -> bool:
        return used[i] < seconds or len(times[i]) < LEAST

    while any(map(unfinished, range(len(runs)))):
        for i in [*range(first, len(runs)), *range(first)]:
            if unfinished(i):
                taken = runs[i]()
                times[i] += taken
                used[i] += sum(taken)
                time.sleep(PAUSE)
        first = (first + 1) % len(runs)
    return [Sample(tuple(each)) for each in times]


class _Turns:
    """Calls in a row on the next copies of the weight, :data:`LONG` seconds of them."""

    def __init__(self, contender: Contender, x: Any) -> None:
        self.contender, self.x, self.next = contender, x, 0
        end = time.perf_counter() + WARM
        for call in contender.calls:
            call(x)
            if time.perf_counter() > end:
                break

    def turn(self) -> list[float]:
        times: list[float] = []
        while len(times) < 2 or sum(times) < LONG:
            call = self.contender.calls[self.next % len(self.contender.calls)]
            self.next += 1
            start = time.perf_counter()
            call(self.x)
            times.append(time.perf_counter() - start)
        return times


class _GpuTurns:
    """One pass over all copies of the weight, timed as a whole by events: a CUDA graph where the calls can be captured."""

    def __init__(self, contender: Contender, x: Any, device: Device) -> None:
        self.contender, self.x, self.device = contender, x, device
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.run: Callable[[], object] = self._launch
        stream = torch.cuda.Stream(device.index)
        stream.wait_stream(torch.cuda.current_stream(device.index))
        with torch.cuda.stream(stream):
            for _ in range(2):  # Compiles and tunes what does so at the first call.
                self._launch()
        torch.cuda.synchronize(device.index)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._launch()
        except RuntimeError as error:
            torch.cuda.synchronize(device.index)
            contender.note = "; ".join(
                filter(None, [contender.note, f"launched one by one, because no graph was captured ({_first_line(error)})"])
            )
        else:
            self.run = graph.replay

    def _launch(self) -> None:
        for call in self.contender.calls:
            call(self.x)

    def turn(self) -> list[float]:
        self.start.record()
        self.run()
        self.end.record()
        self.end.synchronize()
        return [self.start.elapsed_time(self.end) / 1e3 / len(self.contender.calls)]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
