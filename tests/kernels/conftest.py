"""The instruction sets that kernels are tested with: all that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qplug_core.device import Device
from qplug_core.kernels import builder, cpu_emulated, cpu_w8a8, cpu_weight_only

HERE = [name for name in builder.SETS if name in Device.cpu().features]


def forget() -> None:
    for cached in (builder.load, cpu_weight_only._function, cpu_emulated._function, cpu_w8a8._functions):
        cached.cache_clear()


@pytest.fixture(params=HERE)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels are those of one instruction set, also where this machine has a better one."""
    forget()
    monkeypatch.setattr(builder, "instruction_set", lambda device: request.param)
    yield request.param
    forget()
