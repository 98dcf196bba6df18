"""What kernel tests hold products against: the definition in float64, and how far a result is from it."""

from __future__ import annotations

from torch import Tensor, float32

from qplug_core.reference.activation import quantize_activation
from qplug_core.weight import QuantWeight


def exact(x: Tensor, weight: QuantWeight) -> Tensor:
    """``[M, N]`` of ``x [M, K]`` in float64: activations through the float32 quantizer and back, times the dequantized weight."""
    act = weight.scheme.act
    assert act is not None
    values = quantize_activation(x.float(), act, weight.act_scale, weight.act_zero, weight.act_div).dequantize(float32)
    return values.double() @ weight.dequantize().double().t()


def distance(y: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((y.double() - expected).norm() / expected.norm().clamp(min=1e-30))
