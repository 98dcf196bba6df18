"""Activations as codes of 8 bits on GPUs, in Triton: what a packed weight says of them, and the operation ``qplug::triton_quantize``.

INT8 by token or tensor, dynamic or static, with zero points or without; FP8 e4m3 the same way without zero points, and by groups of
columns. On gfx942, whose units know e4m3fnuz only, codes are held as fnuz of half the value with twice the scale: the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernel import PackedWeight
from ..scheme import TensorQuant
from ..support import Refusal
from ..weight import QuantWeight
from .triton_launch import operation, rows_of, target_of

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
"""Dtypes of codes, by whether they are fnuz."""


def refusals_of(act: TensorQuant, scheme: str) -> list[Refusal]:
    """What of the quantization of activations is not implemented: scales of other kinds, outliers, and rules."""
    found = []
    if act.dynamic == "local" or act.scale_dtype != "float" or act.outlier:
        found.append(Refusal("scheme", f"activations of {scheme}", "plain float32 scales, without outliers"))
    rules = ("", "127", "127.5") if act.dtype == "int8" else ("", "ub1200")
    if act.rule not in rules:
        found.append(Refusal("rule", f"activation rule {act.rule}", " or ".join(r or "the common one" for r in rules)))
    return found


def needs_fnuz(codes: Tensor) -> bool:
    """Whether FP8 codes on the device of ``codes`` are e4m3fnuz."""
    return codes.is_cuda and target_of(codes).arch == "gfx942"


def halved(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes int8 of e4m3fn as those of e4m3fnuz, where they are half of what they were, and twice the scales: the same numbers."""
    # The sign bit alone is NaN there.
    return torch.where(codes == -128, 0, codes), scales * 2.0


def describe(weight: QuantWeight, fnuz: bool) -> tuple[dict[str, Tensor], dict[str, float | str]]:
    """Tensors and meta of a packed weight from which :func:`quantized` knows how its activations are quantized.

    ``act_scale`` float32 ``[1]`` (a multiplier) and ``act_zero`` float32 ``[1]`` where they are static; ``pre_scale`` and ``act_shift`` ``[K]``.
    """
    act = weight.scheme.act
    assert act is not None
    tensors = {}
    if not act.dynamic:
        assert weight.act_scale is not None
        stored = weight.act_scale.float().reshape(1)
        tensors["act_scale"] = stored.reciprocal() if weight.act_div else stored.clone()
        if weight.act_zero is not None:
            tensors["act_zero"] = weight.act_zero.float().reshape(1)
    for field in ("pre_scale", "act_shift"):
        if (value := getattr(weight, field)) is not None:
            tensors[field] = value.clone()
    integers, half = act.dtype == "int8", act.rule == "127.5"
    meta = {
        "act": "int8" if integers else "fnuz" if fnuz else "fp8",
        "symmetric": act.symmetric,
        "divisor": (255.0 if not act.symmetric else 127.5 if half else 127.0) if integers else 448.0,
        "lowest": -127.0 if act.dynamic and act.symmetric and not half else -128.0,
        "bound": float(act.rule[2:]) if act.rule.startswith("ub") else 0.0,
        "whole": act.dynamic is True and act.block == (0, 0),
        "act_group": act.block[1],
    }
    return tensors, meta


def quantized(x: Tensor, packed: PackedWeight, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[M, columns]`` of ``x [*, K]``, zero beyond K, scales float32 ``[G, M]`` and zero points float32 ``[M]``, or empty."""
    t, meta = packed.tensors, packed.meta
    if "act_shift" in t:
        x = x - t["act_shift"].to(x.dtype)
    if "pre_scale" in t:
        x = x * t["pre_scale"].to(x.dtype)
    if (order := t.get("order")) is not None:
        # Padding stands where the order says -1, and is zero.
        x = torch.where(order >= 0, x[..., order.clamp(min=0).long()], 0)
    scale = t.get("act_scale")
    if meta["whole"] and x.numel():
        scale = _tensor_scale(x, meta["divisor"], meta["bound"])
    codes, scales, zeros = quantize(
        x, scale, t.get("act_zero"), columns, meta["act_group"], meta["act"], meta["symmetric"], meta["divisor"], meta["lowest"],
        meta["bound"],
    )  # fmt: skip
    return codes, scales, zeros


def _tensor_scale(x: Tensor, divisor: float, bound: float) -> Tensor:
    """The scale float32 ``[1]`` of all tokens together."""
    amax = x.abs().amax().float()
    return ((amax.clamp(max=bound) if bound else amax) / divisor).reshape(1)


def _quantize(
    x: Tensor, scale: Tensor | None, zero: Tensor | None, kp: int, group: int, kind: str, symmetric: bool, divisor: float,
    lowest: float, bound: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    flat = rows_of(x)
    target_of(x)
    codes, scales, zeros = _quantize_fake(flat, scale, zero, kp, group, kind, symmetric, divisor, lowest, bound)
    if not flat.numel():
        return codes, scales, zeros
    from .triton_scaled_kernels import quantize_rows

    m, k = flat.shape
    width = group or kp
    block = min(1 << (width - 1).bit_length(), 1024)
    quantize_rows[(m, scales.shape[0])](
        codes, scales, None if symmetric else zeros, flat, scale, zero, m, k, width, flat.stride(0), kp,
        0 if scale is None or scale.numel() == 1 else 1,
        KIND=kind, SYMMETRIC=symmetric, DIVISOR=divisor, LOWEST=lowest, BOUND=bound, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return codes, scales, zeros


def _quantize_fake(
    x: Tensor, scale: Tensor | None, zero: Tensor | None, kp: int, group: int, kind: str, symmetric: bool, divisor: float,
    lowest: float, bound: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    m = x.numel() // x.shape[-1]
    dtype = torch.int8 if kind == "int8" else FP8[kind == "fnuz"]
    codes = torch.empty((m, kp), dtype=dtype, device=x.device)
    scales = torch.empty((kp // group if group else 1, m), dtype=torch.float32, device=x.device)
    return codes, scales, torch.empty(0 if symmetric else m, dtype=torch.float32, device=x.device)


quantize = operation(
    "triton_quantize(Tensor x, Tensor? scale, Tensor? zero, int kp, int group, str kind, bool symmetric, float divisor, float lowest, "
    "float bound) -> (Tensor, Tensor, Tensor)",
    _quantize,
    _quantize_fake,
)
