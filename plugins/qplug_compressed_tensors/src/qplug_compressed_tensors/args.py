"""QuantizationArgs, the block of a compressed-tensors config that says how one tensor is quantized; and scheme presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.keys import check_keys
from qplug_core.scheme import TensorQuant

NUMBERS = (
    "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder", "scale_dtype", "zp_dtype",
)  # fmt: skip
METADATA = ("observer", "observer_kwargs")
"""Keys that say how scales were found."""

STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
SCALES: dict[Any, Literal["float", "e4m3", "e8m0"]] = {
    "torch.float8_e4m3fn": "e4m3",
    "torch.uint8": "e8m0",
    "torch.float8_e8m0fnu": "e8m0",
    "torch.float32": "float",
    "torch.bfloat16": "float",
    "torch.float16": "float",
}
PLUGIN = "qplug-compressed-tensors"
ZERO_DTYPES = ("torch.int8", "torch.uint8", "torch.float8_e4m3fn")

_FP8 = {"num_bits": 8, "type": "float"}
_INT8 = {"num_bits": 8, "type": "int"}
_TOKEN = {"strategy": "token", "dynamic": True}
_NV = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
_MX = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
_MX4 = {"num_bits": 4, "type": "float", **_MX}
_MX8 = {**_FP8, **_MX}


def _int(bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 128, **more}


PRESETS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "UNQUANTIZED": (None, None),
    **{f"W{b}A16": (_int(b), None) for b in range(2, 9)},
    **{f"W{b}A8": (_int(b), {**_INT8, **_TOKEN}) for b in range(2, 8)},
    **{f"W{b}A4": (_int(b), {"num_bits": 4, "type": "int", **_TOKEN}) for b in range(2, 5)},
    "W4A16_ASYM": (_int(4, symmetric=False), None),
    **dict.fromkeys(("W8A8", "INT8"), ({**_INT8, "strategy": "channel"}, {**_INT8, **_TOKEN})),
    "W4AFP8": (_int(4), {**_FP8, **_TOKEN}),
    "FP8": ({**_FP8, "strategy": "tensor"}, {**_FP8, "strategy": "tensor"}),
    "FP8_DYNAMIC": ({**_FP8, "strategy": "channel"}, {**_FP8, **_TOKEN}),
    "FP8_BLOCK": (
        {**_FP8, "strategy": "block", "block_structure": [128, 128]},
        {**_FP8, "strategy": "group", "group_size": 128, "dynamic": True},
    ),
    "NVFP4": (_NV, {**_NV, "dynamic": "local"}),
    "NVFP4A16": (_NV, None),
    "MXFP4": (_MX4, {**_MX4, "dynamic": True}),
    "MXFP4A16": (_MX4, None),
    "MXFP8": (_MX8, {**_MX8, "dynamic": True}),
    "MXFP8A16": (_MX8, None),
}
"""Names that stand for weights and input activations."""


def read_args(raw: Any, where: str, microscaling: bool = False) -> tuple[TensorQuant, bool]:
    """How a tensor is quantized, and whether ``weight_g_idx`` assigns its columns to groups.

    ``microscaling``: scales are E8M0 where nothing is said of them, because the layout has no others.

    :raises ConfigError: for a key or value that is not understood, or two that contradict each other.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where} is {raw!r}; an object of QuantizationArgs was needed, so correct it")
    check_keys(raw, (*NUMBERS, *METADATA), where, PLUGIN)
    dtype = _dtype(raw, where)
    dynamic = _one_of(raw, "dynamic", (False, True, "local"), False, where)
    symmetric = _one_of(raw, "symmetric", (True, False), True, where)
    if not symmetric and not dtype.startswith("int"):
        raise ConfigError(
            f"{where} says symmetric: False for floats, which have no zero points; set it to true, or type to 'int'"
        )
    _one_of(raw, "zp_dtype", (None, *ZERO_DTYPES), None, where)
    strategy, block = _block(raw, where)
    scale = (
        SCALES[_one_of(raw, "scale_dtype", tuple(SCALES), "torch.float8_e4m3fn", where)] if raw.get("scale_dtype") else None
    )
    if strategy == "tensor_group":
        scale = scale or "e4m3"
    elif scale == "e4m3":
        raise ConfigError(
            f"{where} says scale_dtype float8_e4m3fn with strategy {strategy!r}; FP8 scales have a second level, which "
            "only 'tensor_group' has, so correct one of them"
        )
    scale = scale or ("e8m0" if microscaling else "float")
    order = _one_of(raw, "actorder", (None, False, True, "group", "dynamic", "weight", "static"), None, where)
    rule = ""
    if dynamic is True and symmetric:
        rule = "ct" if scale == "e8m0" else "127.5" if dtype.startswith("int") else ""
    part = TensorQuant(dtype, block, symmetric, dynamic, scale, rule)
    return part, order in (True, "group", "dynamic") and block[0] == 1 and block[1] > 0


