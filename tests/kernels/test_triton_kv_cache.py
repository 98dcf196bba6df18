from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qplug_core.engine import slab
from qplug_core.kernels import cpu_kv_cache, triton_kv_cache
from qplug_core.kernels.triton_kv_cache import refusals, store
from qplug_core.kv import kv_scheme
from qplug_core.reference.kv_cache import CacheCoder
from qplug_core.scheme import TensorQuant
from qplug_core.testing.interpreter import need_interpreter

need_interpreter()

WORDS = ("fp8", "fp8_e5m2", "int8")


def coder(word: str, how: str, heads: int = 3) -> CacheCoder:
    kv = kv_scheme(word)
    assert isinstance(kv, TensorQuant)
    if how == "token":
        return CacheCoder(replace(kv, block=(1, 0), dynamic=True))
    shape, size = ((0, 0), 1) if how == "tensor" else ((-1, 0), heads)
    return CacheCoder(
        replace(kv, block=shape, dynamic=False), torch.linspace(0.01, 0.03, size).reshape(() if size == 1 else size)
    )


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-5, 1, shape[-1])
    x[0, 0, 0] = 0.0
    return x.to(dtype)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("how", ["tensor", "head", "token"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bytes_are_those_of_the_coder(word: str, how: str, dtype: torch.dtype) -> None:
    made, x = coder(word, how), values((2, 3, 5, 48), dtype)
    assert refusals(made, 48, dtype) == []
    to = torch.full((2, 3, 5, made.width(48)), 0xAA, dtype=torch.uint8)
    store(made, x, to)
    assert torch.equal(to, made.encode(x))


@pytest.mark.parametrize("word", WORDS)
def test_values_beyond_the_range_saturate_and_nan_stays(word: str) -> None:
    made = coder(word, "tensor")
    x = torch.tensor([1e4, -1e4, 0.0, -0.0] * 4).bfloat16().view(1, 1, 1, 16)
    to = torch.empty(1, 1, 1, made.width(16), dtype=torch.uint8)
    store(made, x, to)
    assert torch.equal(to, made.encode(x))
    made = coder(word, "token")
    x = torch.ones(1, 2, 1, 16).bfloat16()
    x[0, 1, 0, 3] = float("nan")
    to = torch.empty(1, 2, 1, made.width(16), dtype=torch.uint8)
    store(made, x, to)
    back = made.decode(to, 16, torch.float32)
    assert back[0, 1].isnan().any()
    assert back[0, 0].isfinite().all()


@pytest.mark.parametrize("word", ["fp8", "fp8_e5m2"])
def test_every_float16_is_rounded_as_torch_rounds_it(word: str) -> None:
    x = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    x = x[x.isfinite()].view(1, 1, -1, 256)
    made = replace(coder(word, "tensor"), scale=torch.ones(()))
    to = torch.empty(*x.shape, dtype=torch.uint8)
    store(made, x, to)
    assert torch.equal(to, made.encode(x))


@pytest.mark.parametrize("how", ["head", "token"])
def test_slots_of_a_paged_cache(how: str) -> None:
    made, x = coder("fp8", how), values((1, 3, 4, 32), torch.bfloat16)
    cache = torch.zeros(5, 8, 3, made.width(32), dtype=torch.uint8)
    slots = torch.tensor([17, 2, -1, 39])
    store(made, x, cache.flatten(0, 1).transpose(0, 1)[None], slots)
    expected, flat = made.encode(x)[0].transpose(0, 1), cache.flatten(0, 1)
    for token, slot in ((0, 17), (1, 2), (3, 39)):
        assert torch.equal(flat[slot], expected[token])
    untouched = torch.ones(40, dtype=torch.bool)
    untouched[[17, 2, 39]] = False
    assert not flat[untouched].any()


def test_strides_and_no_tokens() -> None:
    made, x = coder("int8", "token"), values((2, 6, 3, 64), torch.bfloat16)
    wide = torch.zeros(2, 3, 10, made.width(32), dtype=torch.uint8)
    store(made, x[:, ::2, :, ::2], wide[:, :, 4:7])
    assert torch.equal(wide[:, :, 4:7], made.encode(x[:, ::2, :, ::2]))
    assert not wide[:, :, :4].any()
    store(made, x[:, ::2, :0, ::2], wide[:, :, :0])


def test_the_slab_of_the_reference_engine_stores_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kv_cache, "refusals", lambda *_: ["no CPU kernel"])
    called = []

    def noted(made: CacheCoder, x: Tensor, to: Tensor) -> None:
        called.append(made)
        store(made, x, to)

    monkeypatch.setattr(triton_kv_cache, "store", noted)
    made, x = coder("fp8", "token"), values((1, 2, 4, 32), torch.bfloat16)
    room = slab.Room(made)
    assert torch.equal(room.append(None, x), made.encode(x))
    assert called


def test_refusals() -> None:
    made = coder("fp8", "token")
    assert [r.code for r in refusals(made, 20, torch.bfloat16)] == ["shape"]
    assert [r.code for r in refusals(made, 32, torch.float32)] == ["dtype"]
    for word in ("int4", "int8.asym", "nvfp4", "int8.g32"):
        kv = kv_scheme(word)
        assert isinstance(kv, TensorQuant)
        assert "scheme" in {r.code for r in refusals(CacheCoder(kv), 64, torch.bfloat16)}
