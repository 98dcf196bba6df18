"""``int8.cpu_wint2``: the 2-bit convolutional code of FastDeploy times 16-bit or float32 activations on x86 CPUs.

x ``[*, K]`` float32, bfloat16 or float16; the weight stays in its stored bytes, a quarter of a byte for each column: see
``qplug_core/kernels/wint2.c``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qplug_core.device import Device
from qplug_core.kernel import Kernel, PackedWeight, Problem
from qplug_core.kernels import builder
from qplug_core.kernels.cpu_wint2 import pack, wint2, wint2_experts
from qplug_core.support import Refusal
from qplug_core.weight import OpaqueWeight, QuantWeight

from ..paddle.ccq import local_scales


class CpuWINT2(Kernel):
    """Weight-only product of encoding ``ccq2``."""

    name = "int8.cpu_wint2"
    grouped = True

    def supports(self, problem: Problem, device: Device) -> list[Refusal]:
        """Refuses other encodings, a part of a stored weight that begins within a byte, and machines without AVX2 or compiler."""
        refusals = [*builder.refusals("wint2", device), *builder.refusals("weight_only", device)]
        if problem.op not in ("linear", "experts", "lm_head"):
            refusals.append(Refusal("op", f"operation {problem.op}", "linear, experts or lm_head"))
        weight = problem.scheme.weight
        if weight is None or weight.dtype != "ccq2" or problem.encoding not in ("", "ccq2"):
            have = f"encoding {problem.encoding}" if problem.encoding else f"scheme {problem.scheme}"
            refusals.append(Refusal("scheme", have, "whole weights in the encoding ccq2"))
        if problem.scheme.act is not None:
            refusals.append(Refusal("scheme", f"activations of {problem.scheme.act.dtype}", "16-bit or float32 activations"))
        if problem.pre_scale or problem.act_shift:
            refusals.append(Refusal("scheme", "scaled or shifted activations", "activations as they are"))
        if problem.k % 128:
            refusals.append(Refusal("shape", f"K = {problem.k}", "whole bytes of local scales, 128 columns each"))
        if problem.dtype not in ("float32", "bfloat16", "float16"):
            refusals.append(Refusal("dtype", f"activations {problem.dtype}", "float32, bfloat16 or float16"))
        return list(dict.fromkeys(refusals))

    def pack(self, weight: QuantWeight | OpaqueWeight, out: PackedWeight | None = None) -> PackedWeight:
        """The stored bytes in tiles of 16 rows; local scales take a byte each."""
        assert isinstance(weight, OpaqueWeight)
        stored = weight.stored
        maps = torch.stack([stored[name].float().reshape(-1) for name in ("code_scale", "code_zp", "super_scales")])
        tensors = pack(stored["quant_weight"].view(torch.uint8), local_scales(stored["weight_scale"]), maps)
        packed = PackedWeight(self.name, weight.n, weight.k, tensors)
        return packed if out is None else out.refill(packed)

    def apply(self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """``x [*, K]`` float32, bfloat16 or float16 to ``[*, N]``; ``bias [N]`` of any of these."""
        t = packed.tensors
        y: Tensor = wint2(x, t["codes"], t["maps"], t["locals"], bias, packed.n)
        return y

    def apply_experts(self, x: Tensor, packed: PackedWeight, ends: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :meth:`qplug_core.kernel.Kernel.apply_experts`."""
        t = packed.tensors
        y: Tensor = wint2_experts(x, t["codes"], t["maps"], t["locals"], bias, ends, packed.n)
        return y
