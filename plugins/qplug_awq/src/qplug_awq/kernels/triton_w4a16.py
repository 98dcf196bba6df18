"""``awq.triton_w4a16``: integer weights of 4 or 8 bits with zero points, on NVIDIA and AMD GPUs.

x ``[*, K]`` bfloat16 or float16; codes packed at their true width: see ``qplug_core/kernels/triton_pack.py``.
"""

from __future__ import annotations

from qplug_core.kernels.triton_weight_only import TritonWeightOnly


class TritonW4A16(TritonWeightOnly):
    """Weight-only product for AWQ's schemes."""

    name = "awq.triton_w4a16"
    numbers = ("int4", "int8")
