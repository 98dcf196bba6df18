"""``fp4.triton_wfp4a16``: NVFP4, MXFP4 and MXFP8 weights times 16-bit activations, on any GPU: codes and scales are decoded from their bits.

x ``[*, K]`` bfloat16 or float16; two codes to a byte, scales as stored, E4M3, E8M0 or floats: see ``qplug_core/kernels/triton_pack.py``.
"""

from __future__ import annotations

from qplug_core.kernels.triton_weight_only import TritonWeightOnly


class TritonWFP4A16(TritonWeightOnly):
    """Weight-only product for FP4 and MXFP8 weights."""

    name = "fp4.triton_wfp4a16"
    numbers = ("fp4_e2m1", "fp8_e4m3")
