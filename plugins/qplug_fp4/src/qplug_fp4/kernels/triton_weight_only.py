"""``fp4.triton_weight_only``: FP4 and MXFP8 weights of schemes that quantize activations, on any GPU: activations stay at 16 bit.

The code of ``fp4.triton_wfp4a16``. It is declared ``mode="weight-only"``, because it computes another function than the checkpoint says.
"""

from __future__ import annotations

from qplug_core.kernels.triton_weight_only import TritonWeightOnly


class TritonFP4WeightOnly(TritonWeightOnly):
    """FP4 and MXFP8 weights times activations that are left at 16 bit."""

    name = "fp4.triton_weight_only"
    numbers = ("fp4_e2m1", "fp8_e4m3")
    drops_act = True
