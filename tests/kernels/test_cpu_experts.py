"""All experts in one call equal one call for each, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qplug_core.experts import Grouped, group
from qplug_core.kernel import Kernel
from qplug_core.kernels.cpu_w8a8 import CpuInt8
from qplug_core.kernels.cpu_weight_only import CpuWeightOnly
from qplug_core.method import HubMethod, _Run
from qplug_core.quantizer import RoundToNearest
from qplug_core.scheme import QuantScheme

SCHEMES = (
    "W4A16_g32",
    "W4A16_g32_asym",
    "W3A16_g16",
    "W2A16_g16_asym",
    "W8A16",
    "WNF4A16_g64",
    "Wfp8A16",
    "Wnvfp4A16",
    "W8A8",
)


class _WeightOnly(CpuWeightOnly):
    name = "test.weight_only"


class _Int8(CpuInt8):
    name = "test.int8"


def made(scheme: str, experts: int, n: int, k: int, kernel: Kernel | None = None, **fields: object) -> list[HubMethod]:
    torch.manual_seed(0)
    parsed = QuantScheme.parse(scheme)
    kernel = kernel or (_Int8() if parsed.act else _WeightOnly())
    resolver = SimpleNamespace(kernel=lambda name: kernel)
    methods = []
    for e in range(experts):
        weight = RoundToNearest().quantize(torch.randn(n, k), parsed)
        weight = weight.with_tensors({name: make(e) for name, make in fields.items()})
        method = HubMethod(SimpleNamespace(), resolver, None, torch.bfloat16)
        method._runs = [_Run(kernel, kernel.pack(weight))]
        method._bind()
        methods.append(method)
    return methods


def one_by_one(methods: list[HubMethod], x: torch.Tensor, ends: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = x.new_zeros(x.shape[0], methods[0].packed[0].n)
    first = 0
    for e, end in enumerate(ends.tolist()):
        if end > first:
            y[first:end] = methods[e].apply(x[first:end], None if bias is None else bias[e])
        first = end
    return y


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_grouped_experts_equal_one_call_for_each(scheme, dtype):
    methods = made(scheme, 6, 40, 96)
    counts = torch.tensor([1, 0, 37, 3, 0, 8])
    ends, x = counts.cumsum(0), torch.randn(51, 96).to(dtype)
    bias = torch.randn(6, 40).to(dtype)
    expected = [one_by_one(methods, x, ends, b) for b in (None, bias)]
    grouped = group(methods)
    assert grouped is not None
    for b, y in zip((None, bias), expected, strict=True):
        assert torch.equal(grouped.apply(x, ends, b), y)
    assert torch.equal(one_by_one(methods, x, ends, None), expected[0]), "the experts themselves changed"
    assert not expected[0][49:].any()
    swapped = ends.new_tensor([0, 1, 38, 41, 41, 49])
    assert not torch.equal(grouped.apply(x, swapped), expected[0])


@pytest.mark.parametrize("counts", [(8, 0, 0), (0, 0, 0), (0, 0, 8), (1, 1, 6)])
@pytest.mark.usefixtures("two_threads")
def test_any_split_of_the_tokens(counts):
    methods = made("W4A16_g32", 3, 32, 64)
    x, ends = torch.randn(8, 64, dtype=torch.bfloat16), torch.tensor(counts).cumsum(0)
    expected = one_by_one(methods, x, ends, None)
    assert torch.equal(group(methods).apply(x, ends), expected)


def test_no_tokens():
    grouped = group(made("W4A16_g32", 3, 32, 64))
    assert grouped.apply(torch.empty(0, 64), torch.zeros(3, dtype=torch.long)).shape == (0, 32)


def test_act_order_and_pre_scale_of_each_expert():
    order = {
        "group_index": lambda e: torch.randperm(64, generator=torch.Generator().manual_seed(e)).int() // 32,
        "pre_scale": lambda e: torch.rand(64, generator=torch.Generator().manual_seed(e)) + 0.5,
    }
    methods = made("W4A16_g32", 3, 32, 64, **order)
    x, ends = torch.randn(8, 64), torch.tensor([3, 5, 8])
    expected = one_by_one(methods, x, ends, None)
    assert torch.equal(group(methods).apply(x, ends), expected)


def test_a_reload_of_one_expert_is_seen_by_the_group():
    methods, others = made("W4A16_g32", 3, 32, 64), made("W4A16_g32", 3, 32, 64)
    grouped = group(methods)
    methods[1].packed[0].refill(others[2].packed[0])
    x, ends = torch.randn(4, 64), torch.tensor([0, 4, 4])
    assert torch.equal(grouped.apply(x, ends), others[2].apply(x))
    assert grouped.packed.tensors["codes"][1].data_ptr() == methods[1].packed[0].tensors["codes"].data_ptr()


def test_experts_of_unequal_layout_or_without_a_grouped_kernel_stay_apart():
    assert group([*made("W4A16_g32", 1, 32, 64), *made("W8A16", 1, 32, 64)]) is None

    class Alone(_WeightOnly):
        grouped = False

    assert group(made("W4A16_g32", 2, 32, 64, Alone())) is None


def test_torch_compile_takes_the_group_whole():
    grouped = group(made("W4A16_g32", 3, 32, 64))
    assert isinstance(grouped, Grouped)
    x, ends = torch.randn(8, 64), torch.tensor([3, 3, 8])
    compiled = torch.compile(lambda x, ends: grouped.apply(x, ends) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, ends), grouped.apply(x, ends) + 1)
