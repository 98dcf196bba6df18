"""PTPC FP8: one scale for each token of the activations and each row (out channel) of the weight.

As a checkpoint: ``weight [N, K]`` e4m3 and ``weight_scale [N]`` or ``[N, 1]``, float; the config is ``{"quant_method": "ptpc_fp8",
"activation_scheme": "dynamic", "ignored_layers": ["lm_head"], "fmt": "e4m3"}``. With ``fmt`` e4m3fnuz (``F8_E4M3FNUZ`` in the file, or bytes
called ``F8_E4M3`` or ``U8``) the codes are those of gfx942, and are decoded to e4m3fn with the same values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qplug_core.axes import FLOATS, StoredTensor
from qplug_core.config import LayerQuant, QuantizationConfig, Rule
from qplug_core.errors import CannotEncode, ConfigError, DecodeError, SchemeError
from qplug_core.format import CheckpointFormat
from qplug_core.keys import list_of_names, take
from qplug_core.match import Matcher
from qplug_core.quantizer import Quantizer
from qplug_core.scheme import QuantScheme
from qplug_core.weight import OpaqueWeight, QuantWeight

from .fnuz import from_fnuz

if TYPE_CHECKING:
    from qplug_core.source import Source

PTPC = QuantScheme.parse("Wfp8Afp8")
FNUZ = (("fmt", "e4m3fnuz"),)
KEYS: dict[str, Any] = {
    "quant_method": "ptpc_fp8", "activation_scheme": "dynamic", "ignored_layers": [], "modules_to_not_convert": [], "fmt": "e4m3",
}  # fmt: skip
METADATA = ("producer",)
LARGEST = 448.0


class PTPCFormat(CheckpointFormat):
    """Layout ``ptpc_fp8``."""

    name = "ptpc_fp8"

    def parse(self, source: Source) -> QuantizationConfig:
        """All linear layers but the listed ones, lm_head and embeddings.

        :raises ConfigError: for a key that is not known, static activations, or an unknown ``fmt``.
        """
        raw = source.quant_config or {}
        values = take(raw, KEYS, METADATA, "the ptpc_fp8 config", "qplug-rocm")
        if values["activation_scheme"] not in (None, "dynamic"):
            raise ConfigError(
                f"the ptpc_fp8 config says activation_scheme: {values['activation_scheme']!r}; scales by token are dynamic, so correct it, "
                "or call the method fp8"
            )
        fmt = values["fmt"] or "e4m3"
        if fmt not in ("e4m3", "e4m3fn", "e4m3fnuz"):
            raise ConfigError(f"the ptpc_fp8 config says fmt: {fmt!r}; e4m3 or e4m3fnuz was needed, so correct it")
        inferred = []
        if any(info.dtype == "F8_E4M3FNUZ" for info in source.tensors.values()) and fmt != "e4m3fnuz":
            fmt = "e4m3fnuz"
            inferred.append("fmt is e4m3fnuz: the file has tensors of that type")
        quant = LayerQuant(PTPC, "ptpc_fp8", FNUZ if fmt == "e4m3fnuz" else ())
        rules = []
        for key in ("ignored_layers", "modules_to_not_convert"):
            names = list_of_names(values[key], f"the ptpc_fp8 config says {key}")
            rules += [Rule(Matcher(text, "exact"), None, origin=key) for text in names]
        rules.append(Rule(Matcher("Embedding", "class"), None, implicit=True, origin="embeddings are not quantized"))
        rules.append(Rule(Matcher("lm_head", "suffix"), None, implicit=True, origin="lm_head is not quantized"))
        rules.append(Rule(Matcher("", "all"), quant, origin="quant_method"))
        return QuantizationConfig("ptpc_fp8", rules, producer=str(raw.get("producer", "")), inferred=inferred)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """``weight`` and ``weight_scale``."""
        dtypes = ("F8_E4M3FNUZ", "F8_E4M3", "U8", "I8") if quant.opt("fmt") == "e4m3fnuz" else ("F8_E4M3",)
        return (StoredTensor("weight", ("N", "K"), dtypes), StoredTensor("weight_scale", ("N", "1"), FLOATS, alt=(("N",),)))

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """e4m3fn codes ``[N, K]``, scales ``[N, 1]``.

        :raises DecodeError: for NaN scales, and for e4m3fnuz codes that no e4m3fn codes equal.
        """
        codes, scales = tensors["weight"], tensors["weight_scale"].reshape(n, 1)
        if bool(scales.isnan().any()):
            raise DecodeError("weight_scale has NaN; fetch the file again, or quantize the layer again")
        if quant.opt("fmt") == "e4m3fnuz":
            codes, scales = from_fnuz(codes, scales)
        return QuantWeight(quant.scheme, codes, scales, (1, 0))

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`, as e4m3fn.

        :raises CannotEncode: for another scheme, and for ``fmt`` e4m3fnuz, which is a device's matter.
        """
        weight = _storable(weight)
        if weight.scheme != quant.scheme:
            raise CannotEncode(f"a weight of scheme {weight.scheme} was given; the layer is to be stored as {quant.scheme}")
        if quant.opt("fmt") == "e4m3fnuz":
            raise CannotEncode(
                "e4m3fnuz was asked for; every device reads e4m3fn, and gfx942 converts it exactly, so store that"
            )
        return {"weight": weight.codes.contiguous(), "weight_scale": weight.scales.contiguous()}

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """The one layout."""
        return LayerQuant(replace(_storable(weight).scheme, kv=None), "ptpc_fp8")

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """Names of the layers that stay 16 bit.

        :raises CannotEncode: where no layer is quantized, or lm_head is.
        """
        quantized = [name for name, quant in layers.items() if quant is not None]
        heads = [name for name in quantized if name.rsplit(".", 1)[-1] == "lm_head"]
        if not quantized or heads:
            raise CannotEncode(
                f"{heads[0] if heads else 'no layer'} is quantized; ptpc_fp8 quantizes linear layers and no lm_head, so choose quark"
            )
        ignored = [name for name, quant in layers.items() if quant is None]
        return {"quant_method": "ptpc_fp8", "activation_scheme": "dynamic", "ignored_layers": ignored}


