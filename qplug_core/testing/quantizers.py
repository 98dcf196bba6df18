"""Checks of quantizers: what comes out is a weight of the scheme that was asked for, near the weight that went in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..errors import QplugError
from ..quantizer import Quantizer
from ..weight import QuantWeight, code_dtype
from .base import Conformance, QuantizerCase, load

SHAPES = ((256, 512), (96, 384), (33, 128), (1, 256))
LARGEST_ERROR = {
    "int2": 0.97, "int3": 0.5, "int4": 0.25, "int5": 0.12, "int6": 0.06, "int7": 0.03, "int8": 0.02,
    "fp8_e4m3": 0.05, "fp8_e5m2": 0.1, "fp4_e2m1": 0.25, "nf4": 0.25, "fp4_bnb": 0.25,
}  # fmt: skip
"""Relative Frobenius error of normally distributed weights by number type: above that of one scale for the whole matrix."""


class QuantizerConformance(Conformance):
    """Every scheme of every quantizer."""

    def test_weight_is_of_the_scheme(self, quantizer_case: QuantizerCase) -> None:
        """Codes, scales and block are what the scheme says; the value is near the input, which stays as it was."""
        quantizer: Quantizer = load(quantizer_case.decl.impl)
        part = quantizer_case.scheme.weight
        assert part is not None
        for seed, (n, k) in enumerate(SHAPES):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                weight = _random(n, k, seed).to(dtype)
                before = weight.clone()
                found = quantizer.quantize(weight, quantizer_case.scheme, _stats(quantizer_case, k))
                assert torch.equal(weight, before), "quantize changed its input"
                assert found.scheme.weight == part, f"scheme {found.scheme} came back; {quantizer_case.scheme} was asked for"
                assert found.scheme.act == quantizer_case.scheme.act, (
                    f"scheme {found.scheme} came back; {quantizer_case.scheme} was asked for"
                )
                assert tuple(found.codes.shape) == (n, k), f"codes are {list(found.codes.shape)} for a weight [{n}, {k}]"
                assert found.codes.dtype == code_dtype(part.dtype, part.symmetric), f"codes are {found.codes.dtype}"
                assert (found.zeros is None) == part.symmetric, "zero points and the scheme's symmetry disagree"
                error = float((found.dequantize() - weight.float()).norm() / weight.float().norm())
                assert error <= LARGEST_ERROR[part.dtype], f"the relative error is {error:.3f} for [{n}, {k}] in {dtype}"

    def test_same_input_same_bits(self, quantizer_case: QuantizerCase) -> None:
        """``quantize`` is pure."""
        quantizer: Quantizer = load(quantizer_case.decl.impl)
        found: list[QuantWeight] = [
            quantizer.quantize(_random(64, 256, 1), quantizer_case.scheme, _stats(quantizer_case, 256)) for _ in range(2)
        ]
        assert found[0].equal(found[1]), "the same weight and statistics gave other bits"

    def test_zeros_stay_zeros(self, quantizer_case: QuantizerCase) -> None:
        """A weight of zeros, and one with rows of zeros, have no scale to divide by."""
        quantizer: Quantizer = load(quantizer_case.decl.impl)
        weight = _random(64, 256, 2)
        weight[::2] = 0
        for given in (weight, torch.zeros(64, 256)):
            value = quantizer.quantize(given, quantizer_case.scheme, _stats(quantizer_case, 256)).dequantize()
            assert torch.isfinite(value).all(), "rows of zeros gave NaN or infinite weights"
            assert float(value[::2].abs().max()) == 0.0, "a row of zeros did not stay zero"

    def test_values_that_no_code_holds_are_refused(self, quantizer_case: QuantizerCase) -> None:
        """NaN and infinity are errors, not codes."""
        quantizer: Quantizer = load(quantizer_case.decl.impl)
        for bad in (float("nan"), float("inf")):
            weight = _random(64, 256, 3)
            weight[5, 7] = bad
            with pytest.raises(QplugError):
                quantizer.quantize(weight, quantizer_case.scheme, _stats(quantizer_case, 256))


def _random(n: int, k: int, seed: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02


def _stats(case: QuantizerCase, k: int) -> dict[str, Tensor] | None:
    if not case.decl.calibrated:
        return None
    x = torch.randn(4 * k, k, generator=torch.Generator().manual_seed(k))
    return {"hessian": x.t() @ x / x.shape[0], "act_amax": x.abs().amax(0)}
