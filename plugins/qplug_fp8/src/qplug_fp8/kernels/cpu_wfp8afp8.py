"""``fp8.cpu_wfp8afp8``: FP8 weights times FP8 activations on x86 CPUs, which have no FP8 units: codes are multiplied wider.

x ``[*, K]`` float32, bfloat16 or float16, quantized by token, group, tensor or a stored scale: see ``qplug_core/kernels/quantize.c``; the
weights as in ``cpu_wfp8a16``.
"""

from __future__ import annotations

from qplug_core.kernels.cpu_emulated import CpuEmulated


class CpuWFP8AFP8(CpuEmulated):
    """Product of 8-bit floats, on given codes exact but for the summation in float32."""

    name = "fp8.cpu_wfp8afp8"
    numbers = ("fp8_e4m3", "fp8_e5m2")
