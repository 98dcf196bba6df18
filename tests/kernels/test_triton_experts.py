"""One launch for all experts gives what one call for each expert gives, whatever tokens they get."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qplug_core.kernel import Kernel, PackedWeight
from qplug_core.kernels.triton_mixed import TritonMixed
from qplug_core.kernels.triton_scaled import TritonScaled
from qplug_core.kernels.triton_weight_only import TritonWeightOnly
from qplug_core.scheme import QuantScheme
from qplug_core.testing.interpreter import need_interpreter
from qplug_core.testing.weights import random_weight
from qplug_core.weight import QuantWeight

need_interpreter()


class WeightOnly(TritonWeightOnly):
    name = "test.triton_weight_only"
    numbers = ("int2", "int3", "int4", "int8", "fp8_e4m3", "fp4_e2m1", "nf4")


class Int8(TritonScaled):
    name = "test.triton_w8a8"
    number = "int8"


class Fp8(TritonScaled):
    name = "test.triton_wfp8afp8"
    number = "fp8_e4m3"


class W4A8(TritonMixed):
    name = "test.triton_w4a8"
    numbers = ("int4",)
    act = "int8"


class W4AFp8(TritonMixed):
    name = "test.triton_w4afp8"
    numbers = ("int4", "fp4_e2m1")
    act = "fp8_e4m3"


CASES = (
    (WeightOnly(), "W4A16_g32_asym"), (WeightOnly(), "W4A16_g32_actorder"), (WeightOnly(), "W3A16_channel"), (WeightOnly(), "Wfp8A16_b128x128"),
    (WeightOnly(), "Wnvfp4A16"), (WeightOnly(), "WNF4A16"), (Int8(), "W8A8_a:asym"), (Int8(), "W8A8_static"), (Int8(), "W8A8_a:tensor"),
    (Fp8(), "Wfp8Afp8"), (Fp8(), "Wfp8Afp8_b128x128"), (W4A8(), "W4A8_g32_asym"), (W4A8(), "W4A8_g32_actorder"), (W4AFp8(), "W4Afp8_g64_static"),
    (W4AFp8(), "Wmxfp4Afp8"),
)  # fmt: skip
ROUTES = {"one expert has many": (1, 0, 20, 2), "the first and the last have none": (0, 3, 17, 0), "few": (2, 2, 0, 1)}
"""Tokens of each of four experts; three rows more are nobody's."""


def experts(text: str, n: int, k: int) -> list[QuantWeight]:
    made = [
        random_weight(QuantScheme.parse(text), n, k, torch.Generator().manual_seed(e), scale_dtype=torch.float16)
        for e in range(4)
    ]
    return [replace(w, pre_scale=torch.linspace(0.5 + e, 2, k)) for e, w in enumerate(made)]


def stacked(packs: list[PackedWeight]) -> PackedWeight:
    first = packs[0]
    tensors = {
        name: torch.stack([p.tensors[name].view(torch.uint8) for p in packs]).view(t.dtype)
        for name, t in first.tensors.items()
    }
    return PackedWeight(first.kernel, first.n, first.k, tensors, first.meta)


def one_by_one(kernel: Kernel, x: Tensor, packs: list[PackedWeight], counts: tuple[int, ...], bias: Tensor | None) -> Tensor:
    rows = x.split([*counts, len(x) - sum(counts)])
    parts = [
        kernel.apply(r, p, None if bias is None else bias[e]) for e, (r, p) in enumerate(zip(rows, packs, strict=False))
    ]
    return torch.cat([*parts, x.new_zeros(len(rows[-1]), packs[0].n)])


@pytest.mark.parametrize(("number", "kernel", "text"), [(i, *case) for i, case in enumerate(CASES)])
def test_one_launch_gives_what_the_experts_give_one_by_one(number: int, kernel: Kernel, text: str) -> None:
    assert kernel.grouped
    # Each case takes one route and one shape, since a step of the interpreter takes long.
    (name, counts), (n, k) = list(ROUTES.items())[number % 3], ((40, 96), (33, 100))[number % 2]
    packs = [kernel.pack(w) for w in experts(text, n, k)]
    x = torch.randn(sum(counts) + 3, k, generator=torch.Generator().manual_seed(number)).half()
    bias = torch.linspace(-1, 1, 4 * n).view(4, n).half() if number % 4 else None
    y = kernel.apply_experts(x, stacked(packs), torch.tensor(counts).cumsum(0), bias)
    expected = one_by_one(kernel, x, packs, counts, bias)
    # Splits of K add in another order, and nothing else differs.
    assert float((y - expected).abs().max()) <= 2e-3 * float(expected.abs().max()), name
    assert not y[sum(counts) :].any()


def test_no_tokens_and_strides() -> None:
    kernel = WeightOnly()
    packed = stacked([kernel.pack(w) for w in experts("W4A16_g32", 16, 64)])
    ends = torch.tensor([0, 0, 0, 0])
    assert kernel.apply_experts(torch.empty(0, 64).half(), packed, ends).shape == (0, 16)
    x = torch.randn(5, 128).half()[:, ::2]
    ends = torch.tensor([1, 2, 3, 5])
    assert torch.equal(kernel.apply_experts(x, packed, ends), kernel.apply_experts(x.contiguous(), packed, ends))


def test_a_nan_stays_in_its_token() -> None:
    for kernel, text in ((WeightOnly(), "W4A16_g32"), (Int8(), "W8A8"), (W4AFp8(), "W4Afp8_g32")):
        packed = stacked([kernel.pack(w) for w in experts(text, 16, 64)])
        x = torch.ones(6, 64).half()
        x[3, 5] = float("nan")
        y = kernel.apply_experts(x, packed, torch.tensor([2, 4, 4, 6]))
        assert y[3].isnan().all()
        assert y[[0, 1, 2, 4, 5]].isfinite().all()
