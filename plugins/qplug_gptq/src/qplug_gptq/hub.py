"""What of the hub the layouts of this plugin can hold."""

from __future__ import annotations

from qplug_core.config import LayerQuant
from qplug_core.errors import CannotEncode
from qplug_core.scheme import TensorQuant
from qplug_core.weight import OpaqueWeight, QuantWeight

FIELDS = {"codes", "scales", "zeros", "group_index", "act_scale"}
"""Fields of a weight that there are tensors for."""


def part_of(quant: LayerQuant) -> TensorQuant:
    """The weight part of a quantized layer."""
    part = quant.scheme.weight
    assert part is not None, "a layer that stays 16 bit has no GPTQ tensors"
    return part


def affine(weight: QuantWeight | OpaqueWeight, layout: str = "gptq") -> QuantWeight:
    """``weight``, where its scheme and its fields are those that this plugin has tensors for.

    :raises CannotEncode: naming what has no tensor.
    """
    scheme = weight.scheme
    part = scheme.weight
    remedy = "choose another format"
    if isinstance(weight, OpaqueWeight) or weight.experts is not None:
        what = "an opaque encoding" if isinstance(weight, OpaqueWeight) else "a stack of experts"
        raise CannotEncode(f"{what} was given; {layout} stores one integer matrix for each module, so {remedy}")
    if part is None or part.dtype not in {f"int{b}" for b in range(2, 9)} or scheme.sparsity:
        raise CannotEncode(f"scheme {scheme} was given; {layout} stores integers of 2 to 8 bits, so {remedy}")
    if part.block[0] != 1 or part.scale_dtype != "float":
        raise CannotEncode(
            f"scales by {part.granularity} were given; {layout} stores one for each row and group, so {remedy}"
        )
    extra = weight.tensors().keys() - FIELDS
    if extra or (weight.act_scale is not None and weight.act_div):
        names = ", ".join(sorted(extra)) or "an activation divisor"
        raise CannotEncode(f"a weight with {names} was given; {layout} has no tensor for it, so {remedy}")
    return weight
