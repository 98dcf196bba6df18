"""``awq.cpu_w4a16``: integer weights of 4 or 8 bits, with zero points, on x86 CPUs.

x ``[*, K]`` float32, bfloat16 or float16; codes packed at their true width, scales and zero points in the dtype of the
checkpoint: see ``qplug_core/kernels/weight_only.c``. A ``pre_scale [K]`` is multiplied onto x first.
"""

from __future__ import annotations

from qplug_core.kernels.cpu_weight_only import CpuWeightOnly


class CpuW4A16(CpuWeightOnly):
    """Weight-only product for AWQ's schemes."""

    name = "awq.cpu_w4a16"
    bits = (4, 8)
