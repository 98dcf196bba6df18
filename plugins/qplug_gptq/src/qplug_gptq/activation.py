"""Activation quantization that a GPTQ config may ask for beside its integer weights: W4A8 and W4Afp8.

Spellings: auto-round's ``act_bits``, ``act_data_type``, ``act_dynamic``, ``act_group_size``, ``act_sym``; the ``activation_scheme``
of FP8 configs (``dynamic`` or ``static``, always FP8 beside integer weights); and TensorRT-LLM's ``quant_algo`` (``W4A16_GPTQ``,
``W8A16_GPTQ``, and ``W4A8_GPTQ``, a column of its support matrix: FP8 with one stored scale).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qplug_core.errors import ConfigError
from qplug_core.scheme import TensorQuant

KEYS = ("act_bits", "act_data_type", "act_dynamic", "act_group_size", "act_sym", "activation_scheme", "quant_algo")

STORED = ("act_scales", "input_scale")
"""Names of a stored activation scale: auto-round's, and that of TensorRT-LLM and ModelOpt."""

ALGORITHMS = {"W4A16_GPTQ": 4, "W8A16_GPTQ": 8, "W4A8_GPTQ": 4}


def read(raw: Mapping[str, Any], bits: object) -> TensorQuant | None:
    """The activation part of a config with weights of ``bits``; None for 16 bit.

    :raises ConfigError: for values that are not understood, or two spellings that say different things.
    """
    spelled = {
        "act_bits": _auto_round(raw),
        "activation_scheme": _scheme(raw.get("activation_scheme")),
        "quant_algo": _algorithm(raw.get("quant_algo"), bits),
    }
    said = {key: found for key, found in spelled.items() if raw.get(key) not in (None, "")}
    if len(set(said.values())) > 1:
        names = " and ".join(f"{key}: {raw[key]!r}" for key in said)
        raise ConfigError(
            f"the GPTQ config says {names}, which are different activation quantizations; keep the one that the file was made for"
        )
    return next(iter(said.values()), None)


def said(act: TensorQuant | None) -> dict[str, Any]:
    """The keys that say ``act``, in auto-round's spelling; none for 16 bit."""
    if act is None:
        return {}
    return {
        "act_bits": 8,
        "act_data_type": "fp8" if act.dtype == "fp8_e4m3" else "int",
        "act_dynamic": bool(act.dynamic),
        "act_group_size": {(1, 0): -1, (0, 0): 0}.get(act.block, act.block[1]),
        "act_sym": act.symmetric,
    }


def _auto_round(raw: Mapping[str, Any]) -> TensorQuant | None:
    bits = raw.get("act_bits")
    if bits in (None, "", 16, 32):
        return None
    kind = str(raw.get("act_data_type") or "int").lower()
    dtype = {"int": "int8", "int_sym": "int8", "int_asym": "int8", "fp8": "fp8_e4m3", "fp8_sym": "fp8_e4m3"}.get(kind)
    if kind in ("fp8_e4m3", "fp8_e5m2"):
        dtype = kind
    if bits != 8 or isinstance(bits, bool) or dtype is None:
        raise ConfigError(
            f"the GPTQ config says act_bits: {bits!r} and act_data_type: {raw.get('act_data_type')!r}; 8 bits of int or fp8 are "
            "understood beside GPTQ weights, so use the plugin of the format that holds the others"
        )
    group = raw.get("act_group_size")
    if group is None or group == "":
        group = -1
    if isinstance(group, bool) or not isinstance(group, int) or group < -1:
        raise ConfigError(
            f"the GPTQ config says act_group_size: {group!r}; -1 for one scale for each token, 0 for one for the tensor, or the "
            "columns of a group were needed, so correct it"
        )
    for key in ("act_dynamic", "act_sym"):
        if not isinstance(raw.get(key), bool | None):
            raise ConfigError(f"the GPTQ config says {key}: {raw[key]!r}; true or false was needed, so correct it")
    symmetric = raw.get("act_sym") is not False and kind != "int_asym"
    if raw.get("act_dynamic") is False:
        if not symmetric and dtype == "int8":
            raise ConfigError(
                "the GPTQ config says act_dynamic: false and act_sym: false; no GPTQ file stores an activation zero point, so "
                "correct act_sym"
            )
        # One stored number: whatever the group size says, there is no other to apply.
        return TensorQuant(dtype, (0, 0), dynamic=False)
    return TensorQuant(dtype, {-1: (1, 0), 0: (0, 0)}.get(group, (1, group)), symmetric or dtype != "int8", dynamic=True)


def _scheme(value: Any) -> TensorQuant | None:
    match value:
        case None | "":
            return None
        case "dynamic":
            return TensorQuant("fp8_e4m3", (1, 0), dynamic=True)
        case "static":
            return TensorQuant("fp8_e4m3", (0, 0), dynamic=False)
    raise ConfigError(f"the GPTQ config says activation_scheme: {value!r}; 'dynamic' or 'static' was needed, so correct it")


def _algorithm(value: Any, bits: object) -> TensorQuant | None:
    if value in (None, ""):
        return None
    if value not in ALGORITHMS:
        raise ConfigError(
            f"the GPTQ config says quant_algo: {value!r}; {' or '.join(ALGORITHMS)} was needed, so use the plugin of that algorithm"
        )
    if bits not in (None, ALGORITHMS[value]):
        raise ConfigError(f"the GPTQ config says quant_algo: {value!r} and bits: {bits!r}; correct the one that is wrong")
    return TensorQuant("fp8_e4m3", (0, 0), dynamic=False) if value == "W4A8_GPTQ" else None
