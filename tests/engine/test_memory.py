from __future__ import annotations

from qplug_core.engine import memory


def test_freed_memory_goes_back_after_every_16_mb_that_were_loaded(monkeypatch):
    calls = []
    monkeypatch.setattr(memory, "trim", lambda: calls.append(1))
    heap = memory.Heap()
    for _ in range(7):
        heap.loaded(2**22)
    assert len(calls) == 1
    heap.loaded(2**30)
    assert len(calls) == 2
