"""The stored tensors against decoders that read one byte at a time, golden bytes, and weights that no layout holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from qplug_modelopt.algos import ALGOS
from qplug_modelopt.loader import SMOOTHING, ModelOptFormat

from qplug_core.axes import Axis, StoredTensor
from qplug_core.config import LayerQuant
from qplug_core.errors import CannotEncode, DecodeError
from qplug_core.scheme import QuantScheme
from qplug_core.testing import random_weight
from qplug_core.weight import QuantWeight

FORMAT = ModelOptFormat()
N, K = 64, 256
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def stored_file(algo: str, seed: int = 0, group: int | None = None) -> dict[str, torch.Tensor]:
    """Random bytes in the shapes of an algorithm."""
    draw = torch.Generator().manual_seed(seed)
    quant = ALGOS[algo].quant(group)
    tensors = {}
    for stored in FORMAT.tensors(quant):
        shape = shape_of(stored)
        match stored.dtypes[0]:
            case "U8" if stored.name == "weight_scale":
                value = torch.randint(120, 130, shape, generator=draw, dtype=torch.uint8)
            case "U8":
                value = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
            case "I8":
                value = torch.randint(-128, 128, shape, generator=draw, dtype=torch.int8)
            case "F8_E4M3":
                value = torch.randn(shape, generator=draw).mul(2).abs().to(torch.float8_e4m3fn)
            case _:
                value = torch.rand(shape, generator=draw) + 0.01
        tensors[stored.name] = value
    return tensors


def shape_of(stored: StoredTensor) -> tuple[int, ...]:
    return tuple(Axis.parse(a).length({"N": N, "K": K}) or 0 for a in stored.axes)


def by_bytes(algo: str, t: dict[str, torch.Tensor]) -> np.ndarray:
    """The float32 weight ``[N, K]`` of stored tensors, from the description of the format alone."""
    layout = ALGOS[algo].layout
    weight = t["weight"]
    scale = t["weight_scale"].float().numpy()
    if layout in ("modelopt_nvfp4", "modelopt_mxfp4"):
        data = weight.numpy()
        values = np.empty((N, K), np.float32)
        for k in range(K):
            nibble = (data[:, k // 2] >> (4 * (k % 2))) & 15
            values[:, k] = [(-1 if v & 8 else 1) * E2M1[v & 7] for v in nibble]
    elif layout in ("modelopt_int4_awq", "modelopt_w4a8_awq"):
        data = weight.numpy()
        values = np.empty((N, K), np.float32)
        for n in range(N):
            nibble = ((data[n // 2] >> (4 * (n % 2))) & 15).astype(np.int32)
            values[n] = np.where(nibble > 7, nibble - 16, nibble)
    else:
        values = weight.float().numpy()
    if layout in ("modelopt_mxfp4", "modelopt_mxfp8"):
        scale = (2.0 ** (scale - 127)).astype(np.float32)
    if layout == "modelopt_nvfp4":
        scale = scale * np.float32(t["weight_scale_2"])
    if scale.ndim == 4:
        scale = np.repeat(np.repeat(scale[:, 0, :, 0], 128, 0), 128, 1)[:N, :K]
    elif scale.ndim == 2:
        scale = np.repeat(scale, K // scale.shape[1], 1)
    elif scale.ndim == 1:
        scale = scale[:, None]
    return values * scale


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("algo", ALGOS)
def test_decode_equals_reading_byte_by_byte(algo: str) -> None:
    stored = stored_file(algo)
    quant = ALGOS[algo].quant()
    weight = FORMAT.decode(stored, quant, N, K)
    np.testing.assert_array_equal(weight.dequantize().numpy(), by_bytes(algo, stored))
    again = FORMAT.encode(weight, quant)
    for name, tensor in stored.items():
        if not (quant.layout == "modelopt_w4a8_awq" and name == "weight_scale_2"):
            assert again[name].shape == tensor.shape
            assert bytes_of(again[name]).equal(bytes_of(tensor)), name


@pytest.mark.parametrize("algo", ["W4A16_AWQ", "W4A8_AWQ"])
def test_other_group_size(algo: str) -> None:
    stored = stored_file(algo, group=32)
    weight = FORMAT.decode(stored, ALGOS[algo].quant(32), N, K)
    np.testing.assert_array_equal(weight.dequantize().numpy(), by_bytes(algo, stored))


def test_golden_byte_of_int4() -> None:
    """Byte 0x9F is -1 in the even row and -7 in the odd one: two rows share a byte, in two's complement."""
    stored = {"weight": torch.full((1, 2), 0x9F, dtype=torch.uint8), "weight_scale": torch.ones(2)}
    weight = FORMAT.decode(stored, ALGOS["W4A16"].quant(), 2, 2)
    assert weight.dequantize().tolist() == [[-1, -1], [-7, -7]]


def test_golden_byte_of_nvfp4() -> None:
    """Byte 0x7A, block scale 1 and weight_scale_2 0.01 are -0.01 and 0.06: low bits first, and all scales multiply."""
    stored = {
        "weight": torch.full((1, 8), 0x7A, dtype=torch.uint8),
        "weight_scale": torch.ones(1, 1).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.01),
        "input_scale": torch.tensor(0.5),
    }
    weight = FORMAT.decode(stored, ALGOS["NVFP4"].quant(), 1, 16)
    torch.testing.assert_close(weight.dequantize(), torch.tensor([[-0.01, 0.06] * 8]))
    assert not weight.global_div
    assert not weight.act_div


