"""How an AWQ config says that activations are quantized too: TensorRT-LLM's ``quant_algo``, or auto-round's ``act_`` keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qplug_core.errors import ConfigError
from qplug_core.scheme import TensorQuant

from .headers import has_tensor

if TYPE_CHECKING:
    from qplug_core.source import Source

KEYS = ("quant_algo", "act_bits", "act_data_type", "act_dynamic", "act_sym", "act_group_size")
ALGORITHMS = ("W4A16_AWQ", "W4A8_AWQ")
TYPES = {
    **dict.fromkeys(("int", "int8"), "int8"),
    **dict.fromkeys(("fp", "fp8", "fp8_e4m3", "float8_e4m3", "float8_e4m3fn", "fp8_e4m3fn"), "fp8_e4m3"),
}


def act_of(raw: Mapping[str, Any], source: Source, inferred: list[str]) -> TensorQuant | None:
    """The activation part of the scheme, None for 16 bit.

    :raises ConfigError: for words that are not understood, or that contradict each other or the headers.
    """
    said = {key: raw[key] for key in KEYS if raw.get(key) is not None}
    algorithm = said.pop("quant_algo", None)
    if algorithm is not None and str(algorithm).upper() not in ALGORITHMS:
        raise ConfigError(
            f"the AWQ config says quant_algo: {algorithm!r}; {' or '.join(ALGORITHMS)} was needed, so use the plugin of that "
            "algorithm"
        )
    static = has_tensor(source, "input_scale")
    if algorithm is not None and str(algorithm).upper() == "W4A8_AWQ":
        if said:
            raise ConfigError(
                f"the AWQ config says quant_algo: {algorithm!r} and {', '.join(said)}; they say the same thing twice, so keep one"
            )
        # TensorRT-LLM means FP8 by A8.
        if not source.tensors:
            inferred.append("W4A8_AWQ without headers: taken with static FP8 activations, as TensorRT-LLM has them")
        elif not static:
            inferred.append("W4A8_AWQ without input_scale: FP8 activations are quantized by token as they come")
        dynamic = bool(source.tensors) and not static
        return TensorQuant("fp8_e4m3", (1, 0) if dynamic else (0, 0), dynamic=dynamic)
    if algorithm is not None and said.get("act_bits", 16) < 16:
        raise ConfigError(
            f"the AWQ config says quant_algo: {algorithm!r} and act_bits: {said['act_bits']!r}, which contradict each other; keep "
            "the one that the file was made with"
        )
    if said.get("act_bits", 16) == 16:
        return None
    return _stated(said)


def _stated(said: Mapping[str, Any]) -> TensorQuant:
    """auto-round's words, with its defaults: symmetric int8 by token."""
    kind = TYPES.get(str(said.get("act_data_type", "int")).lower())
    dynamic, group = said.get("act_dynamic", True), said.get("act_group_size")
    if said["act_bits"] != 8 or kind is None:
        raise ConfigError(
            f"the AWQ config says act_bits: {said['act_bits']!r} and act_data_type: {said.get('act_data_type', 'int')!r}; 8 bits "
            "of int or fp were needed, so use a plugin that knows others"
        )
    if said.get("act_sym", True) is not True:
        raise ConfigError(
            "the AWQ config says act_sym: false; symmetric activations were needed, so use a plugin that knows others"
        )
    if (dynamic, group) in ((True, None), (True, -1)):
        return TensorQuant(kind, (1, 0), dynamic=True)
    if (dynamic, group) in ((False, None), (False, 0)):
        return TensorQuant(kind, (0, 0))
    raise ConfigError(
        f"the AWQ config says act_dynamic: {dynamic!r} and act_group_size: {group!r}; dynamic by token (-1) or static by tensor "
        "(0) was needed, so use a plugin that knows others"
    )
