"""W8A8 checkpoints under the names of SGLang: what ``--quantization w8a8_int8`` reads.

The tensors are those of the plain int8 format (``loader.py``): ``weight`` int8 [N, K], ``weight_scale`` [N, 1], and, where
activations are static, ``input_scale`` and ``input_zero_point``. The config says little (``ignore``, in the dialect of
compressed-tensors: exact names or ``re:`` patterns), so scales by tensor or channel and static scales are read off the headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qplug_core.config import LayerQuant, QuantizationConfig
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.scheme import QuantScheme
from qplug_core.weight import OpaqueWeight, QuantWeight

from .configs import ignored, modules, read_keys, require_codes, rules_of, written
from .loader import Int8Format

if TYPE_CHECKING:
    from qplug_core.source import Source

KNOWN: dict[str, tuple[Any, ...]] = {
    "quant_method": ("w8a8_int8",), "bits": (8,), "is_dynamic": (True, False), "activation_scheme": ("dynamic", "static"),
}  # fmt: skip
METADATA = ("packed_modules_mapping", "producer", "version")
SCHEMES = tuple(
    QuantScheme.parse(f"W8A8{rows}{act}")
    for rows in ("", "_tensor")
    for act in ("", "_a:tensor.static", "_a:tensor.static.asym")
)


class W8A8Format(Int8Format):
    """One layout, ``w8a8_int8``, with the tensors of ``int8``."""

    name = "w8a8_int8"

    def parse(self, source: Source) -> QuantizationConfig:
        """Rules from the headers; without headers every linear layer is W8A8 by channel and token.

        :raises ConfigError: for a foreign key, a file without int8 weights, and a config that the headers contradict.
        """
        raw = source.quant_config or {}
        if raw.get("quant_method") == "experts_int8":
            raise ConfigError(
                f"{source.path} says experts_int8, which is no storage format: vLLM quantizes 16-bit experts by it as it loads; remove "
                "the quantization_config and load with quantize='W8A16', or quantize with algorithm int8.experts_int8"
            )
        values = read_keys(raw, self.name, KNOWN, ("ignore",), METADATA)
        said = values["activation_scheme"] or ("dynamic" if values["is_dynamic"] else None)
        found = {module: LayerQuant(_scheme(source, module), self.name) for module in modules(source, "weight")}
        require_codes(source, found, self.name, "an int8 weight with a weight_scale")
        static = [module for module, quant in found.items() if quant.scheme.act is not None and not quant.scheme.act.dynamic]
        if found and said is not None and (said == "static") != bool(static):
            what = f"{static[0]}.input_scale is stored" if static else "no layer stores an input_scale"
            raise ConfigError(f"the {self.name} config says {said} activations and {what}; correct the one that is wrong")
        default = SCHEMES[1] if said == "static" else SCHEMES[0]
        inferred = []
        if said is None:
            inferred.append(
                f"activations are {'static' if static else 'quantized per token'}: "
                f"{len(static)} of {len(found)} layers store an input_scale"
            )
        return QuantizationConfig(
            "w8a8_int8",
            rules_of(found, LayerQuant(default, self.name), ignored(values["ignore"], self.name)),
            inferred=inferred,
            metadata={key: raw[key] for key in METADATA if key in raw},
        )

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """The one layout.

        :raises CannotEncode: for anything but symmetric W8A8 by channel or tensor.
        """
        if weight.scheme not in SCHEMES:
            raise CannotEncode(
                f"scheme {weight.scheme} was given; w8a8_int8 stores symmetric W8A8 by channel, so choose another format"
            )
        return LayerQuant(weight.scheme, self.name)

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """What SGLang reads.

        :raises CannotEncode: where no layer is quantized.
        """
        return written("w8a8_int8", layers)


def _scheme(source: Source, module: str) -> QuantScheme:
    scale = source.tensors.get(f"{module}.weight_scale")
    text = "W8A8_tensor" if scale is not None and all(length == 1 for length in scale.shape) else "W8A8"
    if f"{module}.input_zero_point" in source.tensors:
        text += "_a:tensor.static.asym"
    elif f"{module}.input_scale" in source.tensors:
        text += "_a:tensor.static"
    return QuantScheme.parse(text)
