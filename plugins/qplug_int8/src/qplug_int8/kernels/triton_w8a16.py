"""``int8.triton_w8a16``: INT8 weights times 16-bit activations on NVIDIA and AMD GPUs.

x ``[*, K]`` bfloat16 or float16; one byte for each weight, scales by tensor, channel or group, zero points: see
``qplug_core/kernels/triton_pack.py``.
"""

from __future__ import annotations

from qplug_core.kernels.triton_weight_only import TritonWeightOnly


class TritonW8A16(TritonWeightOnly):
    """Weight-only product for INT8 weights."""

    name = "int8.triton_w8a16"
    numbers = ("int8",)
