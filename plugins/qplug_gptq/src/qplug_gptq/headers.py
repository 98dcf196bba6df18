"""What the headers of a GPTQ checkpoint say that its config does not, and where the two contradict each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qplug_core.config import Rule
from qplug_core.errors import ConfigError

from .activation import STORED

if TYPE_CHECKING:
    from qplug_core.source import Source

IGNORABLE = {"workspace": "scratch memory of the Marlin kernel, which holds no numbers"}
"""Suffixes of tensors that may be left unread."""

PACKED = ("qweight", "B", "B_24", "weight_packed")
"""Suffixes of packed codes: a module that has one is quantized."""


def quantized(source: Source) -> dict[str, str]:
    """Modules that hold packed codes, with the suffix of theirs."""
    found = {}
    for name in source.tensors:
        module, _, suffix = name.rpartition(".")
        if suffix in PACKED:
            found[module] = suffix
    return found


def stored_opts(source: Source, inferred: list[str]) -> dict[str, Any]:
    """Options of the layouts that follow from which tensors there are.

    An engine may ask before it knows any tensor: then as every producer that is in use today writes them, with g_idx.
    """
    opts: dict[str, Any] = {}
    modules = [module for module, suffix in quantized(source).items() if suffix == "qweight"]
    if not modules:
        return opts
    indexed = sum(f"{module}.g_idx" in source.tensors for module in modules)
    if not indexed:
        opts["g_idx"] = False
        inferred.append("no g_idx tensors: columns belong to groups by position")
    elif indexed < len(modules):
        opts["g_idx"] = "mixed"
        inferred.append(
            f"g_idx is stored for {indexed} of {len(modules)} layers: in the others columns belong to groups by position, and "
            "every layer is read whole"
        )
    for name in STORED[1:]:
        if any(tensor.endswith(f".{name}") for tensor in source.tensors):
            opts["act_scale"] = name
    return opts


def head_quantized(source: Source, inferred: list[str]) -> bool:
    """True where the file holds packed codes of lm_head."""
    for module, suffix in quantized(source).items():
        if module.rsplit(".", 1)[-1] == "lm_head":
            inferred.append(f"lm_head is quantized: the file holds {module}.{suffix}")
            return True
    return False


def left_out(source: Source, allowed: Iterable[str], inferred: list[str]) -> list[str]:
    """Ends of names of modules that hold packed codes though an allow-list of substrings leaves them out."""
    texts = list(allowed)
    ends = {".".join(m.split(".")[-2:]): m for m in quantized(source) if not any(text in m for text in texts)}
    if ends:
        inferred.append(
            f"modules_in_block_to_quantize leaves out {', '.join(ends)}, and the file holds them packed: they are quantized"
        )
    return list(ends)


def check(source: Source, rules: Iterable[Rule]) -> None:
    """Refuse a file whose shapes are those of no rule: bits follow from qzeros and scales, groups from their rows.

    :raises ConfigError: naming the module and the key.
    """
    quants = [rule.quant for rule in rules if rule.quant is not None]
    parts = [quant.scheme.weight for quant in quants]
    said = {(part.bits, part.block[1]) for part in parts if part is not None}
    modules = quantized(source)
    _check_kind(modules, {quant.layout for quant in quants})
    for module, suffix in modules.items():
        zeros, scales = source.tensors.get(f"{module}.qzeros"), source.tensors.get(f"{module}.scales")
        info = source.tensors[f"{module}.{suffix}"]
        if suffix != "qweight" or zeros is None or scales is None:
            continue
        if any(len(tensor.shape) != 2 for tensor in (info, zeros, scales)) or not scales.shape[1]:
            continue  # The cover names the tensor and the shape that it must have.
        if info.shape[1] != scales.shape[1] or zeros.dtype != "I32":
            continue  # Packed along N, or not packed: another layout, which its plugin checks, or what the cover refuses.
        bits = zeros.shape[1] * 32 / scales.shape[1]
        if bits not in {b for b, _ in said}:
            raise ConfigError(
                f"{module} is stored with {bits:g} bits (qzeros {list(zeros.shape)}, scales {list(scales.shape)}); the "
                f"config says {_listed({b for b, _ in said})}, so correct bits in it"
            )
        columns = info.shape[0] * 32 // int(bits)
        counts = {-(-columns // (group or columns)) for b, group in said if b == bits} if columns else set()
        if columns and scales.shape[0] not in counts:
            raise ConfigError(
                f"{module} has {scales.shape[0]} groups over {columns} columns; the config says group_size "
                f"{_listed({group or -1 for b, group in said if b == bits})}, so correct it"
            )


def _check_kind(modules: dict[str, str], layouts: set[str]) -> None:
    """Refuse packed Marlin tensors in a file that is called plain GPTQ, and the other way round."""
    kinds = {"B": "marlin", "B_24": "marlin_24"}
    for module, suffix in modules.items():
        holds, packed = kinds.get(suffix), layouts & set(kinds.values())
        if (holds is None and packed) or (holds is not None and holds not in layouts):
            right = holds or "gptq"
            raise ConfigError(
                f"{module} is stored as {suffix} and the config says checkpoint_format {' or '.join(sorted(layouts))}; that is "
                f"how {right} stores it, so set checkpoint_format to {right!r}"
            )


def _listed(values: set[int]) -> str:
    return " or ".join(map(str, sorted(values)))
