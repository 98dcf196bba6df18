"""What the headers of an AWQ file say: its packing, bits and groups, where the config says less or something else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from qplug_core.config import Rule
from qplug_core.errors import ConfigError

from .layouts import part_of

if TYPE_CHECKING:
    from qplug_core.source import Source, TensorInfo

VERSIONS = {
    "gemm": ("awq_gemm",),
    "gemv": ("awq_gemv",),
    "gemv_fast": ("awq_gemv_fast",),
    "marlin": ("awq_marlin",),
    "llm-awq": ("awq_gemv_fast", "awq_gemv"),
    **dict.fromkeys(("exllama", "exllamav2", "exllama_v2", "ipex"), ("awq_gemm",)),
}
"""Layouts by the word of the config, the likelier first. The last four name kernels, which repack gemm files as they load."""

ACTIVATIONS = ("act", "gelu_impl", "activation_fn")
"""Modules that AutoAWQ replaces by a scaled activation."""


class Module(NamedTuple):
    """The stored tensors of one quantized module; all have two dimensions."""

    name: str
    qweight: TensorInfo
    scales: TensorInfo
    zeros: TensorInfo | None


def quantized_modules(source: Source) -> list[str]:
    """Names of modules that the file holds quantized."""
    return [name.removesuffix(".qweight") for name in source.tensors if name.endswith(".qweight")]


def has_tensor(source: Source, suffix: str) -> bool:
    """True where some module has that tensor."""
    return any(name.endswith(f".{suffix}") for name in source.tensors)


def choose_layout(said: str | None, source: Source, inferred: list[str]) -> tuple[str, tuple[tuple[str, object], ...]]:
    """The layout and its options, from the word of the config and from the shapes.

    :raises ConfigError: where they contradict each other, or the file is not AWQ's.
    """
    if said is not None and said not in VERSIONS:
        raise ConfigError(
            f"the AWQ config says version: {said!r}; {', '.join(VERSIONS)} are understood, so convert the file with the tool that "
            "wrote it"
        )
    meant = VERSIONS[said] if said is not None else ()
    found: dict[str, str] = {}
    for module in _modules(source):
        if layout := _layout_of(module):
            found.setdefault(layout, module.name)
    if "gptq" in found:
        raise ConfigError(
            f"{found['gptq']} is packed along K as GPTQ does it, and the config says awq; set quant_method to 'gptq', and "
            "checkpoint_format to 'gptq_v2' if zero points are stored as they are"
        )
    if len(found) > 1:
        first, second = list(found)[:2]
        raise ConfigError(
            f"{found[first]} is packed as {first} and {found[second]} as {second}; one AWQ file has one version, so convert it again"
        )
    layout = next(iter(found), meant[0] if meant else "awq_gemm")
    if meant and layout not in meant:
        raise ConfigError(
            f"the AWQ config says version: {said!r} and {found[layout]} is packed as {layout.removeprefix('awq_')}; set version to "
            f"{layout.removeprefix('awq_')!r} in the quantization config"
        )
    if said is None:
        reason = f"from dtype and shapes of {found[layout]}" if found else "AutoAWQ's default"
        inferred.append(f"version is not said: {layout.removeprefix('awq_')}, {reason}")
    elif len(meant) > 1 or said not in ("gemm", "gemv", "gemv_fast", "marlin"):
        inferred.append(f"version {said} is read as {layout.removeprefix('awq_')}")
    renamed = layout == "awq_gemv_fast" and (has_tensor(source, "scaled_zeros") or (said == "llm-awq" and not found))
    return layout, (("zeros", "scaled_zeros"),) if renamed else ()


def check_headers(source: Source, rules: list[Rule]) -> None:
    """Refuse a file whose shapes are those of no rule, or whose activations are scaled.

    :raises ConfigError: naming the module, and what to correct.
    """
    for name in source.tensors:
        owner = name.removesuffix(".scales")
        if owner != name and f"{owner}.qweight" not in source.tensors and owner.rsplit(".", 1)[-1] in ACTIVATIONS:
            raise ConfigError(
                f"the file holds {name} without a qweight, which divides the activations of that module (AutoAWQ's scaled "
                "activation); qplug does not apply it, so quantize again without scaling that layer"
            )
    parts = [part_of(rule.quant) for rule in rules if rule.quant is not None]
    said = {(part.bits, part.block[1]) for part in parts}
    for module in _modules(source):
        if _layout_of(module) != "awq_gemm":
            continue  # The cover names the tensor and the shape that it must have.
        bits = module.qweight.shape[1] * 32 / module.scales.shape[1]
        if bits not in {b for b, _ in said}:
            raise ConfigError(
                f"{module.name} is stored with {bits:g} bits (qweight {list(module.qweight.shape)}, scales "
                f"{list(module.scales.shape)}); the config says {_listed({b for b, _ in said})}, so correct bits in it"
            )
        columns, groups = module.qweight.shape[0], module.scales.shape[0]
        if groups not in {-(-columns // (group or columns)) for b, group in said if b == bits}:
            raise ConfigError(
                f"{module.name} has {groups} groups over {columns} columns; the config says group_size "
                f"{_listed({group or -1 for b, group in said if b == bits})}, so correct it"
            )


def _modules(source: Source) -> Iterator[Module]:
    for name in quantized_modules(source):
        qweight, scales = source.tensors[f"{name}.qweight"], source.tensors.get(f"{name}.scales")
        zeros = source.tensors.get(f"{name}.qzeros") or source.tensors.get(f"{name}.scaled_zeros")
        shapes = [info.shape for info in (qweight, scales, zeros) if info is not None]
        if scales is not None and all(len(shape) == 2 and min(shape) > 0 for shape in shapes):
            yield Module(name, qweight, scales, zeros)


def _layout_of(module: Module) -> str:
    """The layout that dtype and shapes are of, or ``""``."""
    (rows, columns), scales = module.qweight.shape, module.scales.shape
    zeros = None if module.zeros is None else module.zeros.shape
    if module.qweight.dtype == "I16":
        return "awq_gemv_fast"
    if module.qweight.dtype != "I32":
        return ""
    if zeros is None:
        return "awq_marlin" if columns == 2 * scales[1] else ""
    # Padded zero points of a narrow gemv layer have the shape of one column to a group, which no gemm file has.
    if (
        zeros == (scales[0], columns)
        and scales[1] % columns == 0
        and scales[1] > columns
        and (scales[0] < rows or rows == 1)
    ):
        return "awq_gemm"
    if zeros[0] == scales[0] == rows:
        return "awq_gemv"
    if scales[1] == columns and zeros[0] == scales[0]:
        return "gptq"
    return ""


def _listed(values: set[int]) -> str:
    return " or ".join(map(str, sorted(values)))
