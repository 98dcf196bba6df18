"""What the headers say and the config does not: how odd widths are packed, and whether columns have an order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qplug_core.config import LayerQuant
from qplug_core.errors import ConfigError

if TYPE_CHECKING:
    from qplug_core.source import Source

DENSE_SINCE = (0, 17)
"""The version of compressed-tensors that began to pack widths which do not divide 32 without padding."""


def file_facts(
    quants: Sequence[LayerQuant | None], source: Source, raw: Mapping[str, Any], inferred: list[str]
) -> list[LayerQuant | None]:
    """Every ``quants`` with what the headers add: act order, and the option ``padded``.

    :raises ConfigError: where columns have an order and the file does not say which.
    """
    ordered = [_order(quant, quants, source) for quant in quants]
    if ordered != list(quants):
        inferred.append("columns have an order: the file holds weight_g_idx, whatever actorder says")
    return [_packing(quant, source, raw, inferred) for quant in ordered]


def _order(quant: LayerQuant | None, all_quants: Sequence[LayerQuant | None], source: Source) -> LayerQuant | None:
    if quant is None or not source.tensors:
        return quant
    part = quant.scheme.weight
    stored = any(name.endswith(".weight_g_idx") for name in source.tensors)
    if quant.scheme.act_order and not stored:
        raise ConfigError(
            "the compressed-tensors config says actorder: 'group' and the file has no weight_g_idx tensors, without which columns "
            "cannot be assigned to groups; set actorder to 'weight' if groups are by position, or quantize again"
        )
    said = any(other is not None and other.scheme.act_order for other in all_quants)
    if stored and not said and part is not None and part.granularity == "group":
        return replace(quant, scheme=replace(quant.scheme, act_order=True))
    return quant


def _packing(quant: LayerQuant | None, source: Source, raw: Mapping[str, Any], inferred: list[str]) -> LayerQuant | None:
    part = None if quant is None else quant.scheme.weight
    if quant is None or part is None or quant.layout != "pack-quantized" or not 32 % part.bits:
        return quant
    padded = _padded(part.bits, part.block[1], source, raw, inferred)
    return replace(quant, opts=(*quant.opts, ("padded", True))) if padded else quant


def _padded(bits: int, group: int, source: Source, raw: Mapping[str, Any], inferred: list[str]) -> bool:
    """Whether each word holds ``32 // bits`` values: from the columns of some layer, else from the version."""
    for name, info in source.tensors.items():
        module = name.removesuffix(".weight_packed")
        scale = source.tensors.get(f"{module}.weight_scale")
        if module == name or scale is None or info.dtype != "I32" or len(info.shape) != 2 or len(scale.shape) != 2:
            continue
        if not group or scale.shape[1] < 2:
            continue  # One group for the row says nothing of its length.
        lengths = range((scale.shape[1] - 1) * group + 1, scale.shape[1] * group + 1)
        dense = info.shape[1] in {-(-k * bits // 32) for k in lengths if k % group == 0}
        padded = info.shape[1] in {-(-k // (32 // bits)) for k in lengths if k % group == 0}
        if dense != padded:
            inferred.append(
                f"{bits}-bit values are packed {'padded to words' if padded else 'as one stream'}: {module} has {info.shape[1]} words "
                f"for {scale.shape[1]} groups of {group}"
            )
            return padded
    found = re.match(r"(\d+)\.(\d+)", str(raw.get("version") or ""))
    if not found:
        inferred.append(f"{bits}-bit values are taken as packed in one stream, as compressed-tensors 0.17 and later do")
        return False
    old = (int(found[1]), int(found[2])) < DENSE_SINCE
    inferred.append(
        f"{bits}-bit values are packed {'padded to words' if old else 'as one stream'}: the config says version {raw['version']}"
    )
    return old
