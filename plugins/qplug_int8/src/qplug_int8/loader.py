"""The plain INT8 checkpoint format: stored tensors, decode, encode, and its config.

Of one layer ``[N, K]``:

================= ========================================= ============ ===========================================
weight            [N, K]                                    int8, uint8  codes; uint8 where there are zero points
weight_scale      [], [N] or [N, 1], [N, ceil(K/g)]         float        by tensor, channel or group
weight_zero_point like weight_scale                         uint8        asymmetric schemes only
input_scale       [] or [1]                                 float32      static activation schemes only
input_zero_point  [] or [1]                                 int8         static asymmetric ones only
================= ========================================= ============ ===========================================

The config is ``{"quant_method": "int8", "scheme": "W8A8", "ignore": ["re:.*embed"], "layers": {"lm_head": "W8A16"}}``:
one scheme for all layers, names (or ``re:`` patterns) that stay 16 bit, and names with a scheme of their own.
"""

from __future__ import annotations

from collections import Counter
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
from qplug_core.scheme import QuantScheme, TensorQuant
from qplug_core.weight import OpaqueWeight, QuantWeight

if TYPE_CHECKING:
    from qplug_core.source import Source

KEYS: dict[str, Any] = {"quant_method": "int8", "scheme": None, "ignore": [], "layers": {}}
METADATA = ("producer",)


class Int8Format(CheckpointFormat):
    """One layout, ``int8``."""

    name = "int8"

    def parse(self, source: Source) -> QuantizationConfig:
        """Rules in the order in which they decide: ``layers``, ``ignore``, then ``scheme``.

        :raises ConfigError: for a missing or foreign scheme, and for a key that is not known.
        """
        raw = source.quant_config or {}
        values = take(raw, KEYS, METADATA, "the int8 config", "qplug-int8")
        scheme = _scheme(values["scheme"], "scheme")
        ignore, layers = list_of_names(values["ignore"], "the int8 config says ignore"), values["layers"]
        if not isinstance(layers, dict):
            raise ConfigError(
                f"the int8 config says layers: {layers!r}; an object of names and schemes was needed, so correct it"
            )
        both = [name for name in layers if name in ignore]
        if both:
            raise ConfigError(f"the int8 config has {both[0]!r} in both ignore and layers; remove it from one of them")
        rules = [Rule(Matcher(name, "exact"), _quant(_scheme(text, name)), origin="layers") for name, text in layers.items()]
        rules += [Rule(_ignored(text), None, origin="ignore") for text in ignore]
        rules.append(
            Rule(Matcher("Embedding", "class"), None, implicit=True, origin="embeddings are quantized only by name")
        )
        rules.append(Rule(Matcher("", "all"), _quant(scheme), origin="scheme"))
        metadata = {key: raw[key] for key in METADATA if key in raw}
        return QuantizationConfig("int8", rules, kv=scheme.kv, producer=str(raw.get("producer", "")), metadata=metadata)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The tensors of the table above that this scheme has."""
        part, act = _part(quant.scheme), quant.scheme.act
        axes: tuple[str, ...]
        alt: tuple[tuple[str, ...], ...]
        match part.granularity:
            case "tensor":
                axes, alt = (), (("1",), ("1", "1"))
            case "channel":
                axes, alt = ("N",), (("N", "1"),)
            case _:
                axes, alt = ("N", f"ceil(K/{part.block[1]})"), ()
        stored = [
            StoredTensor("weight", ("N", "K"), ("I8",) if part.symmetric else ("U8",)),
            StoredTensor("weight_scale", axes, FLOATS, alt=alt),
        ]
        if not part.symmetric:
            stored.append(StoredTensor("weight_zero_point", axes, ("U8",), alt=alt))
        if act is not None and not act.dynamic:
            stored.append(StoredTensor("input_scale", (), ("F32",), alt=(("1",),)))
            if not act.symmetric:
                stored.append(StoredTensor("input_zero_point", (), ("I8",), alt=(("1",),)))
        return tuple(stored)

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """The codes as they are stored, with scales ``[N, G]`` (``[1, 1]`` by tensor).

        :raises DecodeError: for an activation scale that is not a positive number.
        """
        part = _part(quant.scheme)
        rows = n if part.block[0] else 1
        scales = tensors["weight_scale"].reshape(rows, -1)
        zeros = tensors.get("weight_zero_point")
        act_scale, act_zero = tensors.get("input_scale"), tensors.get("input_zero_point")
        if act_scale is not None and not 0 < float(act_scale) < float("inf"):
            raise DecodeError(
                f"input_scale is {float(act_scale)}; a positive finite number was needed, so calibrate the checkpoint again"
            )
        return QuantWeight(
            quant.scheme,
            tensors["weight"],
            scales,
            part.block,
            zeros=None if zeros is None else zeros.to(torch.int16).reshape(rows, -1),
            act_scale=None if act_scale is None else act_scale.reshape(()),
            act_zero=None if act_zero is None else act_zero.to(torch.int16).reshape(()),
        )

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`.

        :raises CannotEncode: for fields that the format has no tensor for.
        """
        weight = _storable(weight)
        if weight.scheme != quant.scheme:
            raise CannotEncode(f"a weight of scheme {weight.scheme} was given; the layer is to be stored as {quant.scheme}")
        part = _part(quant.scheme)
        shape = {"tensor": (), "channel": (weight.n,)}.get(part.granularity, tuple(weight.scales.shape))
        tensors = {"weight": weight.codes.contiguous(), "weight_scale": weight.scales.reshape(shape).contiguous()}
        if weight.zeros is not None:
            tensors["weight_zero_point"] = weight.zeros.reshape(shape).to(torch.uint8)
        if weight.act_scale is not None:
            tensors["input_scale"] = weight.act_scale.reshape(())
        if weight.act_zero is not None:
            tensors["input_zero_point"] = weight.act_zero.reshape(()).to(torch.int8)
        return tensors

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """The one layout.

        :raises CannotEncode: as :meth:`encode`.
        """
        return _quant(_storable(weight).scheme)

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """The commonest scheme, with every other layer by name.

        :raises CannotEncode: where no layer is quantized.
        """
        schemes = {name: quant.scheme for name, quant in layers.items() if quant is not None}
        if not schemes:
            raise CannotEncode("no layer is quantized; write a 16-bit checkpoint without a quantization config")
        common = Counter(schemes.values()).most_common(1)[0][0]
        config: dict[str, Any] = {"quant_method": "int8", "scheme": str(common)}
        config["ignore"] = [name for name, quant in layers.items() if quant is None]
        named = {name: str(scheme) for name, scheme in schemes.items() if scheme != common}
        if named:
            config["layers"] = named
        return config


