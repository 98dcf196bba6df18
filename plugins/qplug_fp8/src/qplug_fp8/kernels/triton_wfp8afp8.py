"""``fp8.triton_wfp8afp8``: FP8 weights times FP8 activations on GPUs with FP8 units; on gfx942 in e4m3fnuz, exactly.

x ``[*, K]`` bfloat16 or float16, quantized by token, tensor or group of K; weights ``[N, K]`` with scales by tensor, channel or block: see
``qplug_core/kernels/triton_scaled.py``.
"""

from __future__ import annotations

from qplug_core.kernels.triton_scaled import TritonScaled


class TritonWFP8AFP8(TritonScaled):
    """FP8 product, tensor, row-wise and by block."""

    name = "fp8.triton_wfp8afp8"
    number = "fp8_e4m3"
