"""``int8.cpu_w8a16``: int8 weights times 16-bit or float32 activations on x86 CPUs.

x ``[*, K]`` float32, bfloat16 or float16; codes one byte each, scales by group, channel or tensor in the dtype of the checkpoint:
see ``qplug_core/kernels/weight_only.c``.
"""

from __future__ import annotations

from qplug_core.kernels.cpu_weight_only import CpuWeightOnly


class CpuW8A16(CpuWeightOnly):
    """Weight-only product of 8 bits."""

    name = "int8.cpu_w8a16"
    bits = (8,)
