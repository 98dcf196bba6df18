"""Who serves a checkpoint, vLLM or qplug, and why. What vLLM does itself is data, in the words that plugins declare with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ...config import LayerQuant
from ...decl import SchemePattern
from ...device import Device
from ...errors import QplugError, UsageError
from ...planner import assumed_source, read_config
from ...registry import Registry
from ...resolve import Policy
from . import NAME, VERSIONS

VARIABLE = "QPLUG_VLLM"


@dataclass(frozen=True)
class Served:
    """What vLLM serves by itself: layouts (any where none is named) of schemes, under one ``quant_method``, on some devices.

    ``needs``: the module without which it does not.
    """

    method: str
    layouts: tuple[str, ...]
    schemes: tuple[str, ...]
    devices: tuple[str, ...]
    experts: bool = True
    needs: str = ""


@dataclass(frozen=True)
class Options:
    """What the user gave as ``--additional-config '{"qplug": {...}}'``: the words of :func:`qplug_core.load`.

    ``quantize``: the scheme that a 16-bit checkpoint is quantized to at load.
    """

    policy: Policy
    quantize: str | None = None

    @classmethod
    def current(cls) -> Options:
        """Of the model that vLLM is making.

        :raises UsageError: for a word that is not known.
        """
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        given = getattr(config, "additional_config", None)
        words = dict(given.get(NAME, {})) if isinstance(given, dict) else {}
        quantize = words.pop("quantize", None)
        known = ("kernels", "pin", "forbid", "activations")
        if unknown := sorted(words.keys() - set(known)):
            raise UsageError(f"additional_config of {NAME} has {unknown[0]!r}; {', '.join(('quantize', *known))} are known")
        return cls(Policy(**{**words, "forbid": frozenset(words.get("forbid", ()))}), quantize)


PACKED, INT8, FP8 = ("pack-quantized",), ("int-quantized", "naive-quantized"), ("float-quantized", "naive-quantized")
AMPERE = ("sm_80+", "gfx90a+", "gfx11*", "gfx12*")
TURING = ("sm_75+", *AMPERE[1:])
HAS_FP8 = ("sm_89+", "gfx942+", "gfx12*")
TAKES_FP8 = ("sm_75+", *HAS_FP8[1:])  # Weight-only, where the GPU has no FP8 product.
INT8_SCHEMES = ("W8A8 tensor|channel a:token|tensor.static|tensor.static.asym rules=127.5",)
NVFP4, MXFP4, MXFP8 = (
    ("Wnvfp4A{16,nvfp4} g16 a:g*|g*.local",),
    ("Wmxfp4A{16,mxfp4} g32 a:g*",),
    ("Wmxfp8Amxfp8 g32 a:g* rules=ct",),
)
SERVED = (
    Served("gptq", ("gptq",), ("W{4,8}A16 channel|g32|g64|g128 sym",), TURING),
    Served("gptq", ("gptq",), ("W4A16 g32|g64|g128 sym",), ("avx512",), False),
    Served("awq", ("awq_gemm",), ("W4A16 g32|g64|g128 sym|asym",), TURING),
    Served("awq", ("awq_gemm",), ("W4A16 g32|g64|g128 sym|asym",), ("avx512",), False),
    Served("auto-round", ("gptq",), ("W{4,8}A16 channel|g32|g64|g128 sym",), TURING),
    Served("compressed-tensors", PACKED, ("W{4,8}A16 channel|g32|g64|g128 sym|asym",), TURING),
    Served("compressed-tensors", PACKED, ("W4A16 channel|g32|g64|g128 sym|asym",), ("avx512",), False),
    Served("compressed-tensors", INT8, INT8_SCHEMES, ("sm_75+",)),
    Served("compressed-tensors", INT8, INT8_SCHEMES, ("avx512",), False),
    Served("compressed-tensors", FP8, ("Wfp8Afp8 tensor|channel|b128x128 a:token|tensor.static|g128",), TAKES_FP8),
    Served("compressed-tensors", FP8, ("Wfp8Afp8 channel a:token",), ("avx512",), False),
    Served("compressed-tensors", ("nvfp4-pack-quantized",), NVFP4, ("sm_75+",)),
    Served("compressed-tensors", ("mxfp4-pack-quantized",), MXFP4, ("sm_80+",)),
    Served("compressed-tensors", ("mxfp8-quantized",), MXFP8, ("sm_75+",)),
    Served("fp8", ("fp8",), ("Wfp8Afp8 tensor a:token|tensor|tensor.static",), TAKES_FP8),
    Served("fp8", ("fp8_inv", "fp8_block"), ("Wfp8Afp8 b128x128 a:g128",), TAKES_FP8),
    Served("fbgemm_fp8", (), ("Wfp8Afp8 channel a:token rules=ub1200",), ("sm_80+", *HAS_FP8[1:])),
    Served("modelopt", (), ("Wfp8Afp8 tensor|channel a:token|tensor.static",), ("sm_80+",)),
    Served("modelopt", (), (*NVFP4, *MXFP8), ("sm_80+",)),
    Served("modelopt_fp4", (), NVFP4, ("sm_75+",)),
    Served("mxfp4", (), MXFP4, ("sm_80+", "gfx90a+")),
    Served("quark", (), ("Wfp8Afp8 tensor|channel a:token|tensor.static",), HAS_FP8[:2]),
    Served("quark", (), ("W8A8 tensor|channel a:token|tensor.static",), ("sm_75+",)),
    Served("quark", (), MXFP4, ("gfx90a+",)),
    Served("torchao", (), ("*",), TURING, needs="torchao"),
)
"""Of the versions in VERSIONS; the CPU rows were run, the others are read from its code. What is not here counts as refused: qplug has
a floor and vLLM has none."""


@dataclass(frozen=True)
class Claim:
    """``qplug``: whether qplug serves the checkpoint. ``reason``: one clause for the log."""

    qplug: bool
    reason: str


def decide(
    config: Mapping[str, Any],
    asked: str | None,
    device: Device,
    registry: Registry,
    environ: Mapping[str, str] | None = None,
    moe: bool = False,
) -> Claim | None:
    """Who serves a checkpoint with this ``quantization_config``; None where no installed format reads it.

    ``asked``: what the user gave as ``--quantization``. ``moe``: whether the model has experts.

    :raises UsageError: for a policy that is not understood.
    :raises ConfigError: for a config that only qplug could read, and does not.
    """
    method = str(config.get("quant_method") or config.get("quantization") or "").lower()
    if asked == NAME:
        return Claim(True, f"--quantization {NAME} asks for it")
    detected = {name for form in registry.formats for name in form.decl.detects}
    detected |= {name for other in registry.configs for name in other.decl.detects}
    wanted = policy(os.environ if environ is None else environ, detected)
    if method not in detected:
        return None
    if asked is not None:
        return Claim(False, f"--quantization {asked} asks for vLLM's own")
    try:
        lacking = refused(config, method, device, registry, moe)
    except QplugError as error:
        if not any(entry.method == method for entry in SERVED):
            raise
        return Claim(False, f"qplug does not read its config ({error})")
    if lacking:
        return Claim(True, lacking)
    if "all" in wanted or method in wanted:
        return Claim(True, f"{VARIABLE}={','.join(wanted)} asks for it")
    return Claim(False, f"it serves this itself; {VARIABLE}=all or {VARIABLE}={method} gives it to qplug")


def policy(environ: Mapping[str, str], known: set[str]) -> Sequence[str]:
    """The words of ``QPLUG_VLLM``: ``missing`` (the default), ``all``, or values of ``quant_method``.

    :raises UsageError: for a word that is none of these.
    """
    words = [word.strip().lower() for word in environ.get(VARIABLE, "missing").split(",") if word.strip()]
    for word in words:
        if word not in ("missing", "all") and word not in known:
            raise UsageError(
                f"{VARIABLE} names {word!r}; missing, all, or a quant_method that an installed plugin reads was needed "
                f"({', '.join(sorted(known)) or 'none is installed'})"
            )
    return words


def refused(config: Mapping[str, Any], method: str, device: Device, registry: Registry, moe: bool) -> str:
    """What vLLM does not serve of a config, as a clause; an empty string where it serves all of it."""
    parsed, _ = read_config(assumed_source(dict(config)), registry)
    here = [entry for entry in SERVED if entry.method == method and device.matches_any(entry.devices)]
    if not any(entry.method == method for entry in SERVED):
        return f"vLLM {VERSIONS} has no {method}"
    if not here:
        return f"vLLM {VERSIONS} does not serve {method} on {device.arch}"
    if lacking := next((entry.needs for entry in here if entry.needs and find_spec(entry.needs) is None), ""):
        return f"vLLM {VERSIONS} serves {method} only with {lacking}, which is not installed"
    if moe and not any(entry.experts for entry in here):
        return f"vLLM {VERSIONS} does not serve experts of {method} on {device.arch}"
    quants = dict.fromkeys(rule.quant for rule in parsed.rules if rule.quant is not None)
    for quant in quants:
        if not any(_serves(entry, quant, moe) for entry in here):
            return f"vLLM {VERSIONS} does not serve {quant.scheme} stored as {quant.layout} on {device.arch}"
    return ""


def _serves(entry: Served, quant: LayerQuant, moe: bool) -> bool:
    if moe and not entry.experts:
        return False
    layout = not entry.layouts or quant.layout in entry.layouts
    return layout and any(SchemePattern(text).matches(quant.scheme) for text in entry.schemes)
