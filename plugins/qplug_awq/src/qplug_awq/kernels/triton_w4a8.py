"""``awq.triton_w4a8``: integer weights of 4 bits with zero points times INT8 activations on NVIDIA and AMD GPUs, exact in int32.

x ``[*, K]`` bfloat16 or float16, quantized by token or tensor; codes packed at their true width, widened to int8 in registers: see
``qplug_core/kernels/triton_mixed.py``.
"""

from __future__ import annotations

from qplug_core.kernels.triton_mixed import TritonMixed


class TritonW4A8(TritonMixed):
    """Product of 4-bit integers and INT8 codes."""

    name = "awq.triton_w4a8"
    numbers = ("int4",)
    act = "int8"
