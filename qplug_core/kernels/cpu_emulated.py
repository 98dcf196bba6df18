"""Quantized activations on x86 CPUs that have no units for them: codes are computed as defined, then multiplied wider.

``qplug::quantize_codes`` makes codes as bfloat16 values (``quantize.c``), which hold every code exactly; ``qplug::weight_only`` multiplies
them, and their scales multiply sums. So results differ from exact ones by the summation in float32 and the rounding of the output alone.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ..device import Device
from ..kernel import PackedWeight, Problem
from ..scheme import NUMBER_TYPES, TensorQuant
from ..support import Refusal
from ..weight import OpaqueWeight, QuantWeight
from . import builder
from .cpu_weight_only import CpuWeightOnly, multiply, pack, prepared
from .torch_c import KINDS, address, operation

ACTIVATIONS = ("int4", "int8", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1")
FLOATS = {"fp8_e4m3": (3, -6), "fp8_e5m2": (2, -14), "fp4_e2m1": (1, 0)}
"""Places of the mantissa, and exponent of the smallest normal number."""
STATIC, DYNAMIC, POWER, TWO_LEVELS = range(4)
"""``enum scales`` of ``quantize.c``."""
POWER_RULES = {"floor": 0, "": 1, "ct": 1, "even": 1, "up": 3, "ceil": 4}
"""``enum rule`` of ``quantize.c``; ``even`` is 2 for 8-bit codes."""


class CpuEmulated(CpuWeightOnly):
    """Weights as in :class:`CpuWeightOnly`, with activations by token, group or tensor, dynamic or static, zero points, E8M0 and NVFP4 scales."""

    grouped = False

    def supports(self, problem: Problem, device: Device) -> list[Refusal]:
        """Refuses what the weight-only kernel refuses, activations that are not quantized, outliers and rules that it does not know."""
        refusals = [*self.common_refusals(problem, device), *builder.refusals("quantize", device)]
        act = problem.scheme.act
        if act is None or act.dtype not in ACTIVATIONS:
            have = f"activations of {act.dtype if act else '16 bit'}"
            return [*refusals, Refusal("scheme", have, f"activations of {', '.join(ACTIVATIONS)}")]
        if act.outlier:
            refusals.append(
                Refusal("scheme", f"outliers above {act.outlier:g} that stay 16 bit", "activations without outliers")
            )
        if act.dynamic is True and act.rule not in _rules(act) and not _bounded(act):
            known = ", ".join(sorted(word for word in _rules(act) if word))
            refusals.append(Refusal("rule", f"activation rule {act.rule}", f"the common rule, {known} or ub<bound>"))
        if act.dynamic is False and act.scale_dtype != "float":
            refusals.append(Refusal("scheme", f"stored activation scales of {act.scale_dtype}", "stored float scales"))
        if act.block != (0, 0) if act.dynamic is False else act.block[0] != 1 and act.block != (0, 0):
            refusals.append(
                Refusal(
                    "scheme", f"activation scales by {act.block}", "one stored scale, or scales by token, group or tensor"
                )
            )
        return list(dict.fromkeys(refusals))

    def pack(self, weight: QuantWeight | OpaqueWeight, out: PackedWeight | None = None) -> PackedWeight:
        """As the weight-only kernel; ``act_scale`` and ``act_zero`` float32 ``[1]`` beside it where they are stored."""
        assert isinstance(weight, QuantWeight)
        act = weight.scheme.act
        assert act is not None
        packed = pack(weight, self.name, act.block[1] if act.scale_dtype == "float" and act.dynamic else 0)
        for name in ("act_scale", "act_zero"):
            if (value := getattr(weight, name)) is not None:
                packed.tensors[name] = value.float().reshape(1).clone()
        packed.meta |= {"act": act, "divide": weight.act_div}
        return packed if out is None else out.refill(packed)

    def apply(self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """``x [*, K]`` float32, bfloat16 or float16 to ``[*, N]``; ``bias [N]`` of any of these."""
        t, act = packed.tensors, packed.meta["act"]
        codes, scales = quantize(prepared(x, packed), act, t.get("act_scale"), t.get("act_zero"), packed.meta["divide"])
        return multiply(codes, packed, scales, bias, x.dtype)


def quantize(x: Tensor, act: TensorQuant, scale: Tensor | None, zero: Tensor | None, divide: bool) -> tuple[Tensor, Tensor]:
    """Codes of ``x [*, K]`` as bfloat16 values ``[*, K]``, and float32 scales ``[M, G]``; see ``quantize.c``."""
    mode = {"e8m0": POWER, "e4m3": TWO_LEVELS}.get(act.scale_dtype, DYNAMIC if act.dynamic else STATIC)
    largest = NUMBER_TYPES[act.dtype].largest
    places, least = FLOATS.get(act.dtype, (0, 0))
    low, high, divisor, bound, rule = -largest, largest, largest, float("inf"), 0
    if not places:
        top = 2.0 ** (act.bits - 1)
        half = act.rule.endswith(".5")
        low = -top if half or not act.dynamic or not act.symmetric else 1 - top
        high, divisor = top - 1, top - (0.5 if half else 1)
    elif mode == POWER:
        rule = 2 if act.rule == "even" and act.dtype != "fp4_e2m1" else POWER_RULES[act.rule]
    elif _bounded(act):
        bound = float(act.rule[2:])
    codes, scales = quantize_codes(
        x, scale, zero, act.block[1], [0 if not places else 1, places, least], [low, high, divisor, bound], mode, rule, act.symmetric,
        act.block == (0, 0), divide,
    )  # fmt: skip
    return codes, scales


def _rules(act: TensorQuant) -> tuple[str, ...]:
    if act.dtype.startswith("int"):
        top = 2 ** (act.bits - 1)
        return ("", str(top - 1), f"{top - 1}.5")
    return tuple(POWER_RULES) if act.scale_dtype == "e8m0" else ("",)


def _bounded(act: TensorQuant) -> bool:
    """Whether the rule bounds extreme values, as ``ub1200`` does."""
    return act.rule.startswith("ub") and not act.dtype.startswith("int") and act.scale_dtype == "float"


@functools.cache
def _function() -> ctypes._NamedFuncPointer:
    function = builder.library("quantize").qplug_quantize
    pointer, integer, long, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
    function.argtypes = [pointer] * 5 + [long] * 3 + [integer] * 4 + [real] * 4 + [integer] * 6
    return function


def _run(
    x: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    block: int,
    number: list[int],
    limits: list[float],
    mode: int,
    rule: int,
    symmetric: bool,
    whole: bool,
    divide: bool,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    codes, scales = _fake(x, scale, zero, block, number, limits, mode, rule, symmetric, whole, divide)
    failed = _function()(
        codes.data_ptr(), scales.data_ptr(), x.data_ptr(), address(scale), address(zero), scales.shape[0], x.shape[-1], block,
        KINDS[x.dtype], *number, *limits, mode, rule, symmetric, whole, divide, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for {x.shape[-1]} columns")
    return codes, scales


def _fake(
    x: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    block: int,
    number: list[int],
    limits: list[float],
    mode: int,
    rule: int,
    symmetric: bool,
    whole: bool,
    divide: bool,
) -> tuple[Tensor, Tensor]:
    k = x.shape[-1]
    groups = -(-k // block) if block and mode == DYNAMIC else 1
    return x.new_empty(x.shape, dtype=torch.bfloat16), x.new_empty((x.numel() // k, groups), dtype=torch.float32)


quantize_codes = operation(
    "quantize_codes(Tensor x, Tensor? scale, Tensor? zero, int block, int[] number, float[] limits, int mode, int rule, bool symmetric,"
    " bool whole, bool divide) -> (Tensor, Tensor)",
    _run,
    _fake,
)
