"""WINT8 and WINT4: tensors, decode, encode, and files in another order than was thought."""

from __future__ import annotations

import pytest
import torch
from qplug_int8.paddle.quantizer import PaddleRound
from qplug_int8.paddle.weight_only import WeightOnlyFormat
from torch import Tensor

from qplug_core.config import LayerQuant
from qplug_core.errors import CannotEncode, DecodeError
from qplug_core.layer import LayerSpec, StoredPart
from qplug_core.method import decode_part
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource
from qplug_core.testing import random_weight
from qplug_core.weight import QuantWeight

FORMAT = WeightOnlyFormat()
SCHEMES = {"wint8": QuantScheme.parse("W8A16"), "wint4": QuantScheme.parse("W4A16_channel")}
ORDERS = ("", "_sm70", "_nk", "_kn")


def quant(layout: str) -> LayerQuant:
    return LayerQuant(SCHEMES[layout[:5]], layout)


def weights(kind: str, n: int = 64, k: int = 128) -> QuantWeight:
    """Quantized normal weights, which gather around zero as real ones do."""
    return PaddleRound().quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(1)), SCHEMES[kind])


def test_shapes_are_fastdeploys() -> None:
    found = {kind: FORMAT.encode(weights(kind), quant(kind)) for kind in SCHEMES}
    assert [tuple(found[kind]["quant_weight"].shape) for kind in SCHEMES] == [(64, 128), (32, 128)]
    assert {t.dtype for kind in SCHEMES for t in found[kind].values()} == {torch.int8, torch.float32}
    assert tuple(found["wint4"]["weight_scale"].shape) == (64,)


def test_value_is_code_times_scale() -> None:
    stored = {
        "quant_weight": torch.tensor([[3, -2], [127, 0]], dtype=torch.int8),
        "weight_scale": torch.tensor([0.5, 2.0], dtype=torch.bfloat16),
    }
    assert FORMAT.decode(stored, quant("wint8_nk"), 2, 2).dequantize().tolist() == [[1.5, -1.0], [254.0, 0.0]]
    assert FORMAT.decode(stored, quant("wint8_kn"), 2, 2).dequantize().tolist() == [[1.5, 63.5], [-4.0, 0.0]]


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize("order", ORDERS)
def test_cut_that_no_tile_divides(kind: str, order: str) -> None:
    weight = weights(kind, 96, 192)
    layout = quant(kind + order)
    source = MemorySource({f"m.{name}": t for name, t in FORMAT.encode(weight, layout).items()})
    layer = LayerSpec("m", "linear", 30, 192, columns=(7, 100))
    found = decode_part(source, FORMAT, layout, layer, StoredPart("m", 30, rows=(5, 35), stored_n=96))
    assert isinstance(found, QuantWeight)
    assert torch.equal(found.dequantize(), weight.dequantize()[5:35, 7:100])


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize(("n", "k"), [(64, 96), (64, 100), (63, 128), (1, 1)])
def test_shape_without_a_place_in_the_tiles_is_refused(kind: str, n: int, k: int) -> None:
    weight = random_weight(SCHEMES[kind], n, k)
    with pytest.raises(CannotEncode, match="multiples of"):
        FORMAT.encode(weight, quant(kind))
    codes, _ = FORMAT.tensors(quant(kind))
    assert codes.match((n if kind == "wint8" else n // 2, k), {"N": n, "K": k}) is None


@pytest.mark.parametrize(
    ("written", "read"),
    [
        *[(f"wint8{w}", f"wint8{r}") for w in ("", "_sm70") for r in ("_nk", "_kn")],
        *[(f"wint8{r}", f"wint8{w}") for w in ("", "_sm70") for r in ("_nk", "_kn")],
        *[(f"wint4{w}", "wint4_kn") for w in ("", "_sm70", "_nk")],
        *[("wint4_kn", f"wint4{w}") for w in ("", "_sm70", "_nk")],
    ],
)
def test_codes_read_with_another_bias_are_refused(written: str, read: str) -> None:
    """Orders with the same bias are told apart by shapes and the config alone."""
    stored = FORMAT.encode(weights(read[:5]), quant(written))
    wanted = FORMAT.encode(weights(read[:5]), quant(read))
    stored["quant_weight"] = stored["quant_weight"].reshape(wanted["quant_weight"].shape)
    with pytest.raises(DecodeError, match="weight_layout"):
        FORMAT.decode(stored, quant(read), 64, 128)


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize("order", ORDERS)
def test_normal_weights_are_taken(kind: str, order: str) -> None:
    weight = weights(kind)
    assert FORMAT.decode(FORMAT.encode(weight, quant(kind + order)), quant(kind + order), 64, 128).equal(weight)


@pytest.mark.parametrize("shape", [(64,), (64, 1), (1, 64)])
def test_scale_shapes(shape: tuple[int, ...]) -> None:
    weight = weights("wint8")
    stored = FORMAT.encode(weight, quant("wint8"))
    stored["weight_scale"] = stored["weight_scale"].reshape(shape)
    assert FORMAT.tensors(quant("wint8"))[1].match(shape, {"N": 64, "K": 128}) is not None
    assert FORMAT.decode(stored, quant("wint8"), 64, 128).equal(weight)


@pytest.mark.parametrize("name", ["W8A16_g32", "W8A16_asym", "W4A16_g128", "W8A8", "Wfp8A16", "W3A16_channel"])
def test_foreign_weight_has_no_layout(name: str) -> None:
    with pytest.raises(CannotEncode, match="choose another format"):
        FORMAT.quant_for_scheme(random_weight(QuantScheme.parse(name), 64, 128))


def test_float_scale_with_a_global_one_is_refused() -> None:
    weight = weights("wint8").with_tensors({"global_scale": torch.tensor(2.0)})
    with pytest.raises(CannotEncode, match="global_scale"):
        FORMAT.quant_for_scheme(weight)


def test_scale_of_another_row_order_would_be_seen() -> None:
    """The scales are not permuted with the rows of their codes."""
    weight = weights("wint8")
    stored: dict[str, Tensor] = FORMAT.encode(weight, quant("wint8"))
    stored["weight_scale"] = stored["weight_scale"].view(-1, 2).flip(1).reshape(-1)
    assert not FORMAT.decode(stored, quant("wint8"), 64, 128).equal(weight)
