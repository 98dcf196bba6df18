"""Attention of one token and the rows of a quantized cache in C: against torch and the reference coder, on every instruction set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qplug_core.kernels import cpu_attention, cpu_kv_cache
from qplug_core.kernels.cpu_attention import attention
from qplug_core.kv import kv_scheme
from qplug_core.reference.kv_cache import CacheCoder

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    (1, 16, 16, 64, 128, 128),
    (2, 8, 2, 77, 80, 80),
    (1, 4, 1, 1, 16, 16),
    (3, 6, 3, 130, 192, 128),
    (1, 32, 8, 500, 64, 64),
]
"""B, H, heads of the cache, T, channels of keys, of values."""


@pytest.fixture(autouse=True)
def fresh(instruction_set):
    caches = (cpu_attention._missing, cpu_attention._function, cpu_kv_cache._function, cpu_kv_cache._missing)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def expected(q, k, v, mask, scaling):
    times = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(times, 1) for t in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q.double(), k, v, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2)


def error(y, right):
    return float((y.double() - right).norm() / right.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_against_torch(dtype, shape, masked):
    batch, heads, held, tokens, dk, dv = shape
    torch.manual_seed(0)
    k = torch.randn(batch, held, 2 * tokens + 3, dk).to(dtype)[:, :, 1 : tokens + 1]
    v = torch.randn(batch, held, tokens, dv).to(dtype)
    q = torch.randn(batch, heads, 1, dk).to(dtype)
    mask = torch.rand(batch, 1, 1, tokens) > 0.3
    mask[..., -1] = True
    y = attention(q, k, v, mask if masked else None, dk**-0.5, dv)
    assert y.shape == (batch, 1, heads, dv)
    assert y.dtype == dtype
    assert error(y, expected(q, k, v, mask if masked else None, dk**-0.5)) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_a_mask_of_each_head_and_threads(monkeypatch):
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, 1, 64), torch.randn(2, 2, 300, 64)
    mask = torch.rand(2, 8, 1, 300) > 0.5
    right = expected(q, k, k, mask, 0.125)
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert error(attention(q, k, k, mask, 0.125, 64), right) < 1e-6
    one = torch.randn(1, 6, 1, 64), torch.randn(1, 1, 300, 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert error(attention(one[0], one[1], one[1], None, 0.125, 64), expected(*one, one[1], None, 0.125)) < 1e-6


def test_nan_and_infinity_come_out_and_hidden_tokens_do_not():
    q, k = torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 100, 16)
    v = torch.zeros(1, 1, 100, 16)
    v[0, 0, 70] = float("inf")
    assert attention(q, k, v, None, 1.0, 16).isinf().all()
    k[0, 0, 70] = float("nan")
    assert attention(q, k, v, None, 1.0, 16).isnan().all()
    mask = torch.ones(1, 1, 1, 100, dtype=torch.bool)
    k[0, 0, 70], v[0, 0, 70] = 1e30, 5.0
    mask[..., 70] = False
    assert (attention(q, k, v, mask, 1.0, 16) == 0).all()
    assert (attention(q, k, v + 1, torch.zeros_like(mask), 1.0, 16) == 0).all()
    # Scores far beyond what exp can take, in either direction, and rising from block to block.
    k = torch.arange(100.0).view(1, 1, 100, 1).expand(1, 1, 100, 16).contiguous()
    y = attention(q, k, torch.arange(100.0).view(1, 1, 100, 1).expand(1, 1, 100, 16), None, 10.0, 16)
    assert (y == 99).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("word", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("scales", [0, 1, 3])
def test_rows_are_those_of_the_reference(dtype, word, scales):
    """``scales``: stored ones, for all or for each of three heads; 0: one for every token and head."""
    torch.manual_seed(0)
    kv = kv_scheme(word)
    if scales:
        coder = CacheCoder(replace(kv, dynamic=False, block=(0, 0)), torch.rand(scales) * 0.02 + 0.005)
    else:
        coder = CacheCoder(replace(kv, block=(1, 0), dynamic=True))
    for size in (1e-3, 100.0, 1.0):
        x = (torch.randn(2, 3, 50, 64) * size * torch.logspace(-3, 0, 50)[:, None]).to(dtype)
        x[0, 0, 0] = 0
        assert not cpu_kv_cache.refusals(coder, 64, dtype, x.device)
        rows, right = cpu_kv_cache.rows_of(coder, dtype), coder.encode(x)
        room = torch.zeros(2, 3, 100, right.shape[-1], dtype=torch.uint8)
        to = room[:, :, 10:60]
        cpu_kv_cache.encode(rows, x, to)
        assert torch.equal(to, right)
        assert not room[:, :, :10].any()
        assert not room[:, :, 60:].any()
        numbers = coder.decode(right, 64, dtype)
        assert torch.equal(cpu_kv_cache.decode(rows, to, 64, dtype), numbers)
    q = torch.randn(2, 6, 1, 64).to(dtype)
    y = attention(q, to, to, None, 0.125, 64, rows.held, rows.scale, rows.scale)
    # The kernel rounds what comes out alone; codes are numbers of float32 times scales as they are stored.
    exact = CacheCoder(coder.kv, None if coder.scale is None else coder.scale.to(dtype).float())
    numbers = exact.decode(right, 64, torch.float32)
    assert error(y, expected(q, numbers, numbers, None, 0.125)) < (2e-6 if dtype == torch.float32 else 4e-3)


def test_every_float8_code_and_half_way():
    """Static scale 1: codes, the middles between neighbours, and what saturates."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[~every.isnan()].sort().values
    x = torch.cat([every, (every[1:] + every[:-1]) / 2, torch.tensor([500.0, -1e9, 1e-12, -0.0])])
    x = torch.nn.functional.pad(x, (0, -len(x) % 16)).view(1, 1, 1, -1)
    coder = CacheCoder(kv_scheme("fp8"), torch.tensor(1.0))
    to = torch.empty(1, 1, 1, x.shape[-1], dtype=torch.uint8)
    cpu_kv_cache.encode(cpu_kv_cache.rows_of(coder, torch.float32), x, to)
    assert torch.equal(to, coder.encode(x))


