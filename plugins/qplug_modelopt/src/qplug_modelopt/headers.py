"""What the headers of a ModelOpt checkpoint say, where its config says less. Every function takes a source without tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qplug_core.axes import FLOATS
from qplug_core.errors import ConfigError

if TYPE_CHECKING:
    from qplug_core.source import Source, TensorInfo

SCALE_NAMES = ("modelopt_fp8_pc_pt", "modelopt_fp8_pb")
"""Layouts whose scales are seen under the name of DeepSeek's files too."""

STORED = {
    "modelopt_int4_awq": (("U8", "I8"), FLOATS),
    "modelopt_w4a8_awq": (("U8", "I8"), FLOATS),
    "modelopt_nvfp4": (("U8",), ("F8_E4M3",)),
}
"""Stored dtypes of weights and scales, of layouts whose group size follows from shapes."""


def modules(source: Source) -> list[str]:
    """Names of all modules with a matrix, in the order of the file."""
    return [name[:-7] for name, info in source.tensors.items() if name.endswith(".weight") and len(info.shape) == 2]


def quantized(source: Source, name: str = "") -> Iterator[tuple[str, TensorInfo, TensorInfo]]:
    """``(module, weight, weight_scale)`` of quantized modules: all, or those at and below ``name``."""
    for key, weight in source.tensors.items():
        module = key.removesuffix(".weight")
        scale = source.tensors.get(f"{module}.weight_scale")
        if module != key and scale is not None and f"{module}.".startswith(f"{name}." if name else ""):
            yield module, weight, scale


def _groups(source: Source, layout: str, name: str) -> Iterator[tuple[str, int, int]]:
    """``(module, columns, groups)`` of the modules that are stored as ``layout`` stores them."""
    weights, scales = STORED.get(layout, ((), ()))
    for module, weight, scale in quantized(source, name):
        if (
            weight.dtype in weights
            and scale.dtype in scales
            and len(weight.shape) == len(scale.shape) == 2
            and scale.shape[1]
        ):
            yield module, weight.shape[1] * (2 if layout == "modelopt_nvfp4" else 1), scale.shape[1]


def group_size(source: Source, layout: str, name: str) -> int | None:
    """The one group size of the file, or None where nothing says it."""
    sizes = {columns // groups for _, columns, groups in _groups(source, layout, name) if columns % groups == 0}
    return sizes.pop() if len(sizes) == 1 else None


def check_group_size(source: Source, layout: str, group: int, name: str) -> None:
    """Refuse a group size that the shapes contradict.

    :raises ConfigError: naming the first module that differs.
    """
    for module, columns, groups in _groups(source, layout, name):
        if groups * group != columns:
            raise ConfigError(
                f"{module} has {groups} groups over {columns} columns; the config says group_size {group}, so correct it"
            )


def lacks_input_scale(source: Source, name: str) -> bool:
    """True where there are quantized modules and none has an input_scale."""
    found = [module for module, _, _ in quantized(source, name)]
    return bool(found) and not any(f"{module}.input_scale" in source.tensors for module in found)


def has_scale_inv(source: Source, name: str) -> bool:
    """True where scales are called weight_scale_inv, and none weight_scale."""
    start = f"{name}." if name else ""
    found = [key for key in source.tensors if key.startswith(start) and key.endswith(".weight_scale_inv")]
    return bool(found) and not any(True for _ in quantized(source, name))


def first_pre_quant_scale(source: Source, name: str) -> str | None:
    """The first tensor pre_quant_scale at or below ``name``."""
    start = f"{name}." if name else ""
    return next((key for key in source.tensors if key.startswith(start) and key.endswith(".pre_quant_scale")), None)
