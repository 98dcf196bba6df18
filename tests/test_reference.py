"""The definitions: activation quantization, embeddings, experts, KV caches, and the escape hatch."""

from __future__ import annotations

import pytest
import torch

from qplug_core.device import Device
from qplug_core.errors import SchemeError
from qplug_core.kernel import Problem
from qplug_core.quantizer import RoundToNearest
from qplug_core.reference.activation import quantize_activation
from qplug_core.reference.embedding import ReferenceEmbedding
from qplug_core.reference.kv_cache import ReferenceKVCache
from qplug_core.reference.linear import ReferenceExperts, ReferenceLinear
from qplug_core.scheme import QuantScheme, TensorQuant
from qplug_core.weight import OpaqueWeight


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def act(name):
    return QuantScheme.parse(name).act


def test_int8_token_by_hand():
    x = torch.tensor([[127.0, -63.4, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0]])
    q = quantize_activation(x, act("W8A8"))
    assert q.codes.tolist() == [[127, -63, 0, 2], [0, 0, 0, 0]]
    assert q.scales.flatten().tolist() == [1.0, 0.0]
    assert torch.equal(q.dequantize(torch.float32)[1], torch.zeros(4))


def test_another_divisor_is_another_function():
    x = noise(64, 256)
    common = quantize_activation(x, act("W8A8")).codes
    other = quantize_activation(x, act("W8A8_a:rule=127.5")).codes
    assert 0.05 < (common != other).float().mean() < 0.2


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("W8A8", 0.01),
        ("W8A8_a:rule=127.5", 0.01),
        ("W8A8_a:asym", 0.01),
        ("W8A8_a:g32", 0.01),
        ("Wfp8Afp8", 0.04),
        ("Wfp8Afp8_b128x128", 0.04),
        ("Wmxfp8Amxfp8", 0.06),
        ("Wmxfp4Amxfp4", 0.2),
    ],
)
def test_codes_and_scales_say_what_x_was(name, bound):
    x = noise(7, 200)
    back = quantize_activation(x, act(name)).dequantize(torch.float32)
    assert 0 < float((back - x).norm() / x.norm()) < bound


def test_a_static_scale_is_used_as_stored():
    x = torch.tensor([[1.0, -300.0, 3.0]])
    q = quantize_activation(x, act("W8A8_static"), torch.tensor(2.0))
    assert q.codes.tolist() == [[0, -128, 2]]
    fp8 = act("Wfp8Afp8_static")
    assert quantize_activation(torch.tensor([[1e4]]), fp8, torch.tensor(1.0)).codes.float().item() == 448.0


def test_a_divisor_divides():
    local = act("Wnvfp4Anvfp4")
    x = noise(4, 64)
    by_scale = quantize_activation(x, local, torch.tensor(0.25)).dequantize(torch.float32)
    by_divisor = quantize_activation(x, local, torch.tensor(4.0), divide=True).dequantize(torch.float32)
    assert torch.equal(by_scale, by_divisor)


@pytest.mark.parametrize(("rule", "byte"), [("floor", 127), ("ceil", 128), ("ct", 128), ("", 128)])
def test_the_exponent_of_mx_follows_its_rule(rule, byte):
    part = TensorQuant("fp4_e2m1", (1, 32), dynamic=True, scale_dtype="e8m0", rule=rule)
    x = torch.zeros(1, 32)
    x[0, 0] = 7.5
    assert quantize_activation(x, part).scales.item() == byte


def test_nan_comes_out():
    weight = RoundToNearest().quantize(noise(8, 16), QuantScheme.parse("W8A8"))
    weight.act_scale = torch.tensor(0.1)
    kernel = ReferenceLinear()
    x = noise(3, 16)
    x[1, 2] = float("nan")
    for scheme in ("W8A8", "W8A8_static", "W8A16"):
        weight.scheme = QuantScheme.parse(scheme)
        y = kernel.apply(x, kernel.pack(weight))
        assert y[1].isnan().all(), scheme
        assert not y[[0, 2]].isnan().any()


