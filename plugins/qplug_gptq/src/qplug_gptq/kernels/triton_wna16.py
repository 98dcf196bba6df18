"""``gptq.triton_wna16``: integer weights of 2, 3, 4 or 8 bits, with zero points and act order, on NVIDIA and AMD GPUs.

x ``[*, K]`` bfloat16 or float16; codes packed at their true width, scales in the dtype of the checkpoint: see
``qplug_core/kernels/triton_pack.py``. Act order is an index that the kernel gathers x with; weights are sorted by group at load.
"""

from __future__ import annotations

from qplug_core.kernels.triton_weight_only import TritonWeightOnly


class TritonWNA16(TritonWeightOnly):
    """Weight-only product for GPTQ's schemes."""

    name = "gptq.triton_wna16"
    numbers = ("int2", "int3", "int4", "int8")
