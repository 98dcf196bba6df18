"""``fp4.triton_wnvfp4anvfp4``: NVFP4 weights times NVFP4 activations on GPUs whose matrix units multiply both with their block scales.

x ``[*, K]`` bfloat16 or float16, quantized in groups of 16 under the stored scale of the layer: see ``qplug_core/kernels/triton_microscaled.py``.
"""

from __future__ import annotations

from qplug_core.kernels.triton_microscaled import TritonMicroscaled


class TritonWNVFP4ANVFP4(TritonMicroscaled):
    """Product of NVFP4 codes."""

    name = "fp4.triton_wnvfp4anvfp4"
    scale = "e4m3"
