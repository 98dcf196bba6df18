"""The config that says which layer was stored how."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from qplug_core.config import LayerQuant
from qplug_core.errors import CannotEncode
from qplug_core.scheme import QuantScheme

from . import activation


def write(layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
    """The config that says ``layers``: the commonest quantization as the default, every other as a ``dynamic`` rule.

    :raises CannotEncode: where layers need different layouts, or different activations.
    """
    quants = [quant for quant in layers.values() if quant is not None]
    if not quants:
        raise CannotEncode("no layer is quantized; write a 16-bit checkpoint without a quantization config")
    layouts = sorted({quant.layout for quant in quants})
    if len(layouts) > 1:
        raise CannotEncode(
            f"layouts {' and '.join(layouts)} were given; one GPTQ checkpoint has one checkpoint_format, so quantize "
            "every layer with zero points, or every layer without"
        )
    acts = {quant.scheme.act for quant in quants}
    if len(acts) > 1:
        schemes = " and ".join(sorted({str(quant.scheme) for quant in quants}))
        raise CannotEncode(
            f"{schemes} were given; one GPTQ checkpoint has one activation quantization, so choose compressed-tensors for a mixture"
        )
    common = Counter(quant.scheme for quant in quants).most_common(1)[0][0]
    config = {"quant_method": "gptq", **_said(common), "checkpoint_format": layouts[0], "pack_dtype": "int32"}
    config.update(activation.said(common.act))
    heads = {name for name in layers if name.rsplit(".", 1)[-1] == "lm_head"}
    config["lm_head"] = any(layers[name] is not None for name in heads)
    dynamic: dict[str, dict[str, Any]] = {}
    for name, quant in layers.items():
        if quant is None and name not in heads:
            dynamic[f"-:{re.escape(name)}$"] = {}
        elif quant is not None and quant.scheme != common:
            dynamic[f"+:{re.escape(name)}$"] = _said(quant.scheme)
    if dynamic:
        config["dynamic"] = dynamic
    return config


def _said(scheme: QuantScheme) -> dict[str, Any]:
    part = scheme.weight
    assert part is not None
    return {"bits": part.bits, "group_size": part.block[1] or -1, "desc_act": scheme.act_order, "sym": part.symmetric}
