"""``rocm.triton_ptpc``: FP8 with a scale for each token and each out channel (PTPC) on AMD's CDNA, on gfx942 in e4m3fnuz.

x ``[*, K]`` bfloat16 or float16, quantized by token; weights ``[N, K]``, float32 scales ``[N]``: see ``qplug_core/kernels/triton_scaled.py``.
A code of e4m3fnuz is half of the same code of e4m3fn, so that twice the scale gives the same number: nothing is rounded again.
"""

from __future__ import annotations

from qplug_core.kernels.triton_scaled import TritonScaled


class TritonPTPC(TritonScaled):
    """Row-wise FP8 product."""

    name = "rocm.triton_ptpc"
    number = "fp8_e4m3"
