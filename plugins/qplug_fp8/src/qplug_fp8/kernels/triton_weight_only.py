"""``fp8.triton_weight_only``: FP8 weights of schemes that quantize activations, on GPUs without FP8 units: activations stay at 16 bit.

The code of ``fp8.triton_wfp8a16``. It is declared ``mode="weight-only"``, because it computes another function than the checkpoint says.
"""

from __future__ import annotations

from qplug_core.kernels.triton_weight_only import TritonWeightOnly


class TritonFP8WeightOnly(TritonWeightOnly):
    """FP8 weights times activations that are left at 16 bit."""

    name = "fp8.triton_weight_only"
    numbers = ("fp8_e4m3", "fp8_e5m2")
    drops_act = True
