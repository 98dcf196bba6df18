"""``int8.triton_w8a8_group``: INT8 weights with scales by group times INT8 activations on NVIDIA and AMD GPUs, each group exact in int32.

x ``[*, K]`` bfloat16 or float16, quantized by token or tensor; weights ``[N, K]`` with scales by group and zero points: see
``qplug_core/kernels/triton_mixed.py``.
"""

from __future__ import annotations

from qplug_core.kernels.triton_mixed import TritonMixed


class TritonW8A8Group(TritonMixed):
    """INT8 product with scales by group of columns."""

    name = "int8.triton_w8a8_group"
    numbers = ("int8",)
    act = "int8"
