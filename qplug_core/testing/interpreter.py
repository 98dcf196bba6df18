"""A repair of Triton's interpreter, for tests: with it, ``TRITON_INTERPRET=1`` computes what a GPU computes, by the rules of IEEE 754.

The interpreter of Triton 3.6 to 3.9 multiplies the bit patterns of bfloat16, truncates where float32 becomes bfloat16, and rounds to FP8
wrongly; none of these is an error message. :func:`repair` replaces its conversions and its arithmetic of narrow floats by those of
``ml_dtypes``. It cannot show what only a GPU does: races, alignment, tf32, smallest tile sizes.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import pytest


def need_interpreter() -> None:
    """At the head of a test module: skip it where kernels cannot be interpreted, otherwise repair the interpreter."""
    for module in ("triton", "ml_dtypes"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed; `tox run -e kernels` installs it", allow_module_level=True)
    if os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads it where a kernel is defined, so that one process either interprets or compiles.
        pytest.skip("TRITON_INTERPRET=1 is not set; `tox run -e kernels` sets it", allow_module_level=True)
    repair()


@functools.cache
def repair() -> None:
    """Repair the interpreter of this process, once.

    :raises ImportError: without ``triton``, ``numpy`` or ``ml_dtypes``.
    """
    import ml_dtypes
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    types = {
        tl.float16: np.float16,
        tl.float32: np.float32,
        tl.float64: np.float64,
        tl.bfloat16: ml_dtypes.bfloat16,
        tl.float8e4nv: ml_dtypes.float8_e4m3fn,
        tl.float8e5: ml_dtypes.float8_e5m2,
        tl.float8e4b8: ml_dtypes.float8_e4m3fnuz,
        tl.float8e5b16: ml_dtypes.float8_e5m2fnuz,
    }
    narrow = {tl.bfloat16, tl.float8e4nv, tl.float8e5, tl.float8e4b8, tl.float8e5b16}
    # Conversions of GPUs saturate.
    largest = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0, tl.float8e4b8: 240.0, tl.float8e5b16: 57344.0}
    bitwise = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    stock = {name: getattr(builder, name) for name in ("cast_impl", "binary_op", "unary_op", "create_fma")}
    stock_convert = interpreter._convert_float

    def values(data: Any, dtype: Any) -> Any:
        """The floats that an array of bits stands for, widened to float32 where they are narrower."""
        found = np.ascontiguousarray(data).view(types[dtype])
        return found if dtype == tl.float64 else found.astype(np.float32)

    def bits(data: Any, dtype: Any) -> Any:
        """An array of floats rounded to ``dtype``, ties to even, as the interpreter holds it."""
        if dtype in largest:
            data = np.where(np.isnan(data), data, np.clip(data, -largest[dtype], largest[dtype]))
        with np.errstate(over="ignore", invalid="ignore"):
            return data.astype(types[dtype]).view(interpreter._get_np_dtype(dtype))

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        source, target = source.scalar, target.scalar
        if source not in types or target not in types:
            return stock_convert(data, source, target, rounding)
        if target == tl.bfloat16 and rounding == interpreter._ir.ROUNDING_MODE.RTZ:
            return (values(data, source).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        unsigned = getattr(np, f"uint{target.primitive_bitwidth}")
        return bits(values(data, source), target).view(unsigned).reshape(data.shape)

    def cast_impl(self: Any, x: Any, target: Any) -> Any:
        source, wanted = x.dtype.scalar, target.scalar
        if source in narrow and wanted in types:
            return handle(bits(values(x.data, source), wanted), wanted)
        if source in narrow:
            return handle(values(x.data, source).astype(interpreter._get_np_dtype(target)), wanted)
        if wanted in narrow:
            wide = values(x.data, source) if source in types else x.data.astype(np.float32)
            return handle(bits(wide, wanted), wanted)
        return stock["cast_impl"](self, x, target)

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        dtype = a.dtype.scalar
        if dtype not in narrow or op in bitwise:
            return stock["binary_op"](self, a, b, op)
        result = op(values(a.data, dtype), values(b.data, b.dtype.scalar))
        return handle(result if result.dtype == np.bool_ else bits(result, dtype), dtype)

    def unary_op(self: Any, x: Any, op: Any) -> Any:
        dtype = x.dtype.scalar
        return handle(bits(op(values(x.data, dtype)), dtype), dtype) if dtype in narrow else stock["unary_op"](self, x, op)

    def create_fma(self: Any, a: Any, b: Any, c: Any) -> Any:
        dtype = c.dtype.scalar
        if dtype not in narrow:
            return stock["create_fma"](self, a, b, c)
        wide = [values(x.data, dtype).astype(np.float64) for x in (a, b, c)]
        return handle(bits(wide[0] * wide[1] + wide[2], dtype), dtype)

    def create_dot(self: Any, a: Any, b: Any, c: Any, *rest: Any, **more: Any) -> Any:
        operands = [values(x.data, x.dtype.scalar) if x.dtype.scalar in types else x.data.astype(np.float64) for x in (a, b)]
        # Products of 8-bit integers are exact in float64, and much faster than numpy's integer product.
        product = operands[0] @ operands[1]
        whole = c.data.dtype.kind in "iu"
        return handle((product.astype(np.int64) if whole else product).astype(c.data.dtype) + c.data, c.dtype.scalar)

    for name, function in {
        "cast_impl": cast_impl,
        "binary_op": binary_op,
        "unary_op": unary_op,
        "create_fma": create_fma,
        "create_dot": create_dot,
    }.items():
        setattr(builder, name, function)
    interpreter._convert_float = convert
    magnitudes = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

    def scaled(x: Any, scale: Any, number: Any, packed: bool, axis: int) -> Any:
        """An operand of ``dot_scaled`` in float64, ``axis`` its columns of K. Scales ``[rows, K / group]`` are never transposed."""
        if number == interpreter._ir.ScaleDotElemTypeTY.E2M1:
            assert packed, "FP4 operands are packed along K here"
            codes = np.stack([x.data & 15, x.data >> 4], axis=axis + 1 if axis == 0 else -1)
            shape = [size * (2 if i == axis else 1) for i, size in enumerate(x.data.shape)]
            codes = codes.reshape(shape)
            found = np.where(codes & 8, -1.0, 1.0) * magnitudes[codes & 7]
        else:
            found = values(x.data, tl.float8e4nv if number == interpreter._ir.ScaleDotElemTypeTY.E4M3 else x.dtype.scalar)
        if scale is None:
            return found
        if scale.dtype.scalar in types:
            factor = values(scale.data, scale.dtype.scalar).astype(np.float64)
        else:
            factor = np.where(scale.data == 255, np.nan, np.exp2(scale.data.astype(np.float64) - 127.0))
        factor = np.repeat(factor, found.shape[axis] // factor.shape[1], axis=1)
        return found * (factor.T if axis == 0 else factor)

    def create_dot_scaled(
        self: Any,
        a: Any,
        a_scale: Any,
        a_type: Any,
        b: Any,
        b_scale: Any,
        b_type: Any,
        fast: Any,
        a_packed: Any,
        b_packed: Any,
        c: Any,
    ) -> Any:
        product = scaled(a, a_scale, a_type, a_packed, 1) @ scaled(b, b_scale, b_type, b_packed, 0)
        return handle(product.astype(np.float32) + c.data, tl.float32)

    builder.create_dot_scaled = create_dot_scaled
