"""``int8.cpu_w8a8_group``: INT8 weights times INT8 activations with scales by group or block, on x86 CPUs: codes are multiplied wider.

x ``[*, K]`` float32, bfloat16 or float16, quantized by token, group or a stored scale: see ``qplug_core/kernels/quantize.c``; the weights as
in ``cpu_w8a16``. Scales by channel or tensor are faster in ``cpu_w8a8``.
"""

from __future__ import annotations

from qplug_core.kernels.cpu_emulated import CpuEmulated


class CpuW8A8Group(CpuEmulated):
    """W8A8 with scales that change along K."""

    name = "int8.cpu_w8a8_group"
    bits = (8,)
