"""Grid types: codes that stand for vectors, or for digits of base 3. They stay bytes, and the gguf package dequantizes them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from qplug_core.axes import StoredTensor
from qplug_core.config import LayerQuant, QuantizationConfig
from qplug_core.errors import ConfigError
from qplug_core.format import CheckpointFormat
from qplug_core.source import Source
from qplug_core.weight import OpaqueWeight

GRIDS = {
    "iq1_s": "W2A16_g256", "iq1_m": "W2A16_g256", "iq2_xxs": "W2A16_g256", "iq2_xs": "W2A16_g256", "iq2_s": "W2A16_g256",
    "iq3_xxs": "W3A16_g256", "iq3_s": "W3A16_g256", "tq1_0": "W2A16_g256", "tq2_0": "W2A16_g256",
}  # fmt: skip
"""The closest scheme by layout name. Kernels of that scheme see an encoding that they do not know, and refuse."""


class GridFormat(CheckpointFormat):
    """Layouts by GGUF type in lower case; the tensor is that of :mod:`qplug_gguf.loader`."""

    name = "gguf-grid"

    def parse(self, source: Source) -> QuantizationConfig:
        """Files are opened and configs parsed by the format ``gguf``.

        :raises ConfigError: always.
        """
        raise ConfigError(f"{source.path} was given to gguf-grid, which has layouts only; its quant_method is 'gguf'")

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The one tensor, cut along K at whole blocks."""
        values, size = GGML_QUANT_SIZES[_type(quant.layout)]
        return (StoredTensor("weight", ("N", f"{size}*K/{values}"), ("U8",)),)

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> OpaqueWeight:
        """The bytes, with the gguf package as their decoder."""
        stored = {"weight": tensors["weight"].contiguous()}
        return OpaqueWeight(quant.scheme, f"gguf:{quant.layout}", stored, n, k, partial(_dequantize, _type(quant.layout)))


def _type(layout: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[layout.upper()]


def _dequantize(kind: GGMLQuantizationType, stored: dict[str, Tensor], n: int, k: int) -> Tensor:
    """float32 ``[n, k]`` on the device of the bytes."""
    data = stored["weight"]
    values = dequantize(data.cpu().numpy(), kind)
    return torch.from_numpy(values).reshape(n, k).to(data.device)
