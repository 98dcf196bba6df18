"""``bitsandbytes.cpu_wnf4a16``: NF4 and bitsandbytes' FP4 times 16-bit or float32 activations on x86 CPUs.

x ``[*, K]`` float32, bfloat16 or float16; two codes to a byte, looked up in registers in a table of 16 values, which is rounded to bfloat16
where x is and the CPU multiplies that. See ``qplug_core/kernels/weight_only.c``.
"""

from __future__ import annotations

from qplug_core.kernels.cpu_weight_only import CpuWeightOnly


class CpuWNF4A16(CpuWeightOnly):
    """Weight-only product of 4-bit codebooks."""

    name = "bitsandbytes.cpu_wnf4a16"
    numbers = ("nf4", "fp4_bnb")