@pytest.mark.parametrize("word", ["fp8", "int8", "int4"])
def test_a_nan_in_a_token_stays_in_that_token(word):
    coder = CacheCoder(replace(kv_scheme(word), block=(1, 0), dynamic=True))
    x = torch.randn(1, 1, 3, 32)
    x[0, 0, 1, 5] = float("nan")
    rows = cpu_kv_cache.rows_of(coder, torch.float32)
    to = torch.empty(1, 1, 3, coder.width(32), dtype=torch.uint8)
    cpu_kv_cache.encode(rows, x, to)
    back = cpu_kv_cache.decode(rows, to, 32, torch.float32)
    assert back[0, 0, 1, 5].isnan()
    assert back[0, 0, (0, 2)].isfinite().all()


def test_what_is_refused_says_so():
    k = torch.randn(1, 2, 5, 64)
    for q, mask, word in (
        (torch.randn(1, 3, 1, 64), None, "queries"),
        (torch.randn(1, 4, 2, 64), None, "queries"),
        (torch.randn(1, 4, 1, 64).double(), None, "float64"),
        (torch.randn(1, 4, 1, 64), torch.zeros(1, 1, 1, 5), "mask"),
    ):
        assert word in " ".join(map(str, cpu_attention.refusals(q, k, k, mask, 64)))
    assert "queries" in " ".join(map(str, cpu_attention.refusals(k[:, :, :1, :40], k[..., :40], k, None, 64)))
    for word in ("nvfp4", "int8.asym", "int4.g8", "fp8_e5m2"):
        scheme = kv_scheme(word)
        coder = CacheCoder(scheme, None if scheme.dynamic is True else torch.tensor(1.0))
        assert cpu_kv_cache.refusals(coder, 64, torch.bfloat16, torch.device("cpu"))


def test_a_compiler_sees_one_operation():
    q, k = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 5, 64)
    step = torch.compile(lambda q, k: attention(q, k, k, None, 0.125, 64) + 1, fullgraph=True, backend="eager")
    assert torch.equal(step(q, k), attention(q, k, k, None, 0.125, 64) + 1)
