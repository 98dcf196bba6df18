"""Decoding, fusing and activations against formulas written out here, and quantizers against the tools that they are named after."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from qplug_fp8.fbgemm import FbgemmFP8Format
from qplug_fp8.loader import FP8Format
from qplug_fp8.quantizer import UE8M0, DeepGemm, Floored, Reciprocal
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from qplug_core.config import LayerQuant
from qplug_core.errors import DecodeError, SchemeError, SplitRequired
from qplug_core.layer import LayerSpec, StoredPart
from qplug_core.method import decode_part
from qplug_core.quantizer import RoundToNearest
from qplug_core.reference.linear import ReferenceLinear
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource
from qplug_core.testing import random_weight
from qplug_core.weight import QuantWeight, concat

FORMAT = FP8Format()
E4M3 = torch.float8_e4m3fn


def quant(scheme: str, layout: str) -> LayerQuant:
    return LayerQuant(QuantScheme.parse(scheme), layout)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shard(n: int, value: float, act: float | None = None) -> QuantWeight:
    scheme = "Wfp8Afp8_tensor" + ("" if act is None else "_static")
    tensors = {"weight": random(n, 64, seed=n).to(E4M3), "weight_scale": torch.tensor(value)}
    if act is not None:
        tensors["input_scale"] = torch.tensor(act)
    return FORMAT.decode(tensors, quant(scheme, "fp8"), n, 64)


def test_fused_qkv_with_different_scales_widens_exactly() -> None:
    """vLLM, TensorRT-LLM and RTP-LLM requantize all shards with the largest scale, which changes the weights."""
    shards = [shard(96, 0.01), shard(32, 0.0007), shard(32, 0.03)]
    fused = concat(shards)
    assert fused.scheme.weight is not None
    assert fused.scheme.weight.granularity == "channel"
    assert torch.equal(fused.dequantize(), torch.cat([s.codes.float() * s.scales for s in shards]))
    assert torch.equal(fused.codes.view(torch.uint8), torch.cat([s.codes.view(torch.uint8) for s in shards]))


def test_fused_qkv_with_different_static_scales_is_split_not_maximised() -> None:
    with pytest.raises(SplitRequired, match="act_scale"):
        concat([shard(96, 0.01, 0.02), shard(32, 0.01, 0.05)])
    assert concat([shard(96, 0.01, 0.02), shard(32, 0.03, 0.02)]).act_scale == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("n0", "n1", "k0", "k1"), [(64, 128, 0, 300), (0, 200, 100, 228), (65, 66, 299, 300), (128, 200, 0, 1)]
)
def test_vllm_52997_54178_25292_45784_a_shard_may_be_smaller_than_a_block(n0: int, n1: int, k0: int, k1: int) -> None:
    """ "output_partition_size = 64 is not divisible by weight quantization block_n = 128", for K that is ragged too."""
    stored = {"up.weight": random(200, 300).to(E4M3), "up.weight_scale_inv": random(2, 3, seed=1).abs()}
    scale = stored["up.weight_scale_inv"][torch.arange(200)[:, None] // 128, torch.arange(300) // 128]
    layer = LayerSpec("up", "linear", n1 - n0, 300, columns=(k0, k1))
    part = StoredPart("up", n1 - n0, rows=(n0, n1), stored_n=200)
    cut = decode_part(MemorySource(stored), FORMAT, quant("Wfp8Afp8_b128x128", "fp8_block"), layer, part)
    assert torch.equal(cut.dequantize(), (stored["up.weight"].float() * scale)[n0:n1, k0:k1])


def test_sglang_30900_every_byte_of_e4m3fn_has_its_own_value() -> None:
    """A bound of 224 or 240 belongs to e4m3fnuz, whose bytes mean half as much."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(1, -1)
    weight = FORMAT.decode(
        {"weight": codes.view(E4M3), "weight_scale": torch.tensor(2.0)}, quant("Wfp8Afp8_tensor", "fp8"), 1, 254
    )
    sign = 1 - 2.0 * (codes >> 7)
    exponent, mantissa = ((codes >> 3) & 15).float(), (codes & 7).float()
    value = torch.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    assert torch.equal(weight.dequantize(), 2 * sign * value)
    assert float(weight.dequantize().max()) == 896.0


def test_cast_without_clamping_left_nan() -> None:
    """A cast of more than 448 gives NaN in torch, and the model then writes "!!!!" (vLLM issue 14126 is such an output)."""
    codes = torch.tensor([[1.0, float("nan")]]).to(E4M3)
    with pytest.raises(DecodeError, match="1 of 2 FP8 codes are NaN"):
        FORMAT.decode({"weight": codes, "weight_scale": torch.tensor(1.0)}, quant("Wfp8Afp8_tensor", "fp8"), 1, 2)
    e5m2 = torch.tensor([[1.0, float("inf")]]).to(torch.float8_e5m2)
    with pytest.raises(DecodeError, match="NaN or infinite"):
        FORMAT.decode({"weight": e5m2, "weight_scale": torch.tensor(1.0)}, quant("Wfp8e5m2Afp8_tensor", "fp8"), 1, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5])