@pytest.mark.parametrize("kernel", [ReferenceLinear(), ReferenceExperts()])
def test_the_product_with_everything_that_touches_x(kernel):
    weight = RoundToNearest().quantize(noise(600, 48), QuantScheme.parse("W4A16_g16_asym"))
    weight.pre_scale, weight.act_shift = noise(48, seed=1), noise(48, seed=2)
    x, bias = noise(2, 3, 48, seed=3), noise(600, seed=4)
    expected = ((x - weight.act_shift) * weight.pre_scale) @ weight.dequantize().T + bias
    torch.testing.assert_close(kernel.apply(x, kernel.pack(weight), bias), expected, rtol=1e-5, atol=1e-5)
    assert kernel.supports(Problem("linear", weight.scheme, 600, 48), Device.from_name("sm_70")) == []


def test_packing_again_refills_the_storage():
    kernel = ReferenceLinear()
    scheme = QuantScheme.parse("W8A16")
    first, second = (RoundToNearest().quantize(noise(8, 16, seed=s), scheme) for s in (0, 1))
    packed = kernel.pack(first)
    places = {name: t.data_ptr() for name, t in packed.tensors.items()}
    x = noise(2, 16, seed=2)
    again = kernel.pack(second, packed)
    assert {name: t.data_ptr() for name, t in again.tensors.items()} == places
    assert torch.equal(kernel.apply(x, again), x @ second.dequantize().T)
    with pytest.raises(ValueError, match="in use"):
        kernel.pack(RoundToNearest().quantize(noise(9, 16), scheme), packed)


def test_embedding_rows():
    weight = RoundToNearest().quantize(noise(50, 32), QuantScheme.parse("W4A16_g32"))
    kernel = ReferenceEmbedding()
    ids = torch.tensor([[0, 49, 3]])
    assert torch.equal(kernel.apply(ids, kernel.pack(weight)), weight.dequantize()[ids])


@pytest.mark.parametrize(
    ("name", "scale", "width"),
    [
        ("W16A16C8", None, 64 + 4),
        ("W16A16C8_c:asym", None, 64 + 5),
        ("W16A16C4", None, 32 + 4),
        ("W16A16C4_c:g16", None, 32 + 16),
        ("W16A16C4_c:asym", None, 32 + 5),
        ("W16A16Cnvfp4", None, 32 + 4),
        ("W16A16Cnvfp4_c:local", torch.tensor(0.01), 32 + 4),
        ("W16A16Cfp8_c:dynamic.token", None, 64 + 4),
        ("W16A16Cfp8e5m2", torch.tensor(0.01), 64),
        ("W16A16Cfp8", torch.tensor(0.01), 64),
        ("W16A16Cfp8_c:head", torch.tensor([0.01, 0.02]), 64),
        ("W16A16C8_c:static.head", torch.full((2, 64), 0.03), 64),
    ],
)
def test_a_cache_reads_back_what_was_stored(name, scale, width):
    scheme = QuantScheme.parse(name)
    kv, bound = scheme.kv, scheme.tolerance.cache
    x = noise(3, 2, 5, 64)
    coder = ReferenceKVCache().coder(kv, scale)
    stored = coder.encode(x)
    assert stored.dtype == torch.uint8
    assert stored.shape == (*x.shape[:-1], coder.width(64)) == (*x.shape[:-1], width)
    assert bound / 10 < float((coder.decode(stored, 64, torch.float32) - x).norm() / x.norm()) < bound


def test_a_static_cache_needs_its_scale():
    with pytest.raises(SchemeError, match="k_scale"):
        ReferenceKVCache().coder(QuantScheme.parse("W16A16Cfp8").kv)


def test_an_opaque_weight_runs_on_the_reference_kernel():
    table = noise(16, 8)
    weight = OpaqueWeight(
        QuantScheme.parse("Wccq2A16"),
        "toy",
        {"index": torch.arange(4).int()},
        4,
        8,
        lambda t, n, k: table[t["index"].long()],
    )
    kernel = ReferenceLinear()
    x = noise(3, 8, seed=1)
    torch.testing.assert_close(kernel.apply(x, kernel.pack(weight)), x @ table[:4].T)
