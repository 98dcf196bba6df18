"""``fp4.triton_wmxamx``: MXFP4 and MXFP8 weights times MXFP4 and MXFP8 activations on GPUs whose matrix units multiply E8M0 block scales.

x ``[*, K]`` bfloat16 or float16, quantized in groups of 32 by the rule of the checkpoint: see ``qplug_core/kernels/triton_microscaled.py``.
"""

from __future__ import annotations

from qplug_core.kernels.triton_microscaled import TritonMicroscaled


class TritonWMXAMX(TritonMicroscaled):
    """Product of MX codes, FP4 or FP8."""

    name = "fp4.triton_wmxamx"
    scale = "e8m0"
