"""The ``quantization_config`` that says what was written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from qplug_core.config import LayerQuant
from qplug_core.errors import CannotEncode
from qplug_core.scheme import QuantScheme

from .layouts import part_of


def write(layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
    """The config that says ``layers``: the commonest quantization as the default, every other as a ``dynamic`` rule.

    Layers at 16 bit are in ``modules_to_not_convert`` by their full names, except for lm_head, which has a key of its own.

    :raises CannotEncode: where layers need two versions, or activations of two kinds.
    """
    quants = [quant for quant in layers.values() if quant is not None]
    if not quants:
        raise CannotEncode("no layer is quantized; write a 16-bit checkpoint without a quantization config")
    layouts = sorted({quant.layout for quant in quants})
    if len(layouts) > 1:
        raise CannotEncode(
            f"layouts {' and '.join(layouts)} were given; one AWQ checkpoint has one version, so store every layer in one layout"
        )
    acts = {quant.scheme.act for quant in quants}
    if len(acts) > 1:
        raise CannotEncode(
            "layers with different activations were given; an AWQ config says them once, so choose compressed-tensors"
        )
    common = Counter(quant.scheme for quant in quants).most_common(1)[0][0]
    heads = {name for name in layers if name.rsplit(".", 1)[-1] == "lm_head"}
    config: dict[str, Any] = {"quant_method": "awq", **_said(common), "version": layouts[0].removeprefix("awq_")}
    if any(layers[name] is not None for name in heads):
        config["lm_head"] = True
    skipped = [name for name, quant in layers.items() if quant is None and name not in heads]
    config["modules_to_not_convert"] = skipped or None
    config.update(_activations(common))
    if any(quant.opt("pre_quant_scale", False) for quant in quants):
        config["pre_quant_scale"] = True
    dynamic = {
        f"+:{re.escape(name)}$": _said(quant.scheme)
        for name, quant in layers.items()
        if quant is not None and quant.scheme != common
    }
    if dynamic:
        config["dynamic"] = dynamic
    return config


def _said(scheme: QuantScheme) -> dict[str, Any]:
    part = part_of(LayerQuant(scheme, ""))
    return {"bits": part.bits, "group_size": part.block[1] or -1, "zero_point": not part.symmetric}


def _activations(scheme: QuantScheme) -> dict[str, Any]:
    act = scheme.act
    if act is None:
        return {}
    return {
        "act_bits": 8,
        "act_data_type": "int" if act.dtype == "int8" else "fp",
        "act_dynamic": bool(act.dynamic),
        "act_group_size": -1 if act.dynamic else 0,
    }
