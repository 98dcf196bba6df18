"""``fp8.triton_wfp8a16``: FP8 weights times 16-bit activations, on any GPU: codes are decoded from their bits, no FP8 unit is needed.

x ``[*, K]`` bfloat16 or float16; codes as stored, scales by tensor, channel, group or block: see ``qplug_core/kernels/triton_pack.py``.
"""

from __future__ import annotations

from qplug_core.kernels.triton_weight_only import TritonWeightOnly


class TritonWFP8A16(TritonWeightOnly):
    """Weight-only product for FP8 weights, e4m3 and e5m2."""

    name = "fp8.triton_wfp8a16"
    numbers = ("fp8_e4m3", "fp8_e5m2")
