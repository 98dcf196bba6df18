"""W8A8 checkpoints in blocks, as SGLang's ``blockwise_int8`` reads them: DeepSeek's FP8 blocks with int8 in place of FP8.

Of a layer ``[N, K]`` with blocks (bn, bk):

================= ============================ ====== =======================================================
weight            [N, K]                       int8   codes
weight_scale_inv  [ceil(N/bn), ceil(K/bk)]     float  a factor of the codes, in spite of its name
================= ============================ ====== =======================================================

Activations are quantized as the model runs, in groups of bk of each token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qplug_core.axes import FLOATS, StoredTensor
from qplug_core.config import LayerQuant, QuantizationConfig, Rule
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.format import CheckpointFormat
from qplug_core.match import Matcher
from qplug_core.scheme import QuantScheme
from qplug_core.weight import OpaqueWeight, QuantWeight

from .configs import modules, read_keys, require_codes, rules_of, written

if TYPE_CHECKING:
    from qplug_core.source import Source

KNOWN: dict[str, tuple[Any, ...]] = {"quant_method": ("blockwise_int8",), "bits": (8,), "activation_scheme": ("dynamic",)}
METADATA = ("producer", "version", "fmt")


class BlockwiseInt8Format(CheckpointFormat):
    """One layout."""

    name = "blockwise_int8"

    def parse(self, source: Source) -> QuantizationConfig:
        """One scheme for all linear layers, without those of ``ignored_layers`` (exact names).

        :raises ConfigError: for a foreign key, no ``weight_block_size``, or a file without int8 weights.
        """
        raw = source.quant_config or {}
        values = read_keys(raw, self.name, KNOWN, ("weight_block_size", "ignored_layers", "ignore"), METADATA)
        quant = LayerQuant(_scheme(values["weight_block_size"]), self.name)
        found = dict.fromkeys(modules(source, "weight"), quant)
        require_codes(source, found, self.name, "an int8 weight with a weight_scale_inv")
        names = [*(values["ignored_layers"] or []), *(values["ignore"] or [])]
        first = [Rule(Matcher(str(name), "exact"), None, origin="ignored_layers") for name in names]
        metadata = {key: raw[key] for key in METADATA if key in raw}
        return QuantizationConfig("blockwise_int8", rules_of(found, quant, first), metadata=metadata)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """See the table above."""
        rows, columns = _block(quant.scheme)
        return (
            StoredTensor("weight", ("N", "K"), ("I8",)),
            StoredTensor("weight_scale_inv", (f"ceil(N/{rows})", f"ceil(K/{columns})"), FLOATS),
        )

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """The tensors as they are."""
        return QuantWeight(quant.scheme, tensors["weight"], tensors["weight_scale_inv"], _block(quant.scheme))

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`.

        :raises CannotEncode: for anything but plain codes and scales in blocks.
        """
        if isinstance(weight, OpaqueWeight) or weight.experts is not None or weight.scheme != quant.scheme:
            raise CannotEncode(
                f"{weight.scheme} was given; blockwise_int8 stores one matrix of {quant.scheme}, so choose another format"
            )
        if extra := weight.tensors().keys() - {"codes", "scales"}:
            raise CannotEncode(
                f"a weight with {', '.join(sorted(extra))} was given; blockwise_int8 has no tensor for it, so choose another format"
            )
        return {"weight": weight.codes.contiguous(), "weight_scale_inv": weight.scales.contiguous()}

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """The one layout.

        :raises CannotEncode: for anything but W8A8 in blocks, with activations in groups of the same width.
        """
        part = weight.scheme.weight
        if part is None or part.granularity != "block" or weight.scheme != _scheme(list(part.block)):
            raise CannotEncode(
                f"scheme {weight.scheme} was given; blockwise_int8 stores W8A8_b128x128, so choose another format"
            )
        return LayerQuant(weight.scheme, self.name)

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """What SGLang reads.

        :raises CannotEncode: for layers with different blocks.
        """
        blocks = {_block(quant.scheme) for quant in layers.values() if quant is not None}
        if len(blocks) > 1:
            raise CannotEncode(
                f"blocks {sorted(blocks)} were given; blockwise_int8 has one for all layers, so quantize all alike"
            )
        config = written(self.name, layers, activation_scheme="dynamic")
        names = config.pop("ignore")
        return {**config, "weight_block_size": list(blocks.pop()), "ignored_layers": names}


def _scheme(block: Any) -> QuantScheme:
    if not isinstance(block, list) or len(block) != 2 or any(type(extent) is not int or extent < 1 for extent in block):
        raise ConfigError(
            f"the blockwise_int8 config says weight_block_size: {block!r}; [rows, columns] was needed, so correct it"
        )
    return QuantScheme.parse(f"W8A8_b{block[0]}x{block[1]}")


def _block(scheme: QuantScheme) -> tuple[int, int]:
    assert scheme.weight is not None
    return scheme.weight.block