class PTPCFp8(Quantizer):
    """RTP-LLM and vLLM at load: scale amax / 448 of each row, with amax at least 1e-4, in float32."""

    def quantize(self, weight: Tensor, scheme: QuantScheme, stats: Mapping[str, Tensor] | None = None) -> QuantWeight:
        """``weight [N, K]`` as e4m3 codes and scales ``[N, 1]`` float32; ``stats`` is not looked at.

        :raises SchemeError: for anything but FP8 by channel with dynamic FP8 tokens, and for weights that are not finite.
        """
        if replace(scheme, kv=None) != PTPC:
            raise SchemeError(f"scheme {scheme} was asked for; this rule makes {PTPC}, so choose another algorithm")
        if not bool(torch.isfinite(weight).all()):
            raise SchemeError("the weight has NaN or infinite values, which no code holds; repair the checkpoint")
        values = weight.float()
        scales = values.abs().amax(1, keepdim=True).clamp(min=1e-4) / LARGEST
        codes = (values / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return QuantWeight(scheme, codes, scales, (1, 0))


def _storable(weight: QuantWeight | OpaqueWeight) -> QuantWeight:
    if isinstance(weight, OpaqueWeight) or weight.experts is not None or replace(weight.scheme, kv=None) != PTPC:
        raise CannotEncode(
            f"scheme {weight.scheme} was given; ptpc_fp8 stores {PTPC}, one matrix for each module, so choose another format"
        )
    extra = weight.tensors().keys() - {"codes", "scales"}
    if extra:
        raise CannotEncode(
            f"a weight with {', '.join(sorted(extra))} was given; ptpc_fp8 has no tensor for it, so choose another format"
        )
    return weight
