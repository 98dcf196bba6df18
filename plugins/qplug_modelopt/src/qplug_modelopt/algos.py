"""The ``quant_algo`` names of ModelOpt and TensorRT-LLM: which scheme, stored how. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qplug_core.config import LayerQuant
from qplug_core.errors import ConfigError
from qplug_core.scheme import NUMBER_TYPES, QuantScheme

MIXED = "MIXED_PRECISION"
NO_QUANT = "NO_QUANT"


@dataclass(frozen=True)
class Algo:
    """One ``quant_algo``.

    scheme
        Its scheme, with ``{g}`` for the group size.
    group, groups
        Group size where the config says none (0: there are no groups), and all that are legal (empty: any).
    smoothed
        The name says that ``pre_quant_scale`` tensors may be there, and another name has the same scheme without.
    """

    name: str
    scheme: str
    layout: str
    group: int = 0
    groups: tuple[int, ...] = ()
    smoothed: bool = False

    def quant(self, group: int | None = None) -> LayerQuant:
        """The quantization with a group size, the usual one where it is None.

        :raises ConfigError: for a group size that this algorithm does not have.
        """
        size = group or self.group
        if group and ((self.groups and group not in self.groups) or not self.group):
            legal = " or ".join(map(str, self.groups)) or "none"
            raise ConfigError(
                f"the ModelOpt config says quant_algo {self.name} with group_size {group}; {legal} was needed, so correct it"
            )
        scheme = QuantScheme.parse(self.scheme.format(g=size))
        return LayerQuant(scheme, self.layout, SMOOTHED if self.smoothed else ())


SMOOTHED = (("pre_quant_scale", True),)
"""The option of layers whose algorithm's name says that x is scaled before it is quantized."""

_ALGOS = (
    Algo("FP8", "Wfp8Afp8_tensor_static", "modelopt_fp8"),
    Algo("FP8_PER_CHANNEL_PER_TOKEN", "Wfp8Afp8", "modelopt_fp8_pc_pt"),
    Algo("FP8_PB_WO", "Wfp8A16_b{g}x{g}", "modelopt_fp8_pb", 128, (32, 64, 128, 256)),
    Algo("FP8_BLOCK_SCALES", "Wfp8Afp8_b{g}x{g}", "modelopt_fp8_pb", 128, (128,)),
    Algo("NVFP4", "Wnvfp4Anvfp4", "modelopt_nvfp4", 16, (16,)),
    Algo("NVFP4_AWQ", "Wnvfp4Anvfp4", "modelopt_nvfp4", 16, (16,), smoothed=True),
    Algo("W4A16_NVFP4", "Wnvfp4A16", "modelopt_nvfp4", 16, (16,)),
    Algo("W4A8_NVFP4_FP8", "Wnvfp4Afp8_g{g}_static", "modelopt_nvfp4", 32, (16, 32)),
    Algo("W4A16_AWQ", "W4A16_g{g}", "modelopt_int4_awq", 128),
    Algo("W4A16", "W4A16_channel", "modelopt_int4_awq"),
    Algo("W4A8_AWQ", "W4Afp8_g{g}_static", "modelopt_w4a8_awq", 128),
    Algo("W8A16", "W8A16", "modelopt_int8_sq"),
    Algo("W8A8_SQ_PER_CHANNEL", "W8A8_static", "modelopt_int8_sq"),
    Algo("MXFP4", "Wmxfp4Amxfp4_a:rule=ceil", "modelopt_mxfp4", 32, (32,)),
    Algo("W4A16_MXFP4", "Wmxfp4A16", "modelopt_mxfp4", 32, (32,)),
    Algo("W4A8_MXFP4_FP8", "Wmxfp4Afp8_static", "modelopt_mxfp4", 32, (32,)),
    Algo("W4A8_MXFP4_MXFP8", "Wmxfp4Amxfp8_a:rule=ceil", "modelopt_mxfp4", 32, (32,)),
    Algo("MXFP8", "Wmxfp8Amxfp8_a:rule=ceil", "modelopt_mxfp8", 32, (32,)),
)
ALGOS = {algo.name: algo for algo in _ALGOS}

ALIASES = {
    "FP8_PC_PT": "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_PB_REAL": "FP8_PB_WO",
    "INT4_AWQ": "W4A16_AWQ",
    "INT8_SQ": "W8A8_SQ_PER_CHANNEL",
    "INT8_WO": "W8A16",
}
"""Names that the exporter uses inside and has written too. ``fp8_pb_real`` is ``fp8_pb_wo`` after compression."""

FOREIGN = {
    "NVFP4_SVD": "a low-rank branch is added to its product, which this format has no place for, so export the model as NVFP4_AWQ",
    "NVFP4_SVDQUANT": "a low-rank branch is added to its product, which this format has no place for, so export the model as NVFP4_AWQ",
    "W4A16_GPTQ": "its files are GPTQ files, so write the GPTQ config beside them and install qplug-gptq",
    "W8A16_GPTQ": "its files are GPTQ files, so write the GPTQ config beside them and install qplug-gptq",
}


def find(name: Any, where: str) -> Algo:
    """The algorithm of a ``quant_algo`` value, whatever its case.

    :raises ConfigError: for a name that is not known, with those that are.
    """
    text = name.upper() if isinstance(name, str) else ""
    text = ALIASES.get(text, text)
    if text in ALGOS:
        return ALGOS[text]
    if text in FOREIGN:
        raise ConfigError(f"{where} says quant_algo: {name!r}; {FOREIGN[text]}")
    known = ", ".join([*ALGOS, MIXED])
    raise ConfigError(f"{where} says quant_algo: {name!r}, which this version does not read; it reads {known}")


def of_quant(quant: LayerQuant) -> tuple[Algo, int] | None:
    """The algorithm that writes a quantization, with its group size (0: none), or None."""
    part = quant.scheme.weight
    if part is None:
        return None
    for algo in _ALGOS:
        size = part.block[1] if algo.group else 0
        if algo.layout != quant.layout or algo.smoothed != bool(quant.opt("pre_quant_scale")):
            continue
        if (algo.group and not size) or (algo.groups and size not in algo.groups):
            continue
        if algo.quant(size).scheme == quant.scheme:
            return algo, size
    return None


def group_config(algo: Algo, group: int) -> dict[str, Any]:
    """One entry of ``config_groups``, as the exporter writes it for readers of compressed-tensors configs."""
    scheme = algo.quant(group).scheme
    entry: dict[str, Any] = {}
    for key, part in (("input_activations", scheme.act), ("weights", scheme.weight)):
        if part is not None:
            kind = "int" if NUMBER_TYPES[part.dtype].kind == "int" else "float"
            entry[key] = {"dynamic": False, "num_bits": part.bits, "type": kind}
            if part.block[1]:
                entry[key]["group_size"] = part.block[1]
    return entry
