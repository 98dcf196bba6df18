"""``fp4.cpu_wfp4afp4``: FP4 and MXFP8 weights times FP4 or FP8 activations on x86 CPUs, which have no such units: codes are multiplied wider.

x ``[*, K]`` float32, bfloat16 or float16, quantized by the rules of NVFP4 and MX, or by token: see ``qplug_core/kernels/quantize.c``; the
weights as in ``cpu_wfp4a16``.
"""

from __future__ import annotations

from qplug_core.kernels.cpu_emulated import CpuEmulated


class CpuWFP4AFP4(CpuEmulated):
    """Product of microscaled floats, on given codes exact but for the summation in float32."""

    name = "fp4.cpu_wfp4afp4"
    numbers = ("fp4_e2m1", "fp8_e4m3")
