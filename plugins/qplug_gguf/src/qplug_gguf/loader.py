"""The formats: GGUF's block types as weights of the hub.

====== ================ ===== ========================================
tensor shape            dtype
====== ================ ===== ========================================
weight [N, K / B * T]   uint8 blocks of B values in T bytes, row by row
====== ================ ===== ========================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qplug_core.axes import StoredTensor
from qplug_core.config import LayerQuant, QuantizationConfig, Rule
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.format import CheckpointFormat
from qplug_core.keys import take
from qplug_core.match import Matcher
from qplug_core.quantizer import codebook_of
from qplug_core.scheme import QuantScheme
from qplug_core.weight import OpaqueWeight, QuantWeight

from .blocks import TYPES, BlockType, Fields
from .grids import GRIDS

if TYPE_CHECKING:
    from qplug_core.source import Source

KEYS: dict[str, Any] = {"quant_method": "gguf", "types": {}}


class SuperBlockFormat(CheckpointFormat):
    """Layouts by GGUF type in lower case. Super-blocks are read and not written: their small integers are not in the hub."""

    name = "gguf-k"

    def parse(self, source: Source) -> QuantizationConfig:
        """One rule for each module, by the type of its tensor; other modules hold plain numbers.

        :raises ConfigError: for a type or a key that is not known.
        """
        values = take(source.quant_config or {}, KEYS, (), "the gguf config", "qplug-gguf")
        types = values["types"]
        if not isinstance(types, dict) or not types:
            raise ConfigError(
                f"the gguf config says types: {types!r}; an object of module names and GGUF types was needed, such as one read off a file"
            )
        rules = [
            Rule(Matcher(name, "exact"), quant_of(str(kind), name), origin="tensor type") for name, kind in types.items()
        ]
        return QuantizationConfig("gguf", rules, inferred=list(getattr(source, "notes", ())))

    def open(self, path: Path) -> Source:
        """See :func:`~qplug_gguf.source.open_gguf`."""
        from .source import open_gguf

        return open_gguf(path)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The one tensor, cut along K at whole blocks."""
        block = TYPES[quant.layout]
        return (StoredTensor("weight", ("N", f"{block.nbytes}*K/{block.values}"), ("U8",)),)

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight | OpaqueWeight:
        """Codes of 4 to 8 bits with scales ``[N, K/g]``: float16 as stored, float32 where they are products."""
        block = TYPES[quant.layout]
        fields = block.unpack(tensors["weight"].reshape(n, -1, block.nbytes))
        part = quant.scheme.weight
        assert part is not None
        codes = fields.codes.reshape(n, k)
        if block.zero:
            # In uint8 the difference wraps round, which is the two's complement that is wanted.
            codes = codes.sub_(block.zero).view(torch.int8)
        shift = None if fields.shift is None else fields.shift.reshape(n, -1)
        return QuantWeight(
            quant.scheme, codes, fields.scales.reshape(n, -1), part.block, shift=shift, codebook=codebook_of(part.dtype)
        )

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`.

        :raises CannotEncode: for types with super-blocks, and for weights that the type cannot hold bit for bit.
        """
        block = TYPES[quant.layout]
        weight = _storable(weight, block)
        n, k = weight.codes.shape
        codes = weight.codes.contiguous().view(torch.uint8) + block.zero if block.zero else weight.codes
        shape = (n, k // block.values, -1)
        fields = Fields(
            codes.reshape(shape), weight.scales.reshape(shape), None if weight.shift is None else weight.shift.reshape(shape)
        )
        assert block.pack is not None
        return {"weight": block.pack(fields).reshape(n, -1)}

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """The type with one scale for each block that holds ``weight``.

        :raises CannotEncode: where there is none.
        """
        found = [b for b in TYPES.values() if b.pack is not None and QuantScheme.parse(b.scheme) == weight.scheme]
        if not found:
            raise CannotEncode(
                f"scheme {weight.scheme} was given; GGUF types that are written hold "
                f"{', '.join(sorted({b.scheme for b in TYPES.values() if b.pack}))}, so quantize to one of these or choose another format"
            )
        _storable(weight, found[0])
        return quant_of(found[0].name, "")

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """Every quantized module with its type.

        :raises CannotEncode: where no layer is quantized.
        """
        types = {name: quant.layout.upper() for name, quant in layers.items() if quant is not None}
        if not types:
            raise CannotEncode("no layer is quantized; write a 16-bit checkpoint without a quantization config")
        return {"quant_method": "gguf", "types": types}


class GGUFFormat(SuperBlockFormat):
    """Files, and the layouts whose blocks have one stored scale: these are written too."""

    name = "gguf"


def quant_of(kind: str, module: str) -> LayerQuant:
    """The quantization that a GGUF type means, by its name in any case.

    :raises ConfigError: for a type that is not read.
    """
    block = TYPES.get(kind.lower())
    if block is None and kind.lower() in GRIDS:
        return LayerQuant(QuantScheme.parse(GRIDS[kind.lower()]), kind.lower(), (("encoding", f"gguf:{kind.lower()}"),))
    if block is None:
        known = ", ".join(name.upper() for name in (*TYPES, *GRIDS))
        raise ConfigError(f"{module} is of GGUF type {kind}; {known} are read, so convert the model to one of these")
    scheme = QuantScheme.parse(block.scheme)
    opts = () if scheme.weight is None or scheme.weight.symmetric else (("shift", True),)
    return LayerQuant(scheme, block.name, opts)


def _storable(weight: QuantWeight | OpaqueWeight, block: BlockType) -> QuantWeight:
    """``weight``, where blocks of this type hold all of it.

    :raises CannotEncode: where not.
    """
    kind = block.name.upper()
    if block.pack is None:
        raise CannotEncode(
            f"{kind} was asked for, whose super-blocks hold scales as products of numbers that the weight no longer has; "
            f"choose one of {', '.join(b.name.upper() for b in TYPES.values() if b.pack)}"
        )
    if isinstance(weight, OpaqueWeight) or weight.experts is not None:
        what = "an opaque encoding" if isinstance(weight, OpaqueWeight) else "a stack of experts"
        raise CannotEncode(f"{what} was given; {kind} stores one matrix for each module, so choose another format")
    wanted = QuantScheme.parse(block.scheme)
    if weight.scheme != wanted or weight.k % block.values:
        raise CannotEncode(
            f"a weight {weight.scheme} of {weight.k} columns was given; {kind} holds {wanted} in blocks of {block.values}, so choose "
            "another type or format"
        )
    part = wanted.weight
    assert part is not None
    allowed = (
        {"codes", "scales"}
        | ({"codebook"} if weight.codebook is not None else set())
        | (set() if part.symmetric else {"shift"})
    )
    extra, missing = weight.tensors().keys() - allowed, allowed - weight.tensors().keys()
    if extra or missing:
        what = f"with {', '.join(sorted(extra))}" if extra else f"without {', '.join(sorted(missing))}"
        raise CannotEncode(
            f"a weight {what} was given; {kind} stores {', '.join(sorted(allowed))}, so choose another format"
        )
    for name in ("scales", "shift"):
        value = weight.tensors().get(name)
        if value is not None and value.dtype != torch.float16:
            raise CannotEncode(
                f"{name} of {value.dtype} were given; {kind} stores float16, so round them or choose another format"
            )
    book = codebook_of(part.dtype)
    if book is not None and (weight.codebook is None or not torch.equal(weight.codebook.cpu(), book)):
        raise CannotEncode(f"a weight with another codebook was given; {kind} has its own, so choose another format")
    return replace(weight)