def _scheme(text: Any, where: str) -> QuantScheme:
    try:
        scheme = QuantScheme.parse(text if isinstance(text, str) else "")
    except SchemeError as error:
        raise ConfigError(f"the int8 config says {where}: {text!r}; {error}") from None
    part, act = scheme.weight, scheme.act
    integers = part is not None and part.dtype == "int8" and part.block[0] in (0, 1) and (act is None or act.dtype == "int8")
    if not integers or scheme.act_order or scheme.sparsity or (part is not None and part.block[0] == 0 and part.block[1]):
        raise ConfigError(
            f"the int8 config says {where}: {text!r}; W8A16 or W8A8 by tensor, channel or group was needed, so correct it"
        )
    return scheme


def _quant(scheme: QuantScheme) -> LayerQuant:
    return LayerQuant(replace(scheme, kv=None), "int8")


def _ignored(text: str) -> Matcher:
    return Matcher(text[3:], "regex") if text.startswith("re:") else Matcher(text, "exact")


def _part(scheme: QuantScheme) -> TensorQuant:
    part = scheme.weight
    assert part is not None, "a layer that stays 16 bit has no int8 tensors"
    return part


def _storable(weight: QuantWeight | OpaqueWeight) -> QuantWeight:
    """``weight``, where every field of it has a tensor."""
    if isinstance(weight, OpaqueWeight) or weight.experts is not None:
        what = "an opaque encoding" if isinstance(weight, OpaqueWeight) else "a stack of experts"
        raise CannotEncode(f"{what} was given; int8 stores one matrix for each module, so choose another format")
    try:
        _scheme(str(weight.scheme), "scheme")
    except ConfigError:
        raise CannotEncode(
            f"scheme {weight.scheme} was given; int8 stores W8A16 and W8A8, so choose another format"
        ) from None
    extra = weight.tensors().keys() - {"codes", "scales", "zeros", "act_scale", "act_zero"}
    if extra or (weight.zeros is not None and weight.zeros.is_floating_point()):
        what = ", ".join(sorted(extra)) or "float zero points"
        raise CannotEncode(f"a weight with {what} was given; int8 has no tensor for it, so choose another format")
    if weight.zeros is not None and bool(((weight.zeros < 0) | (weight.zeros > 255)).any()):
        low, high = int(weight.zeros.min()), int(weight.zeros.max())
        raise CannotEncode(f"zero points from {low} to {high} were given; int8 holds 0 to 255, so choose another format")
    return weight
