"""Devices: names, patterns, and what is known of each."""

from __future__ import annotations

import pytest

from qplug_core.device import REPORTED, Device
from qplug_core.errors import DeviceError


@pytest.mark.parametrize("name", REPORTED)
def test_every_reported_device_is_itself(name):
    device = Device.from_name(name)
    assert device.matches(name)
    assert device.matches("any")


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("sm_90", "sm_80+", True),
        ("sm_100", "sm_90+", True),
        ("sm_75", "sm_80+", False),
        ("sm_86", "sm_80", False),
        ("sm_86", "sm_80-sm_89", True),
        ("sm_90", "sm_80-sm_89", False),
        ("sm_90", "cuda", True),
        ("sm_90", "rocm", False),
        ("gfx942", "gfx90a+", True),
        ("gfx1100", "gfx90a+", False),
        ("gfx1201", "gfx942+", False),
        ("gfx1100", "gfx11*", True),
        ("avx512_vnni", "avx512", True),
        ("avx512", "avx512_vnni", False),
        ("avx512", "cpu", True),
        ("sm_90", "cpu", False),
        ("sm_90", "avx2", False),
    ],
)
def test_patterns(name, pattern, expected):
    assert Device.from_name(name).matches(pattern) is expected


def test_fp8_of_the_right_kind():
    assert "fp8" in Device.from_name("sm_89").features
    assert "fp8" not in Device.from_name("sm_86").features
    assert "fp8_fnuz" in Device.from_name("gfx942").features
    assert "fp8_fnuz" not in Device.from_name("gfx950").features


def test_unknown_name_shows_near_ones():
    with pytest.raises(DeviceError, match="sm_90"):
        Device.from_name("sm_9O")


def test_this_machine_has_a_processor():
    cpu = Device.cpu()
    assert cpu.matches("cpu")
    assert cpu.memory > 0
    assert cpu.torch_device() == "cpu"
