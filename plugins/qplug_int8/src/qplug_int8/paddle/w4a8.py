"""FastDeploy's W4A8 experts: INT4 weights by channel, INT8 activations with one stored scale for each expert.

================ ======== ===== ==========================================================================================
quant_weight     [K/2, N] int8  two codes in each byte, in the order of the kernel (``w4a8``) or of the columns (``w4a8_kn``)
weight_scale     [N]      float largest magnitude of a row: the step is a seventh of it
activation_scale [1]      float largest magnitude of the input: the step is that / 127
================ ======== ===== ==========================================================================================

Codes are in two's complement. Both scales are magnitudes, not steps: FastDeploy folds them into one factor, wmax * xmax / (127 * 112),
where 112 is 7 * 16 because its kernel multiplies codes in the high half of a byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from qplug_core.axes import FLOATS, StoredTensor
from qplug_core.config import LayerQuant, QuantizationConfig
from qplug_core.errors import CannotEncode, DecodeError
from qplug_core.format import CheckpointFormat
from qplug_core.weight import OpaqueWeight, QuantWeight

from . import config
from .orders import read4

if TYPE_CHECKING:
    from qplug_core.source import Source


class W4A8Format(CheckpointFormat):
    """Layouts ``w4a8`` (``is_permuted``, FastDeploy's default) and ``w4a8_kn``."""

    name = "fastdeploy_w4a8"

    def parse(self, source: Source) -> QuantizationConfig:
        """See :func:`qplug_int8.paddle.config.parse`."""
        return config.parse(source)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The tensors of the table above; permuted codes are read whole."""
        permuted = quant.layout == "w4a8"
        axes = ("32*K/64", "4*N/4") if permuted else ("K/2", "N")
        return (
            StoredTensor("quant_weight", axes, ("I8", "U8"), local=not permuted),
            StoredTensor("weight_scale", ("N",), FLOATS, alt=(("1", "N"), ("N", "1"))),
            StoredTensor("activation_scale", ("1",), FLOATS, alt=((), ("1", "1"))),
        )

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """int8 codes ``[N, K]``, float32 scales ``[N, 1]`` and the step of the activations.

        :raises DecodeError: for an activation scale that is not a positive number.
        """
        amax = tensors["activation_scale"].float().reshape(())
        if not 0 < float(amax) < float("inf"):
            raise DecodeError(
                f"activation_scale is {float(amax)}; a positive finite number was needed, so calibrate the checkpoint again"
            )
        codes = read4(tensors["quant_weight"], "w4a8" if quant.layout == "w4a8" else "_kn", n, k)
        scales = tensors["weight_scale"].float().reshape(n, 1) / 7.0
        return QuantWeight(quant.scheme, codes, scales, (1, 0), act_scale=amax / 127.0)

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """Not written: the step of a weight is a rounded seventh of what would be stored.

        :raises CannotEncode: always.
        """
        raise CannotEncode(
            f"a weight of scheme {weight.scheme} was given; FastDeploy stores magnitudes from which the steps do not come back exactly, so "
            "write compressed-tensors instead"
        )

    def kv_tensors(self, attention: str) -> dict[str, str]:
        """See :func:`qplug_int8.paddle.config.kv_tensors`."""
        return config.kv_tensors(attention)
