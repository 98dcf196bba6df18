"""``fp8.cpu_wfp8a16``: FP8 weights times 16-bit or float32 activations on x86 CPUs.

x ``[*, K]`` float32, bfloat16 or float16; codes e4m3 or e5m2, one byte each; scales by tensor, channel, group or block in the dtype of the
checkpoint, E8M0 as bytes. See ``qplug_core/kernels/weight_only.c``.
"""

from __future__ import annotations

from qplug_core.kernels.cpu_weight_only import CpuWeightOnly


class CpuWFP8A16(CpuWeightOnly):
    """Weight-only product of 8-bit floats."""

    name = "fp8.cpu_wfp8a16"
    numbers = ("fp8_e4m3", "fp8_e5m2")