def write_args(part: TensorQuant, act_order: bool = False, kind: str = "weight") -> dict[str, Any]:
    """The QuantizationArgs that :func:`read_args` reads back; ``kind``: weight or act.

    :raises CannotEncode: for numbers that they have no words for.
    """
    floats = {"fp8_e4m3": 8, "fp4_e2m1": 4}
    if part.dtype not in floats and not part.dtype.startswith("int"):
        raise CannotEncode(
            f"numbers of type {part.dtype} were given; compressed-tensors has integers, fp8_e4m3 and fp4_e2m1, so choose "
            "another format"
        )
    if part.outlier:
        raise CannotEncode("activations with an outlier threshold were given; choose another format, or a scheme without it")
    rows, columns = part.block
    two_level = part.scale_dtype == "e4m3"
    strategy = {(0, 0): "tensor", (1, 0): "token" if kind == "act" else "channel"}.get(part.block)
    strategy = "tensor_group" if two_level else strategy or ("group" if rows == 1 else "block")
    args: dict[str, Any] = {
        "num_bits": part.bits,
        "type": "float" if part.dtype in floats else "int",
        "symmetric": part.symmetric,
        "strategy": strategy,
        "group_size": columns if strategy in ("group", "tensor_group") else None,
        "block_structure": [rows, columns] if strategy == "block" else None,
        "dynamic": part.dynamic,
        "actorder": "group" if act_order else None,
        "scale_dtype": {"float": None, "e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}[part.scale_dtype],
        "zp_dtype": None if part.symmetric else "torch.int8",
        "observer": None if part.dynamic is True else "memoryless_minmax" if kind == "weight" else "static_minmax",
        "observer_kwargs": {},
    }
    if strategy == "block" and min(part.block) < 1:
        raise CannotEncode(
            f"scales in blocks {part.block} were given; compressed-tensors has no word for them, so choose another format"
        )
    rule = read_args(args, kind)[0].rule
    if part.rule != rule and (part.rule, rule) != ("", "ct"):
        raise CannotEncode(
            f"activations of {part.dtype} with the scale rule {part.rule or 'amax / 127'!r} were given; in compressed-tensors "
            f"they have {rule or 'the common one'!r}, so write the scheme with a:rule={rule}, or choose another format"
        )
    return args


def _one_of(raw: Mapping[str, Any], key: str, values: tuple[Any, ...], default: Any, where: str) -> Any:
    value = raw.get(key)
    if value is None:
        return default
    # 1 equals True and 0 equals False, and neither is meant.
    if not any(type(value) is type(v) and value == v for v in values):
        known = ", ".join(repr(v) for v in values)
        raise ConfigError(f"{where} says {key}: {value!r}; one of {known} was needed, so correct it")
    return value


def _dtype(raw: Mapping[str, Any], where: str) -> str:
    bits, kind = raw.get("num_bits", 8), _one_of(raw, "type", ("int", "float"), "int", where)
    known = {"int": {b: f"int{b}" for b in range(2, 9)}, "float": {8: "fp8_e4m3", 4: "fp4_e2m1"}}[kind]
    if type(bits) is not int or bits not in known:
        raise ConfigError(
            f"{where} says num_bits: {bits!r} of type {kind!r}; one of {', '.join(map(str, known))} was needed, so correct it"
        )
    return known[bits]


def _block(raw: Mapping[str, Any], where: str) -> tuple[str, tuple[int, int]]:
    size = raw.get("group_size")
    if size is not None and (type(size) is not int or (size < 1 and size != -1)):
        raise ConfigError(f"{where} says group_size: {size!r}; a positive number, -1 or null was needed, so correct it")
    inferred = "tensor" if size is None else "group" if size > 0 else "channel"
    strategy = _one_of(raw, "strategy", STRATEGIES, inferred, where)
    if (strategy in ("group", "tensor_group")) != (size is not None and size > 0):
        raise ConfigError(
            f"{where} says strategy: {strategy!r} and group_size: {size!r}, which contradict each other; keep the one that the "
            "file was made with"
        )
    blocks = raw.get("block_structure")
    if (strategy == "block") != (blocks is not None):
        raise ConfigError(
            f"{where} says strategy: {strategy!r} and block_structure: {blocks!r}, which contradict each other; keep the one "
            "that the file was made with"
        )
    if strategy == "block":
        return strategy, _extents(blocks, where)
    named = {"tensor": (0, 0), "channel": (1, 0), "token": (1, 0), "attn_head": (-1, 0)}
    return strategy, named.get(strategy) or (1, int(size or 0))


def _extents(blocks: Any, where: str) -> tuple[int, int]:
    """Rows and columns of ``[128, 128]``, or of ``"128x128"`` as old files have it."""
    words = blocks.lower().split("x") if isinstance(blocks, str) else blocks
    try:
        rows, columns = (int(w) for w in words)
    except (TypeError, ValueError):
        rows, columns = 0, 0
    if rows < 1 or columns < 1:
        raise ConfigError(
            f"{where} says block_structure: {blocks!r}; two positive numbers such as [128, 128] were needed, so correct it"
        )
    return rows, columns
