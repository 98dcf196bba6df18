from __future__ import annotations

import pytest
import torch
from qplug_int8.kernels.triton_wint2 import TritonWINT2
from qplug_int8.paddle.wint2 import CCQFormat
from torch import Tensor

from qplug_core.config import LayerQuant
from qplug_core.device import Device
from qplug_core.kernel import problem_of
from qplug_core.scheme import QuantScheme
from qplug_core.testing.interpreter import need_interpreter
from qplug_core.weight import OpaqueWeight

need_interpreter()

KERNEL = TritonWINT2()


def make(n: int, k: int, seed: int = 0) -> OpaqueWeight:
    generator = torch.Generator().manual_seed(seed)
    stored = {
        "quant_weight": torch.randint(0, 256, (k // 4, n), generator=generator, dtype=torch.uint8),
        "weight_scale": torch.randint(0, 256, (k // 128, n), generator=generator, dtype=torch.uint8),
        "super_scales": (torch.rand(n, generator=generator) * 0.01).bfloat16(),
        "code_scale": torch.rand(n, generator=generator) * 8 + 120,
        "code_zp": torch.rand(n, generator=generator) * 5,
    }
    weight = CCQFormat().decode(stored, LayerQuant(QuantScheme.parse("Wccq2A16"), "ccq2"), n, k)
    assert isinstance(weight, OpaqueWeight)
    return weight


def distance(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("n", "k", "m", "dtype"), [(16, 128, 2, "bfloat16"), (70, 384, 18, "float16"), (33, 1280, 1, "float16")]
)
def test_product_of_ragged_shapes(n: int, k: int, m: int, dtype: str) -> None:
    weight = make(n, k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(getattr(torch, dtype))
    bias = torch.linspace(-1, 1, n)
    y = KERNEL.apply(x, KERNEL.pack(weight), bias)
    expected = x.double() @ weight.dequantize().double().t() + bias.double()
    assert y.dtype == x.dtype
    assert distance(y, expected) < (4e-3 if dtype == "bfloat16" else 5e-4)


def test_every_byte_is_decoded_exactly() -> None:
    weight = make(256, 128)
    weight.stored["quant_weight"][:] = torch.arange(256, dtype=torch.uint8)
    weight.stored["super_scales"] = torch.ones(256)
    held = weight.dequantize()
    for column in range(4):
        x = torch.zeros(1, 128, dtype=torch.float16)
        x[0, column] = 1.0
        assert torch.equal(KERNEL.apply(x, KERNEL.pack(weight))[0].float(), held[:, column])


def test_one_launch_gives_what_the_experts_give_one_by_one() -> None:
    packs = [KERNEL.pack(make(40, 256, e)) for e in range(3)]
    stack = KERNEL.pack(make(40, 256))
    stack.tensors = {name: torch.stack([p.tensors[name] for p in packs]) for name in stack.tensors}
    x = torch.randn(22, 256, generator=torch.Generator().manual_seed(9)).half()
    y = KERNEL.apply_experts(x, stack, torch.tensor([2, 2, 20]))
    assert torch.equal(y[:2], KERNEL.apply(x[:2], packs[0]))
    assert distance(y[2:20], KERNEL.apply(x[2:20], packs[2]).double()) < 1e-3
    assert not y[20:].any()


def test_no_tokens_strides_and_nan() -> None:
    packed = KERNEL.pack(make(16, 128))
    assert KERNEL.apply(torch.empty(0, 128).half(), packed).shape == (0, 16)
    x = torch.randn(2, 3, 256).half()[..., ::2]
    assert torch.equal(KERNEL.apply(x, packed).view(6, 16), KERNEL.apply(x.reshape(6, 128).contiguous(), packed))
    x = torch.ones(3, 128).half()
    x[1, 5] = float("nan")
    y = KERNEL.apply(x, packed)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_refusals() -> None:
    problem, gpu = problem_of(make(16, 256), "experts", "bfloat16"), Device.from_name("sm_80")
    assert KERNEL.supports(problem, gpu) == []
    assert [r.code for r in KERNEL.supports(problem, Device.from_name("sm_75"))] == ["device"]
    cut = make(16, 256).narrow((0, 16), (0, 64))
    assert [r.code for r in KERNEL.supports(problem_of(cut, "experts", "bfloat16"), gpu)] == ["scheme"]
