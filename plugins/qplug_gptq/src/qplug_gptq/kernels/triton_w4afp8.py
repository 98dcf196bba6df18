"""``gptq.triton_w4afp8``: integer weights of 4 bits times FP8 activations on GPUs with FP8 units, W4AFP8; on gfx942 in e4m3fnuz.

x ``[*, K]`` bfloat16 or float16, quantized by token or tensor; a code becomes the FP8 number of the same value in registers: see
``qplug_core/kernels/triton_mixed.py``.
"""

from __future__ import annotations

from qplug_core.kernels.triton_mixed import TritonMixed


class TritonW4AFP8(TritonMixed):
    """Product of 4-bit integers and FP8 codes."""

    name = "gptq.triton_w4afp8"
    numbers = ("int4",)
    act = "fp8_e4m3"
