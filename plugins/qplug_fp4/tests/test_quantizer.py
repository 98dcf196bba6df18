"""The rules where producers differ, on values by hand."""

from __future__ import annotations

import pytest
import torch
from qplug_fp4.quantizer import MXEven, MXFloor, MXModelOpt, MXQuarter, NVFP4Divisor, NVFP4ModelOpt, NVFP4UnitInput, e2m1

from qplug_core.errors import SchemeError
from qplug_core.quantizer import Quantizer
from qplug_core.scheme import QuantScheme

MXFP4, MXFP8, NVFP4 = (QuantScheme.parse(name) for name in ("Wmxfp4A16", "Wmxfp8A16", "Wnvfp4A16"))


def exponent(quantizer: Quantizer, amax: float, scheme: QuantScheme = MXFP4) -> int:
    weight = torch.zeros(1, 32)
    weight[0, 3] = -amax
    return int(quantizer.quantize(weight, scheme).scales.item())


@pytest.mark.parametrize(
    ("amax", "floor", "ct", "modelopt"),
    [(6.0, 127, 127, 127), (6.1, 127, 127, 128), (7.0, 127, 128, 128), (5.9, 127, 127, 127), (12.0, 128, 128, 128),
     (3.0, 126, 126, 126), (4.0, 127, 127, 127), (3.5, 126, 127, 127), (1.0, 125, 125, 125)],
)  # fmt: skip
def test_exponents_of_fp4(amax: float, floor: int, ct: int, modelopt: int) -> None:
    assert exponent(MXFloor(), amax) == floor
    assert exponent(MXQuarter(), amax) == ct
    assert exponent(MXEven(), amax) == ct
    assert exponent(MXModelOpt(), amax) == modelopt


@pytest.mark.parametrize(
    ("amax", "floor", "ct", "even", "modelopt"),
    [(448.0, 127, 128, 127, 127), (449.0, 127, 128, 127, 128), (496.0, 127, 128, 128, 128), (256.0, 127, 127, 127, 127)],
)
def test_exponents_of_fp8(amax: float, floor: int, ct: int, even: int, modelopt: int) -> None:
    found = [exponent(q, amax, MXFP8) for q in (MXFloor(), MXQuarter(), MXEven(), MXModelOpt())]
    assert found == [floor, ct, even, modelopt]


def test_floor_saturates_and_modelopt_does_not() -> None:
    weight = torch.zeros(1, 32)
    weight[0, 0] = 7.5
    assert float(MXFloor().quantize(weight, MXFP4).dequantize().max()) == 6.0
    assert float(MXModelOpt().quantize(weight, MXFP4).dequantize().max()) == 8.0


@pytest.mark.parametrize(
    ("value", "even", "down"),
    [
        (0.25, 0, 0),
        (0.75, 2, 1),
        (1.25, 2, 2),
        (1.75, 4, 3),
        (2.5, 4, 4),
        (3.5, 6, 5),
        (5.0, 6, 6),
        (-0.1, 8, 8),
        (-5.1, 15, 15),
        (0.0, 0, 0),
    ],
)
def test_ties(value: float, even: int, down: int) -> None:
    assert e2m1(torch.tensor([value])).item() == even
    assert e2m1(torch.tensor([value]), ties_down=True).item() == down


def test_nvfp4_scales_of_both_producers() -> None:
    weight = torch.zeros(2, 32)
    weight[0, :16] = 2.688
    weight[1, 16:] = -0.576
    multiplier = NVFP4ModelOpt().quantize(weight, NVFP4)
    divisor = NVFP4Divisor().quantize(weight, NVFP4)
    assert multiplier.global_scale is not None
    assert divisor.global_scale is not None
    assert float(multiplier.global_scale) == pytest.approx(0.001)
    assert float(divisor.global_scale) == pytest.approx(1000.0)
    assert (multiplier.global_div, divisor.global_div) == (False, True)
    assert multiplier.scales.float()[0].tolist() == [448.0, 1.0]
    assert divisor.scales.float()[0].tolist() == [448.0, 0.125]
    torch.testing.assert_close(multiplier.dequantize(), divisor.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", ["Wnvfp4Anvfp4", "Wmxfp4Afp8_static"])
def test_stored_activation_scales_need_calibration(scheme: str) -> None:
    quantizer = NVFP4ModelOpt() if "nv" in scheme else MXFloor()
    with pytest.raises(SchemeError, match="calibration"):
        quantizer.quantize(torch.ones(2, 32), QuantScheme.parse(scheme))


def test_activations_at_load_have_the_scale_one() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    found = NVFP4UnitInput().quantize(weight, QuantScheme.parse("Wnvfp4Anvfp4"))
    assert found.act_scale == torch.tensor(1.0)
    assert torch.equal(found.dequantize(), NVFP4ModelOpt().quantize(weight, NVFP4).dequantize())
    with pytest.raises(SchemeError, match="calibration"):
        NVFP4UnitInput().quantize(weight, QuantScheme.parse("Wnvfp4Afp8_static"))


def test_foreign_scheme_is_refused() -> None:
    with pytest.raises(SchemeError, match="W4A16"):
        MXFloor().quantize(torch.ones(2, 128), QuantScheme.parse("W4A16"))
