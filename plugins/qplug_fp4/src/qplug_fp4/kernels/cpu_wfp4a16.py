"""``fp4.cpu_wfp4a16``: FP4 weights (NVFP4, MXFP4, plain groups) and MXFP8 weights times 16-bit or float32 activations on x86 CPUs.

x ``[*, K]`` float32, bfloat16 or float16; two codes to a byte, looked up in registers; block scales e4m3 or E8M0 as bytes, the global scale
multiplies sums. See ``qplug_core/kernels/weight_only.c``.
"""

from __future__ import annotations

from qplug_core.kernels.cpu_weight_only import CpuWeightOnly


class CpuWFP4A16(CpuWeightOnly):
    """Weight-only product of FP4 and MXFP8."""

    name = "fp4.cpu_wfp4a16"
    numbers = ("fp4_e2m1", "fp8_e4m3")
