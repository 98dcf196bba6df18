"""``fp4.triton_wfp4afp8``: MXFP4 weights, and NVFP4 by groups of 32, times FP8 activations on GPUs with FP8 units; on gfx942 in e4m3fnuz.

x ``[*, K]`` bfloat16 or float16, quantized by token or tensor; an e2m1 code becomes the FP8 number of the same value in registers: see
``qplug_core/kernels/triton_mixed.py``. Groups of 16 are left to the weight-only kernel: FP8 units multiply 32 columns at once.
"""

from __future__ import annotations

from qplug_core.kernels.triton_mixed import TritonMixed


class TritonWFP4AFP8(TritonMixed):
    """Product of FP4 and FP8 codes."""

    name = "fp4.triton_wfp4afp8"
    numbers = ("fp4_e2m1",)
    act = "fp8_e4m3"
