"""``gptq.cpu_w4a8``: integer weights of 4 bits times INT8 or FP8 activations on x86 CPUs: codes are multiplied wider.

x ``[*, K]`` float32, bfloat16 or float16, quantized by token, tensor or a stored scale: see ``qplug_core/kernels/quantize.c``; the weights as
in ``cpu_wna16``.
"""

from __future__ import annotations

from qplug_core.kernels.cpu_emulated import CpuEmulated


class CpuW4A8(CpuEmulated):
    """Product of 4-bit integers and 8-bit codes, on given codes exact but for the summation in float32."""

    name = "gptq.cpu_w4a8"
    bits = (4,)
