"""OmniQuant W8A8 checkpoints of RTP-LLM (arXiv:2308.13137): a smoother, a shift, and a bias that the shift is folded into.

The paper's learnable transformation ``X' = (X - d) / s``, ``W' = s W``, ``b' = b + W d`` is folded into the layer norms, which
get a bias, except before the output projection, where it is stored. RTP-LLM's quantizer divides by the smoother and **adds** the
shift, so the file holds ``shift = -d / s``. Of a layer ``[N, K]``:

========= ======= ======= =========================================
qweight   [K, N]  int8    codes of W'
scales    [N]     float32 by channel
smoother  [K]     float32 s; output projections only
shift     [K]     float32 -d / s; output projections only
bias      [N]     float   b', which belongs to the model, not to the weight
========= ======= ======= =========================================

The config is ``{"bits": 8, "quant_method": "omni_quant"}``. Activations are quantized per token as the model runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qplug_core.axes import StoredTensor
from qplug_core.config import LayerQuant, QuantizationConfig
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.format import CheckpointFormat
from qplug_core.scheme import QuantScheme
from qplug_core.weight import OpaqueWeight, QuantWeight

from .configs import ignored, modules, read_keys, require_codes, rules_of, written
from .styles import Style

if TYPE_CHECKING:
    from qplug_core.source import Source

SCHEME = QuantScheme.parse("W8A8")
QUANT = LayerQuant(SCHEME, "omni_quant")
STYLE = Style("qweight", "scales", transposed=True, smoother="smoother", shift="shift")
KNOWN: dict[str, tuple[Any, ...]] = {"quant_method": ("omni_quant",), "bits": (8,), "group_size": (0, -1)}
METADATA = ("producer", "version", "epochs", "let", "lwc", "alpha")


class OmniQuantFormat(CheckpointFormat):
    """One layout."""

    name = "omni_quant"

    def parse(self, source: Source) -> QuantizationConfig:
        """One rule for all linear layers.

        :raises ConfigError: for a foreign key, other bits, a file without int8 weights, or a ``smoothquant.ini`` beside it.
        """
        raw = source.quant_config or {}
        values = read_keys(raw, self.name, KNOWN, ("ignore",), METADATA)
        flag = next((name for name in ("smoothquant.ini", "pertensorquant.ini") if name in source.files), None)
        if flag is not None:
            raise ConfigError(
                f"{source.path} says omni_quant and holds {flag}, which RTP-LLM obeys before the config; remove the one that is not true"
            )
        found = dict.fromkeys(modules(source, "qweight"), QUANT)
        require_codes(source, found, self.name, "an int8 weight called qweight")
        shifted = sum(f"{module}.shift" in source.tensors for module in found)
        inferred = [f"{shifted} of {len(found)} layers store a shift; the others have theirs in the layer norm before them"]
        return QuantizationConfig(
            "omni_quant",
            rules_of(found, QUANT, ignored(values["ignore"], self.name)),
            inferred=inferred if found else [],
            metadata={key: raw[key] for key in METADATA if key in raw},
        )

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """See the table above; the bias is the model's."""
        return STYLE.tensors(quant)

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """See :meth:`qplug_int8.styles.Style.decode`."""
        return STYLE.decode(tensors, quant, n, k)

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """See :meth:`qplug_int8.styles.Style.encode`."""
        return STYLE.encode(weight, quant)

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """The one layout.

        :raises CannotEncode: for anything but symmetric W8A8 by channel and token.
        """
        if weight.scheme != SCHEME:
            raise CannotEncode(
                f"scheme {weight.scheme} was given; omni_quant stores W8A8 by channel, so choose another format"
            )
        return QUANT

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """What RTP-LLM reads, and the layers that stay 16 bit.

        :raises CannotEncode: where no layer is quantized.
        """
        return written("omni_quant", layers, bits=8)