def test_scale_that_no_tool_computes(value: float) -> None:
    stored = {"weight": torch.zeros(4, 4).to(E4M3), "weight_scale": torch.tensor(value)}
    with pytest.raises(DecodeError, match="1 of 1 weight scales"):
        FORMAT.decode(stored, quant("Wfp8Afp8_tensor", "fp8"), 4, 4)


def test_e8m0_nan_is_refused_and_its_range_is_not() -> None:
    meant = quant("Wfp8Afp8_b128x128_se8m0", "fp8_block")
    stored = {"weight": torch.ones(256, 128).to(E4M3), "weight_scale_inv": torch.tensor([[0], [254]], dtype=torch.uint8)}
    weight = FORMAT.decode(stored, meant, 256, 128)
    assert weight.dequantize()[::128, 0].tolist() == [2.0**-127, 2.0**127]
    with pytest.raises(DecodeError, match="the first is NaN"):
        FORMAT.decode({**stored, "weight_scale_inv": torch.tensor([[0], [255]], dtype=torch.uint8)}, meant, 256, 128)


def test_dtype_of_the_scales_wins_over_the_config() -> None:
    """DeepSeek-V3.1 stores powers of two as float32, V4 as E8M0, under the same config."""
    stored = {"weight": torch.ones(128, 128).to(E4M3), "weight_scale_inv": torch.tensor([[0.25]])}
    said = quant("Wfp8Afp8_b128x128_se8m0", "fp8_block")
    assert str(FORMAT.decode(stored, said, 128, 128).scheme) == "Wfp8Afp8_b128x128"
    stored["weight_scale_inv"] = torch.tensor([[125]], dtype=torch.uint8)
    weight = FORMAT.decode(stored, quant("Wfp8Afp8_b128x128", "fp8_block"), 128, 128)
    assert str(weight.scheme) == "Wfp8Afp8_b128x128_se8m0"
    assert float(weight.dequantize().max()) == 0.25


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_activation_scale_is_a_positive_number(value: float) -> None:
    with pytest.raises(DecodeError, match="calibrate the checkpoint again"):
        shard(4, 1.0, value)


def test_bound_that_the_file_and_the_config_disagree_on() -> None:
    fbgemm, meant = FbgemmFP8Format(), quant("Wfp8Afp8_a:rule=ub1200", "fbgemm_fp8")
    stored = {
        "weight": torch.ones(4, 4).to(E4M3),
        "weight_scale": torch.ones(4, 1),
        "input_scale_ub": torch.tensor([1200.0]),
    }
    assert fbgemm.decode(stored, meant, 4, 4).n == 4
    with pytest.raises(DecodeError, match=r"448.*1200"):
        fbgemm.decode({**stored, "input_scale_ub": torch.tensor([448.0])}, meant, 4, 4)


def saturated(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(E4M3).float()


@pytest.mark.parametrize("kind", ["token", "static", "group", "ue8m0", "bounded"])
def test_activations(kind: str) -> None:
    """y of the reference kernel against the activation written out as codes times scale."""
    x = random(5, 256, seed=3) * torch.tensor([1.0, 2000.0, 0.01, 0.0, 30.0])[:, None]
    name = {
        "token": "Wfp8Afp8", "static": "Wfp8Afp8_static", "group": "Wfp8Afp8_b128x128",
        "ue8m0": "Wfp8Afp8_b128x128_a:se8m0.rule=ceil", "bounded": "Wfp8Afp8_a:rule=ub1200",
    }[kind]  # fmt: skip
    weight = random_weight(QuantScheme.parse(name), 64, 256, torch.Generator().manual_seed(4))
    grouped = x.view(5, 2, 128) if kind in ("group", "ue8m0") else x.view(5, 1, 256)
    scale = grouped.abs().amax(-1, keepdim=True) / 448
    if kind == "static":
        assert weight.act_scale is not None
        scale = weight.act_scale.expand(5, 1, 1)
    elif kind == "ue8m0":
        scale = torch.where(scale > 0, 2.0 ** torch.ceil(torch.log2(scale)), scale)
    elif kind == "bounded":
        scale = scale.clamp(max=1200 / 448)
    safe = torch.where(scale > 0, scale, 1.0)
    meant = (saturated(grouped / safe) * safe).view(5, 256)
    kernel = ReferenceLinear()
    found = kernel.apply(x, kernel.pack(weight))
    expected = meant @ weight.dequantize().t()
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    other = x @ weight.dequantize().t()
    assert not torch.allclose(found, other, rtol=1e-3, atol=0)
    if kind == "bounded":
        unbounded = kernel.apply(
            x, kernel.pack(random_weight(QuantScheme.parse("Wfp8Afp8"), 64, 256, torch.Generator().manual_seed(4)))
        )
        assert torch.equal(found[0], unbounded[0])
        assert not torch.allclose(found[1], unbounded[1], rtol=0.05)


def of_transformers(weight: Tensor, scale_fmt: str) -> dict[str, Tensor]:
    config = FineGrainedFP8Config(weight_block_size=(128, 128), scale_fmt=scale_fmt)
    return Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"x.weight": weight})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reciprocal_gives_the_bytes_of_transformers(dtype: torch.dtype) -> None:
    weight = (random(384, 256) * 0.05).to(dtype)
    weight[128:256, :128] = 0
    theirs = of_transformers(weight, "float")
    ours = Reciprocal().quantize(weight, QuantScheme.parse("Wfp8Afp8_b128x128"))
    assert torch.equal(ours.codes.view(torch.uint8), theirs["x.weight"].view(torch.uint8))
    assert torch.equal(ours.scales, theirs["x.weight_scale_inv"])


