"""W4A8 experts: both scales on disk are magnitudes, not steps."""

from __future__ import annotations

import pytest
import torch
from qplug_int8.paddle.orders import write4
from qplug_int8.paddle.w4a8 import W4A8Format
from torch import Tensor

from qplug_core.config import LayerQuant
from qplug_core.errors import CannotEncode, DecodeError
from qplug_core.layer import LayerSpec, StoredPart
from qplug_core.method import decode_part
from qplug_core.reference.linear import ReferenceLinear
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource

FORMAT = W4A8Format()
SCHEME = QuantScheme.parse("W4A8_channel_static")


def stored(layout: str, n: int = 16, k: int = 128) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 8, (n, k), generator=generator, dtype=torch.int8)
    packed = write4(codes, "w4a8" if layout == "w4a8" else "_kn")
    return codes, {
        "quant_weight": packed,
        "weight_scale": torch.rand(n, generator=generator) + 0.5,
        "activation_scale": torch.tensor([3.0]),
    }


@pytest.mark.parametrize("layout", ["w4a8", "w4a8_kn"])
def test_product_is_that_of_the_folded_scale(layout: str) -> None:
    """y = (x8 . 16 q4) * wmax * xmax / (127 * 112), the way FastDeploy's kernel multiplies."""
    codes, tensors = stored(layout)
    weight = FORMAT.decode(tensors, LayerQuant(SCHEME, layout), 16, 128)
    # Within the calibrated range: beyond it FastDeploy clamps at -127, the hub's static schemes at -128.
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).clamp(-3, 3)
    x8 = torch.round(127 * x / 3.0).clamp(-127, 127)
    folded = tensors["weight_scale"] * 3.0 / (127 * 112)
    expected = (x8 @ (16.0 * codes.float()).t()) * folded
    kernel = ReferenceLinear()
    found = kernel.apply(x, kernel.pack(weight))
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    step_not_magnitude = weight.with_tensors({"scales": weight.scales * 7})
    assert float((kernel.apply(x, kernel.pack(step_not_magnitude)) - expected).norm() / expected.norm()) > 1


def test_other_order_is_another_weight() -> None:
    codes, tensors = stored("w4a8")
    other = FORMAT.decode(tensors, LayerQuant(SCHEME, "w4a8_kn"), 16, 128)
    assert float((other.codes != codes).float().mean()) > 0.5


@pytest.mark.parametrize("layout", ["w4a8", "w4a8_kn"])
def test_cut_that_no_tile_divides(layout: str) -> None:
    codes, tensors = stored(layout, 32, 192)
    source = MemorySource({f"m.{name}": t for name, t in tensors.items()})
    layer = LayerSpec("m", "experts", 9, 192, columns=(3, 90))
    found = decode_part(source, FORMAT, LayerQuant(SCHEME, layout), layer, StoredPart("m", 9, rows=(5, 14), stored_n=32))
    assert torch.equal(found.codes, codes[5:14, 3:90])  # type: ignore[union-attr]


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_activation_scale_that_is_none_is_refused(bad: float) -> None:
    _, tensors = stored("w4a8")
    with pytest.raises(DecodeError, match="activation_scale"):
        FORMAT.decode({**tensors, "activation_scale": torch.tensor([bad])}, LayerQuant(SCHEME, "w4a8"), 16, 128)


def test_writing_is_refused_with_another_format() -> None:
    _, tensors = stored("w4a8")
    quant = LayerQuant(SCHEME, "w4a8")
    with pytest.raises(CannotEncode, match="compressed-tensors"):
        FORMAT.encode(FORMAT.decode(tensors, quant, 16, 128), quant)
