# mypy: ignore-errors
# Triton's language is not Python's types: these functions are compiled, never called.
"""Keys and values to the bytes of a quantized cache, in Triton. The layout is in ``triton_kv_cache.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_parts import round_even


@triton.jit
def to_e4m3(value):
    """FP8 e4m3fn bytes uint8 of float32, to nearest, ties to even, saturated at 448; NaN is 0x7F. Needs no FP8 unit.

    From 2**-6 on, the exponent and three bits of mantissa with 120 less in the exponent; below, steps of 2**-9.
    """
    size = tl.minimum(tl.abs(value), 448.0)
    bits = size.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    small = round_even(size * 512.0).to(tl.uint32)
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(value != value, 0x7F, code)
    return (code | ((value.to(tl.uint32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def to_e5m2(value):
    """FP8 e5m2 bytes uint8 of float32, to nearest, ties to even, saturated at 57344; NaN is 0x7F."""
    size = tl.minimum(tl.abs(value), 57344.0)
    bits = size.to(tl.uint32, bitcast=True)
    normal = ((bits + 0xFFFFF + ((bits >> 21) & 1)) >> 21) - 448
    small = round_even(size * 65536.0).to(tl.uint32)
    code = tl.where(size < 6.103515625e-05, small, normal)
    code = tl.where(value != value, 0x7F, code)
    return (code | ((value.to(tl.uint32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit(do_not_specialize=["tokens"])
def kv_store(
    codes, scales, x, scale, slots, tokens, heads, depth, x_batch, x_token, x_head, c_batch, c_token, c_head, s_batch, s_token, s_head, head_step,
    KIND: tl.constexpr, LARGEST: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Program (t, h, b): H heads of token t of ``x [B, T, heads, depth]``, all by strides, to ``codes``, bytes uint8 by their strides.

    ``scale``: stored ones float32, ``head_step`` apart from head to head; None: a scale for each token and head is computed in float32 and
    goes to ``scales`` float32. ``slots [T]`` int64: where tokens go along the token axis, below 0 nowhere; None: in order. ``KIND``: int8,
    e4m3 or e5m2.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * H + tl.arange(0, H)
    batch = tl.program_id(2).to(tl.int64)
    r = tl.arange(0, D)
    there = (head < heads)[:, None] & (r < depth)[None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    read = tl.load(x + batch * x_batch + token * x_token + head[:, None] * x_head + r[None, :], mask=there, other=0.0)
    value = read.to(tl.float32)
    place = token
    if slots is not None:
        place = tl.load(slots + token)
    kept = (head < heads) & (tl.zeros((H,), tl.int64) + place >= 0)
    if scale is None:
        step = tl.div_rn(tl.max(tl.abs(value), 1), tl.zeros((H,), tl.float32) + LARGEST)
        bad = tl.max((value != value).to(tl.int32), 1)
        divisor = tl.where(step == 0.0, 1.0, step)[:, None]
        scaled = tl.div_rn(value, tl.zeros((H, D), tl.float32) + divisor)
        step = tl.where(bad > 0, float("nan"), step)
        tl.store(scales + batch * s_batch + place * s_token + head * s_head, step, mask=kept)
    else:
        step = tl.load(scale + head * head_step, mask=head < heads, other=1.0)
        divisor = tl.where(step == 0.0, 1.0, step)[:, None]
        # Stored scales work in the dtype of the model, which is what their producers do.
        scaled = tl.div_rn(value, tl.zeros((H, D), tl.float32) + divisor).to(dtype).to(tl.float32)
    if KIND == "int8":
        LOWEST: tl.constexpr = -127.0 if scale is None else -128.0
        whole = round_even(tl.minimum(tl.maximum(scaled, -512.0), 512.0))
        code = tl.minimum(tl.maximum(whole, LOWEST), 127.0).to(tl.int32).to(tl.uint8)
    elif KIND == "e4m3":
        code = to_e4m3(scaled)
    else:
        code = to_e5m2(scaled)
    tl.store(
        codes + batch * c_batch + place * c_token + head[:, None] * c_head + r[None, :],
        code,
        mask=kept[:, None] & (r < depth)[None, :],
    )
