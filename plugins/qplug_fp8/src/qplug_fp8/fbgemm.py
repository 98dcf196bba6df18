"""FBGEMM row-wise FP8, as Meta and transformers write it (``quant_method: fbgemm_fp8``).

============== ========== ======= ==================================================================================
weight         [N, K]     e4m3    codes
weight_scale   [N, 1]     float   one for each row
input_scale_ub [1]        float32 seen in some files; it repeats ``activation_scale_ub`` of the config and is checked
============== ========== ======= ==================================================================================

Activations have one dynamic scale for each token, ``min(amax, activation_scale_ub) / 448``: what lies above saturates. The
bound is the scheme's rule, ``ub1200``, because a kernel without it computes another function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qplug_core.axes import StoredTensor
from qplug_core.config import LayerQuant, QuantizationConfig, Rule
from qplug_core.errors import CannotEncode, ConfigError, DecodeError
from qplug_core.keys import check_keys
from qplug_core.match import Matcher
from qplug_core.scheme import QuantScheme, TensorQuant
from qplug_core.weight import OpaqueWeight, QuantWeight

from .layouts import LAYOUTS
from .loader import FP8Format, storable
from .match import ignored

if TYPE_CHECKING:
    from qplug_core.source import Source

KEYS = {"quant_method", "activation_scale_ub", "modules_to_not_convert", "ignored_layers"}
DEFAULT_BOUND = 1200.0
"""transformers' default, taken where the config has no ``activation_scale_ub``; a null there means no bound."""


class FbgemmFP8Format(FP8Format):
    """One layout, ``fbgemm_fp8``."""

    name = "fbgemm_fp8"

    def parse(self, source: Source) -> QuantizationConfig:
        """Every linear layer but the ignored ones and ``lm_head``.

        :raises ConfigError: for a key that is not understood, and for a bound that is not a positive whole number.
        """
        raw = source.quant_config or {}
        check_keys(raw, KEYS, "the fbgemm_fp8 config", "qplug-fp8")
        inferred = []
        if "activation_scale_ub" not in raw:
            inferred.append(f"activation_scale_ub is not said: {DEFAULT_BOUND:g}, the default of transformers")
        quant = LayerQuant(
            QuantScheme(TensorQuant("fp8_e4m3", (1, 0)), _act(raw.get("activation_scale_ub", DEFAULT_BOUND))), self.name
        )
        rules = ignored(raw, self.name)
        rules.append(
            Rule(Matcher("Embedding", "class"), None, implicit=True, origin="embeddings are not quantized by FBGEMM")
        )
        if "lm_head.weight_scale" not in source.tensors:
            rules.append(Rule(Matcher("lm_head", "suffix"), None, implicit=True, origin="the output embedding stays 16 bit"))
        rules.append(Rule(Matcher("", "all"), quant, origin="quant_method"))
        return QuantizationConfig(self.name, rules, inferred=inferred)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """Codes, scales, and the bound where the file repeats it."""
        return (
            *super().tensors(quant),
            StoredTensor("input_scale_ub", (), ("F32",), optional=True, alt=(("1",),), meta=True),
        )

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """See :meth:`FP8Format.decode`.

        :raises DecodeError: also where the file and the config have different bounds.
        """
        stored, bound = tensors.get("input_scale_ub"), _bound(quant.scheme)
        if stored is not None and float(stored) != bound:
            raise DecodeError(
                f"input_scale_ub is {float(stored):g} and the config says activation_scale_ub: {bound:g}; they bound the same "
                "activations, so correct the config"
            )
        return super().decode(tensors, quant, n, k)

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`.

        :raises CannotEncode: for anything but e4m3 by row with bounded or plain dynamic activations.
        """
        return super().encode(_row_wise(weight, quant), quant)

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """The one layout.

        :raises CannotEncode: as :meth:`encode`.
        """
        quant = LayerQuant(weight.scheme, self.name)
        _row_wise(weight, quant)
        return quant

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """The bound, and the names that stay 16 bit.

        :raises CannotEncode: where no layer is quantized, or bounds differ.
        """
        bounds = {_bound(quant.scheme) for quant in layers.values() if quant is not None}
        if len(bounds) != 1:
            what = "no layer is quantized" if not bounds else "layers have different activation bounds"
            raise CannotEncode(f"{what}; an fbgemm_fp8 config has one bound for all, so choose another format")
        bound = bounds.pop()
        names = [name for name, quant in layers.items() if quant is None]
        return {
            "quant_method": self.name,
            "activation_scale_ub": None if bound == float("inf") else bound,
            "modules_to_not_convert": names or None,
        }

    def kv_tensors(self, attention: str) -> dict[str, tuple[str, ...]]:
        """FBGEMM quantizes no cache."""
        return {}


def _act(bound: Any) -> TensorQuant:
    if bound is None:
        return TensorQuant("fp8_e4m3", (1, 0), dynamic=True)
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not 0 < bound < float("inf") or bound != int(bound):
        raise ConfigError(
            f"the fbgemm_fp8 config says activation_scale_ub: {bound!r}; a positive whole number such as 1200.0 was needed, so "
            "correct it"
        )
    return TensorQuant("fp8_e4m3", (1, 0), dynamic=True, rule=f"ub{int(bound)}")


def _bound(scheme: QuantScheme) -> float:
    rule = scheme.act.rule if scheme.act is not None else ""
    return float(rule.removeprefix("ub")) if rule else float("inf")


def _row_wise(weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> QuantWeight:
    checked = storable(weight, quant, LAYOUTS["fbgemm_fp8"])
    part, act = checked.scheme.weight, checked.scheme.act
    assert part is not None
    dynamic = act is not None and act.dynamic is True and act.block == (1, 0) and act.scale_dtype == "float"
    if (
        checked.codes.dtype != torch.float8_e4m3fn
        or not dynamic
        or (act is not None and act.rule and not act.rule.startswith("ub"))
    ):
        raise CannotEncode(
            f"scheme {checked.scheme} was given; fbgemm_fp8 stores e4m3 by row with activations by token, so choose another format"
        )
    return checked
