"""``int8.triton_w8a8``: INT8 weights times INT8 activations on NVIDIA and AMD GPUs, exact in int32.

x ``[*, K]`` bfloat16 or float16, quantized by token or tensor, with zero points or without; weights ``[N, K]`` with scales by tensor or
channel: see ``qplug_core/kernels/triton_scaled.py``.
"""

from __future__ import annotations

from qplug_core.kernels.triton_scaled import TritonScaled


class TritonW8A8(TritonScaled):
    """INT8 product."""

    name = "int8.triton_w8a8"
    number = "int8"
