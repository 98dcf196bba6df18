"""Rows of embeddings decoded in C are those of the definition, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qplug_core.device import Device
from qplug_core.kernel import problem_of
from qplug_core.kernels.cpu_embedding import CpuEmbedding
from qplug_core.scheme import QuantScheme
from qplug_core.testing.weights import random_weight
from qplug_core.weight import concat

KERNEL = CpuEmbedding()
SCHEMES = (
    "W2A16_g16", "W3A16_g32_asym", "W4A16_g32", "W4A16_g128_asym", "W6A16_g16", "W8A16", "W8A16_g32_asym", "W8A16_tensor", "WNF4A16_g64",
    "Wnvfp4A16", "Wmxfp4A16", "Wfp8A16", "Wfp8A16_b16x32", "Wfp8e5m2A16_tensor",
)  # fmt: skip


def made(scheme, n=70, k=100, seed=0):
    return random_weight(QuantScheme.parse(scheme), n, k, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 100, 256])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_those_of_the_definition(scheme, k):
    weight = made(scheme, k=k)
    ids = torch.tensor([[3, 0, 69], [3, 17, 18]])
    rows = KERNEL.apply(ids, KERNEL.pack(weight))
    assert rows.dtype == torch.float32
    assert torch.equal(rows, weight.dequantize_rows(ids))
    assert torch.equal(rows, weight.dequantize()[ids])
    assert not torch.equal(rows, KERNEL.apply(ids.flip(0), KERNEL.pack(weight)))


def test_a_shift_is_subtracted_after_rounding_the_product():
    weight = made("W4A16_g32_asym", n=300, k=256)
    weight = replace(weight, shift=torch.rand(weight.scales.shape))
    ids = torch.arange(300)
    assert torch.equal(KERNEL.apply(ids, KERNEL.pack(weight)), weight.dequantize())


def test_a_global_scale_of_each_row():
    weight = concat([made("Wnvfp4A16"), made("Wnvfp4A16", seed=1)], by_row=True)
    ids = torch.tensor([0, 69, 70, 139])
    assert torch.equal(KERNEL.apply(ids, KERNEL.pack(weight)), weight.dequantize_rows(ids))


def test_codes_are_held_at_their_own_width():
    assert KERNEL.pack(made("W4A16_g128", 512, 1024)).tensors["codes"].nbytes == 512 * 1024 // 2


@pytest.mark.parametrize("ids", [[-1], [70], [0, 99]])
def test_a_row_that_does_not_exist_is_an_error(ids):
    with pytest.raises(IndexError, match="rows 0 to 69"):
        KERNEL.apply(torch.tensor(ids), KERNEL.pack(made("W8A16")))


def test_no_rows_and_other_integers():
    packed = KERNEL.pack(made("W8A16"))
    assert KERNEL.apply(torch.empty(2, 0, dtype=torch.long), packed).shape == (2, 0, 100)
    ids = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32).t()
    assert torch.equal(KERNEL.apply(ids, packed), KERNEL.apply(ids.long(), packed))


def test_a_refill_keeps_every_address():
    packed, other = KERNEL.pack(made("W4A16_g32_asym")), made("W4A16_g32_asym", seed=3)
    addresses = [t.data_ptr() for t in packed.tensors.values()]
    ids = torch.arange(70)
    assert torch.equal(KERNEL.apply(ids, KERNEL.pack(other, packed)), other.dequantize())
    assert [t.data_ptr() for t in packed.tensors.values()] == addresses


def test_what_is_refused():
    cpu = Device.cpu()
    assert KERNEL.supports(problem_of(made("W8A16"), "embedding", "bfloat16"), cpu) == []
    assert [r.code for r in KERNEL.supports(problem_of(made("W8A16"), "linear", "bfloat16"), cpu)] == ["op"]
    ordered = made("W4A16_g32_actorder", k=128)
    assert [r.code for r in KERNEL.supports(problem_of(ordered, "embedding", "bfloat16"), cpu)] == ["act_order"]
    assert KERNEL.supports(problem_of(made("W8A16"), "embedding", "bfloat16"), Device.from_name("sm_90"))


def test_torch_compile_takes_it_whole():
    packed, ids = KERNEL.pack(made("W8A16")), torch.tensor([5, 6])
    compiled = torch.compile(lambda ids: KERNEL.apply(ids, packed) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids), KERNEL.apply(ids, packed) * 2)