def test_second_scale_of_w4a8_is_no_factor_of_the_weight() -> None:
    stored = stored_file("W4A8_AWQ")
    quant = ALGOS["W4A8_AWQ"].quant()
    doubled = {**stored, "weight_scale_2": stored["weight_scale_2"] * 2}
    left_out = {name: t for name, t in stored.items() if name != "weight_scale_2"}
    weights = [FORMAT.decode(t, quant, N, K) for t in (stored, doubled, left_out)]
    assert weights[0].equal(weights[1])
    assert weights[0].equal(weights[2])
    written = FORMAT.encode(weights[0], quant)["weight_scale_2"]
    torch.testing.assert_close(written, stored["weight_scale"].max() * 7 / 448)


@pytest.mark.parametrize("algo", [a.name for a in ALGOS.values() if a.layout in SMOOTHING])
def test_smoothing_multiplies_and_survives(algo: str) -> None:
    quant = ALGOS[algo].quant()
    stored = {**stored_file(algo), "pre_quant_scale": torch.rand(K).bfloat16()}
    weight = FORMAT.decode(stored, quant, N, K)
    assert weight.pre_scale is not None
    assert weight.pre_scale.dtype == torch.bfloat16
    assert torch.equal(FORMAT.encode(weight, quant)["pre_quant_scale"], stored["pre_quant_scale"])


def test_smoothed_nvfp4_is_written_under_its_own_name() -> None:
    weight = random_weight(QuantScheme.parse("Wnvfp4Anvfp4"), N, K)
    smoothed = replace(weight, pre_scale=torch.rand(K).bfloat16())
    layers = {"plain": FORMAT.quant_for_scheme(weight), "smooth": FORMAT.quant_for_scheme(smoothed)}
    entries = FORMAT.quantization_config(layers)["quantized_layers"]
    assert {name: entry["quant_algo"] for name, entry in entries.items()} == {"plain": "NVFP4", "smooth": "NVFP4_AWQ"}


def test_scales_of_other_shapes_are_the_same() -> None:
    """Block scales as a plain matrix, and those of rows as a column."""
    quant = ALGOS["FP8_PB_WO"].quant()
    stored = stored_file("FP8_PB_WO")
    flat = {**stored, "weight_scale": stored["weight_scale"].squeeze((1, 3))}
    assert FORMAT.decode(stored, quant, N, K).equal(FORMAT.decode(flat, quant, N, K))
    rows = ALGOS["FP8_PER_CHANNEL_PER_TOKEN"].quant()
    stored = stored_file("FP8_PER_CHANNEL_PER_TOKEN")
    column = {**stored, "weight_scale": stored["weight_scale"][:, None]}
    assert FORMAT.decode(stored, rows, N, K).equal(FORMAT.decode(column, rows, N, K))


@pytest.mark.parametrize(("name", "value"), [("input_scale", 0.0), ("input_scale", float("nan")), ("weight_scale_2", -1.0)])
def test_scale_that_is_no_scale_is_refused(name: str, value: float) -> None:
    stored = {**stored_file("NVFP4"), name: torch.tensor(value)}
    with pytest.raises(DecodeError, match=f"{name} is {value}"):
        FORMAT.decode(stored, ALGOS["NVFP4"].quant(), N, K)


def test_weight_of_zeros_has_scale_zero() -> None:
    stored = {**stored_file("NVFP4"), "weight_scale_2": torch.tensor(0.0)}
    assert not FORMAT.decode(stored, ALGOS["NVFP4"].quant(), N, K).dequantize().any()


def weight(scheme: str, n: int = N, k: int = K) -> QuantWeight:
    return random_weight(QuantScheme.parse(scheme), n, k)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (weight("W4A16_g128_asym"), "zeros"),
        (weight("W4A16_g128_actorder"), "group_index"),
        (weight("W3A16_g128"), "no quant_algo"),
        (weight("Wfp8A16_tensor"), "no quant_algo"),
        (weight("Wmxfp8Amxfp8"), "no quant_algo"),
        (replace(weight("Wnvfp4A16"), global_div=True), "compressed-tensors"),
        (replace(weight("Wnvfp4Anvfp4"), act_div=True), "compressed-tensors"),
        (replace(weight("Wnvfp4A16"), global_scale=torch.rand(N, 1)), "unfused"),
        (replace(weight("Wfp8Afp8"), pre_scale=torch.ones(K)), "pre_scale"),
    ],
)
def test_foreign_weight_has_no_layout(given: QuantWeight, words: str) -> None:
    with pytest.raises(CannotEncode, match=words):
        FORMAT.quant_for_scheme(given)


@pytest.mark.parametrize(
    ("scheme", "n", "k", "words"),
    [
        ("W4A16_g128", 63, 128, "multiple of 2 rows"),
        ("Wnvfp4A16", 4, 24, "16 columns"),
        ("Wmxfp8Amxfp8_a:rule=ceil", 4, 40, "32 columns"),
    ],
)
def test_ragged_shape_is_refused(scheme: str, n: int, k: int, words: str) -> None:
    given = weight(scheme, n, k)
    with pytest.raises(CannotEncode, match=words):
        FORMAT.encode(given, FORMAT.quant_for_scheme(given))


def test_weight_in_the_layout_of_another_is_refused() -> None:
    with pytest.raises(CannotEncode, match="no quant_algo"):
        FORMAT.encode(weight("Wfp8Afp8"), LayerQuant(QuantScheme.parse("Wfp8Afp8"), "modelopt_fp8"))
