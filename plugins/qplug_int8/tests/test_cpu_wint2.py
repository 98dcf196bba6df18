"""WINT2's C kernel against the definition, on every instruction set of this machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from qplug_int8.kernels.cpu_wint2 import CpuWINT2
from qplug_int8.paddle.wint2 import CCQFormat

from qplug_core.config import LayerQuant
from qplug_core.device import Device
from qplug_core.kernel import problem_of
from qplug_core.kernels import builder, cpu_weight_only, cpu_wint2
from qplug_core.scheme import QuantScheme

SCHEME = QuantScheme.parse("Wccq2A16_g64")
KERNEL = CpuWINT2()


def made(n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    stored = {
        "quant_weight": torch.randint(0, 256, (k // 4, n), generator=generator, dtype=torch.uint8),
        "weight_scale": torch.randint(0, 256, (k // 128, n), generator=generator, dtype=torch.uint8),
        "super_scales": torch.rand(n, generator=generator) * 0.01,
        "code_scale": torch.rand(n, generator=generator) * 8 + 120,
        "code_zp": torch.rand(n, generator=generator) * 5,
    }
    return CCQFormat().decode(stored, LayerQuant(SCHEME, "ccq2"), n, k)


def rel(y, exact):
    return float((y.double() - exact).norm() / exact.norm())


@pytest.fixture(params=[name for name in ("avx512_bf16", "avx512", "avx2") if name in Device.cpu().features])
def each_set(request, monkeypatch):
    def forget():
        for cached in (builder.load, cpu_weight_only._function, cpu_wint2._functions):
            cached.cache_clear()

    forget()
    # The product of 8 bits, which takes long to compile, stays that of this machine.
    cpu_weight_only._function()
    monkeypatch.setattr(builder, "instruction_set", lambda device: request.param)
    builder.load.cache_clear()
    yield request.param
    forget()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(1, 128), (40, 256), (48, 640)])
def test_product_of_few_and_many_tokens(n, k, dtype, each_set):
    weight = made(n, k)
    packed, exact = KERNEL.pack(weight), weight.dequantize().double().T
    bias = torch.randn(n).to(dtype)
    for m in (1, 2, 3, 7, 8, 16, 17, 40):
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        bound = SCHEME.tolerance.product if dtype == torch.float32 else SCHEME.tolerance.product_16bit
        assert rel(KERNEL.apply(x, packed), x.double() @ exact) <= bound
        assert rel(KERNEL.apply(x, packed, bias), x.double() @ exact + bias.double()) <= bound
    assert rel(KERNEL.apply(x, KERNEL.pack(made(n, k, seed=1))), x.double() @ exact) > 0.1


def test_every_weight_is_decoded_exactly(each_set):
    """A product with unit vectors is the weight itself; codes that two roundings make differ from those that one makes."""
    weight = made(33, 256)
    assert torch.equal(KERNEL.apply(torch.eye(256)[:16], KERNEL.pack(weight)), weight.dequantize().T[:16])
    whole = made(1600, 512).stored
    twice = torch.floor(whole["quant_weight"].float() * whole["code_scale"] + whole["code_zp"] + 0.5)
    once = torch.floor(whole["quant_weight"].double() * whole["code_scale"].double() + whole["code_zp"].double() + 0.5)
    where = (twice != once).nonzero()
    assert len(where), "this seed has no code that tells the two apart"
    row, column = (int(i) for i in where[0])
    unit = torch.zeros(1, 512)
    unit[0, 4 * row + 3] = 1
    large = made(1600, 512)
    assert torch.equal(KERNEL.apply(unit, KERNEL.pack(large))[0, column], large.dequantize()[column, 4 * row + 3])


def test_nan_and_infinity_come_out_and_shapes_are_kept(each_set):
    packed = KERNEL.pack(made(32, 128))
    x = torch.randn(2, 3, 128, dtype=torch.bfloat16)
    x[0, 1, 5], x[1, 2, 7] = float("nan"), float("inf")
    y = KERNEL.apply(x, packed)
    assert y.shape == (2, 3, 32)
    assert y[0, 1].isnan().all()
    assert not y[1, 2].isfinite().any()
    assert y[0, 0].isfinite().all()
    assert KERNEL.apply(x[:0], packed).shape == (0, 3, 32)
    assert torch.equal(KERNEL.apply(x.transpose(0, 1), packed)[0, 0], y[0, 0])


@pytest.mark.parametrize("counts", [(3, 0, 8, 1), (0, 30, 2, 0)])
def test_grouped_experts_are_each_by_itself(counts):
    packs = [KERNEL.pack(made(40, 256, seed)) for seed in range(4)]
    ends, x = torch.tensor(counts).cumsum(0), torch.randn(33, 256, dtype=torch.bfloat16)
    stacked = replace(packs[0], tensors={name: torch.stack([p.tensors[name] for p in packs]) for name in packs[0].tensors})
    bias = torch.randn(4, 40).bfloat16()
    y = KERNEL.apply_experts(x, stacked, ends, bias)
    starts = [0, *ends.tolist()]
    for e, pack in enumerate(packs):
        rows = slice(starts[e], starts[e + 1])
        assert torch.equal(y[rows], KERNEL.apply(x[rows], pack, bias[e]))
    assert not y[ends[-1] :].any()


def test_what_is_refused():
    weight = made(40, 256)
    assert KERNEL.supports(problem_of(weight, "experts", "bfloat16"), Device.cpu()) == []
    cut = weight.narrow((0, 16), (0, 256))
    assert [r.code for r in KERNEL.supports(problem_of(cut, "experts", "bfloat16"), Device.cpu())] == ["scheme"]
    assert [r.code for r in KERNEL.supports(problem_of(weight, "embedding", "bfloat16"), Device.cpu())] == ["op"]


def test_a_refill_keeps_every_address():
    packed = KERNEL.pack(made(40, 256))
    addresses = [t.data_ptr() for t in packed.tensors.values()]
    x = torch.randn(3, 256)
    other = made(40, 256, seed=2)
    assert torch.equal(KERNEL.apply(x, KERNEL.pack(other, packed)), KERNEL.apply(x, KERNEL.pack(other)))
    assert [t.data_ptr() for t in packed.tensors.values()] == addresses
