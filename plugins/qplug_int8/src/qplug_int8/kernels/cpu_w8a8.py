"""``int8.cpu_w8a8``: int8 weights times int8 activations on x86 CPUs.

x ``[*, K]`` float32, bfloat16 or float16 is quantized by token (or by a stored scale) in float32; products of codes are summed
exactly in int32: see ``qplug_core/kernels/int8.c``.
"""

from __future__ import annotations

from qplug_core.kernels.cpu_w8a8 import CpuInt8


class CpuW8A8(CpuInt8):
    """W8A8 with dynamic or static activation scales."""

    name = "int8.cpu_w8a8"
