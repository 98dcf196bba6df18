"""Static W8A8 checkpoints of RTP-LLM, for encoders: one activation scale for each input, from calibration.

``pertensorquant.ini`` beside the weights is a flag without content. Of a layer ``[N, K]``:

=============================== ======================= =======================================================
<layer>.qweight                 [K, N]            int8  codes
<layer>.scales                  [], [1] or [N]    float a step of the weight
<layer>_input_scale             [] or [1]         float a step of the activations (joined without a dot)
<parent>.qkv_input_scale        [] or [1]         float the same for query, key and value, which have one input
=============================== ======================= =======================================================

``y = W^T codes * scales * input_scale`` with ``codes = round(x / input_scale)`` in [-128, 127].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qplug_core.axes import StoredTensor
from qplug_core.config import LayerQuant, QuantizationConfig, Rule
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.format import CheckpointFormat
from qplug_core.match import Matcher
from qplug_core.scheme import QuantScheme
from qplug_core.weight import OpaqueWeight, QuantWeight

from .configs import ignored, modules, read_keys, require_codes, rules_of, written
from .styles import Style

if TYPE_CHECKING:
    from qplug_core.source import Source

TENSOR = QuantScheme.parse("W8A8_tensor_static")
COLUMN = QuantScheme.parse("W8A8_static")
SHARED = (("shared", True),)
STYLE = Style(
    "qweight",
    "scales",
    transposed=True,
    input_scale="{module}_input_scale",
    input_shared="{parent}.qkv_input_scale",
)
KNOWN: dict[str, tuple[Any, ...]] = {"quant_method": ("pertensor_quant",), "bits": (8,), "group_size": (0, -1)}
METADATA = ("producer", "version")
FUSED = ("query", "key", "value")


class PerTensorFormat(CheckpointFormat):
    """One layout."""

    name = "pertensor_quant"

    def parse(self, source: Source) -> QuantizationConfig:
        """Rules from the headers: scales by tensor or channel, and whose input scale a layer uses.

        :raises ConfigError: for a foreign key, or a file without int8 weights.
        """
        raw = source.quant_config or {}
        values = read_keys(raw, self.name, KNOWN, ("ignore",), METADATA)
        if "smoothquant.ini" in source.files:
            raise ConfigError(
                f"{source.path} holds smoothquant.ini and pertensorquant.ini, which name two formats; remove the one that is not true"
            )
        found = {module: _quant(source, module) for module in modules(source, "qweight")}
        require_codes(source, found, self.name, "an int8 weight called qweight")
        first = ignored(values["ignore"], self.name)
        inferred = []
        if found:
            shared = sum(quant.opts == SHARED for quant in found.values())
            inferred.append(f"{shared} of {len(found)} layers share the input scale of their module (qkv_input_scale)")
        else:
            inferred.append("there are no headers yet: query, key and value are planned with one input scale")
            first += [Rule(Matcher(name, "suffix"), LayerQuant(TENSOR, self.name, SHARED), implicit=True) for name in FUSED]
        return QuantizationConfig(
            "pertensor_quant",
            rules_of(found, LayerQuant(TENSOR, self.name), first),
            inferred=inferred,
            metadata={key: raw[key] for key in METADATA if key in raw},
            ignorable=_beyond(source),
        )

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """See the table above."""
        return STYLE.tensors(quant)

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """See :meth:`qplug_int8.styles.Style.decode`."""
        return STYLE.decode(tensors, quant, n, k)

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """See :meth:`qplug_int8.styles.Style.encode`."""
        return STYLE.encode(weight, quant)

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """The one layout, with an input scale of its own.

        :raises CannotEncode: for anything but W8A8 by tensor or channel with static activations.
        """
        if weight.scheme not in (TENSOR, COLUMN):
            raise CannotEncode(
                f"scheme {weight.scheme} was given; pertensor_quant stores W8A8 with static activations, so choose another format"
            )
        return LayerQuant(weight.scheme, self.name)

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """What qplug looks at; RTP-LLM wants an empty file ``pertensorquant.ini`` beside the weights.

        :raises CannotEncode: where no layer is quantized.
        """
        return written("pertensor_quant", layers, bits=8)


def _quant(source: Source, module: str) -> LayerQuant:
    scales = source.tensors.get(f"{module}.scales")
    whole = scales is not None and all(length == 1 for length in scales.shape)
    own = f"{module}_input_scale" in source.tensors
    shared = not own and f"{module.rpartition('.')[0]}.qkv_input_scale" in source.tensors
    return LayerQuant(TENSOR if whole else COLUMN, "pertensor_quant", SHARED if shared else ())


def _beyond(source: Source) -> dict[str, str]:
    """Input scales of a layer after the last: RTP-LLM quantizes the output of the last layer norm by them."""
    names = [name for name in source.tensors if name.endswith(".qkv_input_scale")]
    alone = [
        name
        for name in names
        if not any(other != name and other.startswith(name[: -len("qkv_input_scale")]) for other in source.tensors)
    ]
    return dict.fromkeys(alone, "the input scale of a layer after the last, for an engine that fuses it into the last norm")
