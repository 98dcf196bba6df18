"""Products of several weights with one row in one call, and the memory that packed weights lie in."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch

from qplug_core.device import Device
from qplug_core.kernels import builder, huge_pages
from qplug_core.kernels.cpu_decoder_layer import Linear, Weight, _weight, missing, taken
from qplug_core.kernels.cpu_emulated import CpuEmulated
from qplug_core.kernels.cpu_weight_only import CpuWeightOnly
from qplug_core.kernels.torch_c import KINDS
from qplug_core.scheme import QuantScheme
from qplug_core.testing.weights import random_weight


class WeightOnly(CpuWeightOnly):
    name = "test.cpu_weight_only"
    bits = (2, 3, 4, 8)


KERNEL = WeightOnly()
SCHEMES = (
    "W4A16_g32", "W4A16_g32_asym", "W4A16_g32_asym_actorder", "W3A16_g32", "W2A16_g64_asym", "W8A16", "W8A16_channel_asym", "WNF4A16",
    "Wfp8A16",
)  # fmt: skip


def linear(text: str, n: int, k: int, bias: bool = False) -> Linear:
    weight = random_weight(QuantScheme.parse(text), n, k, torch.Generator().manual_seed(n))
    return Linear(KERNEL, KERNEL.pack(weight), torch.randn(n) if bias else None)


def together(linears: list[Linear], x: torch.Tensor, threads: int) -> list[torch.Tensor]:
    """Results ``[N]`` of the one call."""
    call = builder.library("weight_only").qplug_weight_only_linears
    call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    weights = [_weight(one) for one in linears]
    out = [x.new_full((one.packed.n + 3,), 7.0) for one in linears]
    pointers = (ctypes.POINTER(Weight) * len(weights))(*map(ctypes.pointer, weights))
    results = (ctypes.c_void_p * len(out))(*(y.data_ptr() for y in out))
    assert call(pointers, results, len(out), x.data_ptr(), KINDS[x.dtype], threads) == 0
    assert all(bool((y[-3:] == 7).all()) for y in out)
    return [y[:-3] for y in out]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", SCHEMES)
def test_several_products_are_those_of_one_weight_after_the_other(text, dtype, instruction_set):
    """Ragged rows, a bias, more threads than tiles, tiles of one thread that are of two weights."""
    linears = [linear(text, 700, 256), linear(text, 17, 256, bias=True), linear(text, 33, 256)]
    x = torch.randn(256, generator=torch.Generator().manual_seed(1)).to(dtype)
    right = [KERNEL.apply(x[None], one.packed, one.bias)[0] for one in linears]
    for threads in (1, 2, 3, 7):
        for count in (1, 3):
            assert all(map(torch.equal, together(linears[:count], x, threads), right))


def test_weights_of_different_kinds_share_a_call():
    linears = [linear("W4A16_g32", 640, 256), linear("W8A16", 48, 256), linear("W2A16_g64_asym", 90, 256)]
    x = torch.randn(256).bfloat16()
    right = [KERNEL.apply(x[None], one.packed)[0] for one in linears]
    assert all(map(torch.equal, together(linears, x, 2), right))


def test_only_products_without_a_step_before_them_are_taken():
    assert not missing()
    one = linear("W4A16_g32", 32, 64)
    assert taken(one)
    one.packed.tensors["pre_scale"] = torch.ones(64)
    assert not taken(one)

    class Emulated(CpuEmulated):
        name = "test.cpu_emulated"

    assert not taken(linear("W4A16_g32", 32, 64)._replace(kernel=Emulated()))


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="huge pages are Linux's")
def test_large_memory_begins_a_page_and_is_not_larger_than_asked(monkeypatch):
    for shape, dtype in (((5, 700_000), torch.int32), ((huge_pages.PAGE,), torch.uint8)):
        room = huge_pages.empty(shape, dtype)
        assert (tuple(room.shape), room.dtype, room.is_contiguous()) == (shape, dtype, True)
        assert room.data_ptr() % huge_pages.PAGE == 0
        room.fill_(3)
        assert int(room.view(-1)[-1]) == 3
    assert huge_pages.empty((7,), torch.int32).shape == (7,)
    # A kernel without huge pages gives memory all the same.
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999)
    assert huge_pages.empty((5, 700_000), torch.int32).fill_(1).sum() == 3_500_000


def test_the_layer_is_built_for_every_instruction_set(instruction_set):
    assert builder.refusals("decoder_layer", Device.cpu()) == []
