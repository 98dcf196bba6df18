"""``bitsandbytes.triton_wnf4a16``: NF4 and FP4 codebooks times 16-bit activations on NVIDIA and AMD GPUs.

x ``[*, K]`` bfloat16 or float16; two codes to a byte, float scales by group, values selected from a table of 16: see
``qplug_core/kernels/triton_pack.py``.
"""

from __future__ import annotations

from qplug_core.kernels.triton_weight_only import TritonWeightOnly


class TritonWNF4A16(TritonWeightOnly):
    """Weight-only product for the 4-bit codebooks of bitsandbytes."""

    name = "bitsandbytes.triton_wnf4a16"
    numbers = ("nf4", "fp4_bnb")