def test_ue8m0_gives_the_bytes_of_transformers() -> None:
    weight = random(384, 256) * 0.05
    weight[0, 0] = 448 * 2.0**-9  # A scale that is a power of two already must not be rounded up.
    weight[0, 1:] = 0
    theirs = of_transformers(weight, "ue8m0")
    ours = UE8M0().quantize(weight, QuantScheme.parse("Wmxfp8Afp8_b128x128_a:g128"))
    assert torch.equal(ours.codes.view(torch.uint8), theirs["x.weight"].view(torch.uint8))
    assert torch.equal(ours.scales, theirs["x.weight_scale_inv"].view(torch.uint8))


@pytest.mark.parametrize(("amax", "scale"), [(448.0, 1.0), (449.0, 2.0), (1.0, 2.0**-8), (1e-5, 2.0**-22)])
def test_ue8m0_golden(amax: float, scale: float) -> None:
    weight = torch.zeros(128, 128)
    weight[3, 5] = -amax
    found = UE8M0().quantize(weight, QuantScheme.parse("Wmxfp8A16_b128x128"))
    assert 2.0 ** (int(found.scales) - 127) == scale


def test_deepgemm_floor() -> None:
    weight = torch.zeros(130, 128)
    weight[0, 0], weight[129, 0] = 1e-6, 3.0
    found = DeepGemm().quantize(weight, QuantScheme.parse("Wfp8Afp8_b128x128"))
    assert found.scales.flatten().tolist() == (torch.tensor([1e-4, 3.0]) / 448).tolist()
    assert found.codes.float()[[0, 129], 0].tolist() == [4.5, 448.0]


def test_floored_by_tensor_and_channel() -> None:
    weight = random(8, 64) * 1e-7
    tensor = Floored().quantize(weight, QuantScheme.parse("Wfp8Afp8_tensor"))
    assert float(tensor.scales) == pytest.approx(1 / (448 * 512))
    channel = Floored().quantize(weight, QuantScheme.parse("Wfp8Afp8"))
    assert channel.scales.flatten().tolist() == [float(torch.tensor(1e-4) / 448)] * 8


def test_rules_give_other_bits_than_round_to_nearest() -> None:
    """Why they are quantizers of their own."""
    weight, scheme = random(256, 256) * 0.05, QuantScheme.parse("Wfp8Afp8_b128x128")
    weight[:128, :128] *= 1e-4
    core = RoundToNearest().quantize(weight, scheme)
    assert not torch.equal(Reciprocal().quantize(weight, scheme).scales, core.scales)
    floored = DeepGemm().quantize(weight, scheme).scales
    assert float(floored[0, 0]) > 2 * float(core.scales[0, 0])
    assert torch.equal(floored.flatten()[1:], core.scales.flatten()[1:])
    assert not torch.equal(UE8M0().quantize(weight, QuantScheme.parse("Wmxfp8A16_b128x128")).dequantize(), core.dequantize())


@pytest.mark.parametrize("name", ["Wfp8Afp8_tensor", "W8A8", "Wfp8e5m2A16_b128x128"])
def test_other_schemes_are_refused(name: str) -> None:
    with pytest.raises(SchemeError, match="choose another algorithm"):
        DeepGemm().quantize(torch.ones(128, 128), QuantScheme.parse(name))
    with pytest.raises(SchemeError, match="need calibration"):
        Floored().quantize(torch.ones(128, 128), QuantScheme.parse("Wfp8Afp8_tensor_static"))
