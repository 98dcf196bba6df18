"""``gptq.cpu_wna16``: integer weights of 2 to 8 bits, with zero points and act order, on x86 CPUs.

x ``[*, K]`` float32, bfloat16 or float16; codes packed at their true width (5, 6 and 7 bits in a byte), scales and zero points in the dtype of the
checkpoint: see ``qplug_core/kernels/weight_only.c``. Act order costs a gather of x for each call.
"""

from __future__ import annotations

from qplug_core.kernels.cpu_weight_only import CpuWeightOnly


class CpuWNA16(CpuWeightOnly):
    """Weight-only product for GPTQ's schemes."""

    name = "gptq.cpu_wna16"
    bits = (2, 3, 4, 5, 6, 7, 8)
