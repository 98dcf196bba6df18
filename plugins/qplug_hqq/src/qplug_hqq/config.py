"""The ``quantization_config`` of HQQ checkpoints as rules, and back; and rules of files that have none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qplug_core.config import LayerQuant, QuantizationConfig, Rule
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.keys import check_keys
from qplug_core.match import Matcher
from qplug_core.scheme import QuantScheme, TensorQuant

if TYPE_CHECKING:
    from qplug_core.source import Source

KEYS = ("quant_method", "quant_config", "skip_modules")
PARAMS = "weight_quant_params"
META_PARAMS = ("scale_quant_params", "zero_quant_params")
METADATA = ("optimize", "round_zero")
"""How numbers were chosen; the file holds the outcome."""

NBITS: dict[float, int] = {1.58: 2, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 8: 8}
"""Bits of a code, by ``nbits``: three values (1.58 bits) are stored in two."""

DROPPED = ("scale_q", "zero_q", "zero_scale", "meta_scale", "meta_zero")
"""Tensors of scales that are quantized themselves, or stored in one piece with zero points."""


def parse(source: Source) -> QuantizationConfig:
    """Rules, in the order in which they decide: ``skip_modules``, then layers by tag, or all. Without a config: by name.

    A tag is the name of a module without ``model``, ``layers`` and numbers; where some have parameters of their own, others stay
    16 bit. ``skip_modules`` are substrings, as transformers matches them; one that would mean a module whose codes are in the
    file means whole components, as vLLM matches them.

    :raises ConfigError: for parameters that are not understood, and for a file that the config does not describe.
    """
    modules = _modules(source)
    raw = source.quant_config
    if raw is None:
        return _from_file(source, modules)
    if source.tensors and not modules:
        raise ConfigError(
            f"{source.path} is called an HQQ checkpoint and none of its {len(source.tensors)} tensors is a W_q; quantize and save it "
            "first, or remove the quantization_config to load it at 16 bit"
        )
    check_keys(raw, KEYS, "the HQQ config", "qplug-hqq")
    said, skipped = raw.get("quant_config"), raw.get("skip_modules")
    if not isinstance(said, dict) or not isinstance(skipped or [], list):
        raise ConfigError(
            f"the HQQ config says quant_config: {said!r} and skip_modules: {skipped!r}; an object and a list of names were needed"
        )
    inferred: list[str] = []
    origin = "skip_modules" if skipped is not None else "HQQ leaves lm_head at 16 bit"
    rules = []
    for name in map(str, ["lm_head"] if skipped is None else skipped):
        swallowed = next((module for module in modules if name in module), None)
        if swallowed is not None:
            inferred.append(f"skip_modules entry {name!r} means whole parts of names: the file holds codes of {swallowed}")
        matcher = Matcher(name, "substring" if swallowed is None else "component")
        rules.append(Rule(matcher, None, implicit=skipped is None, origin=origin))
    if PARAMS not in said:
        rules += [Rule(_tag(tag), _quant(one, tag, inferred), origin=f"quant_config {tag}") for tag, one in said.items()]
    rules.append(Rule(Matcher("Embedding", "class"), None, implicit=True, origin="HQQ does not quantize embeddings"))
    if PARAMS in said:
        rules.append(Rule(Matcher("", "all"), _quant(said, "quant_config", inferred), origin="quant_config"))
    return QuantizationConfig("hqq", rules, producer="hqq", inferred=list(dict.fromkeys(inferred)))


def write(layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
    """The config that says ``layers``: one object for all, or one for each tag.

    :raises CannotEncode: where no layer is quantized, or layers of one tag differ.
    """
    tags: dict[str, LayerQuant | None] = {}
    for name, quant in layers.items():
        tag = _tag_of(name)
        if tags.setdefault(tag, quant) != quant:
            raise CannotEncode(
                f"layers called {tag} were given with different quantizations; an HQQ config has one for each tag, so quantize all of "
                "them alike"
            )
    quants = {tag: quant for tag, quant in tags.items() if quant is not None}
    if not quants:
        raise CannotEncode("no layer is quantized; write a 16-bit checkpoint without a quantization config")
    alike = len(set(quants.values())) == 1
    said = _params(next(iter(quants.values()))) if alike else {tag: _params(quant) for tag, quant in quants.items()}
    skipped = [tag for tag, quant in tags.items() if quant is None]
    return {"quant_config": said, "quant_method": "hqq", "skip_modules": skipped}


def _modules(source: Source) -> list[str]:
    """Modules that hold codes.

    :raises ConfigError: where one has scales in a form that HQQ dropped.
    """
    modules = [name.removesuffix(".W_q") for name in source.tensors if name.endswith(".W_q")]
    for module in modules:
        if dropped := [name for name in DROPPED if f"{module}.{name}" in source.tensors]:
            raise ConfigError(
                f"{module} has {dropped[0]}: scales or zero points are quantized or joined, which HQQ dropped in version 0.2; quantize the "
                "model again"
            )
    return modules


def _from_file(source: Source, modules: list[str]) -> QuantizationConfig:
    """Each layer says in small tensors of its own what a config would."""
    rules = []
    for module in modules:
        stored = [f"{module}.{name}" for name in ("nbits", "group_size", "axis")]
        infos = [source.tensors.get(name) for name in stored]
        if not all(info is not None and info.file.exists() for info in infos):
            raise ConfigError(
                f"there is no quantization_config, and {', '.join(stored)} cannot be read; they say it for {module}, so fetch the whole "
                "checkpoint or add a config"
            )
        nbits, group, axis = (round(float(source.read(name)), 2) for name in stored)
        said = {"nbits": nbits, "group_size": int(group), "axis": int(axis)}
        floats = source.tensors[f"{module}.W_q"].dtype not in ("U8", "I32")
        quant = _quant({PARAMS: {**said, "view_as_float": floats}}, module, [])
        rules.append(Rule(Matcher(module, "exact"), quant, implicit=True, origin="its own tensors"))
    inferred = ["there is no config: bits, groups and axes were read from nbits, group_size and axis of each layer"]
    return QuantizationConfig("hqq", rules, producer="hqq", inferred=inferred)


def _quant(said: Any, where: str, inferred: list[str]) -> LayerQuant | None:
    if said is None:
        return None
    params = said.get(PARAMS) if isinstance(said, dict) else None
    if not isinstance(params, dict):
        raise ConfigError(f"the HQQ config says {where}: {said!r}; an object with {PARAMS} was needed, so correct it")
    others = {**{key: value for key, value in said.items() if key != PARAMS}, **params}
    for key in META_PARAMS:
        if others.pop(key, None):
            inferred.append(f"{key} of the config has no effect: HQQ 0.2 ignores it and stores plain scales and zero points")
    if others.pop("offload_meta", False):
        inferred.append("offload_meta of the config has no effect: it is about memory")
    nbits, group, axis = others.pop("nbits", None), others.pop("group_size", None), others.pop("axis", None)
    floats = others.pop("view_as_float", False)
    if others.pop("channel_wise", True) is not True:
        raise ConfigError(
            f"the HQQ config says channel_wise: false for {where}; scales by group are read, so quantize with true"
        )
    check_keys(others, METADATA, f"the HQQ config of {where}", "qplug-hqq")
    if axis not in (0, 1):
        raise ConfigError(f"the HQQ config says axis: {axis!r} for {where}; 0 or 1 was needed, so correct it")
    bits = NBITS.get(nbits) if isinstance(nbits, (int, float)) else None
    if bits is None:
        raise ConfigError(
            f"the HQQ config says nbits: {nbits!r} for {where}; {', '.join(map(str, NBITS))} are read, so quantize with one of them"
        )
    if group is not None and (not isinstance(group, int) or group < 1):
        raise ConfigError(f"the HQQ config says group_size: {group!r} for {where}; a positive number or null was needed")
    group = group or 0
    if axis == 0 and not group:
        raise ConfigError(
            f"the HQQ config says axis: 0 and no group_size for {where}: one scale for each column, which is not read; quantize with axis 1"
        )
    block = (group, 1) if axis == 0 else (1, group)
    options: dict[str, Any] = {"axis": 0} if axis == 0 else {}
    if floats:
        options["view_as_float"] = True
    return LayerQuant(QuantScheme(TensorQuant(f"int{bits}", block, symmetric=False)), "hqq", tuple(options.items()))


def _params(quant: LayerQuant) -> dict[str, Any]:
    part = quant.scheme.weight
    assert part is not None
    params = {"nbits": part.bits, "channel_wise": True, "group_size": part.block[1] or None, "optimize": True}
    return {
        PARAMS: {**params, "round_zero": False, "axis": 1, "view_as_float": False},
        **dict.fromkeys(META_PARAMS),
        "offload_meta": False,
    }


_NOISE = r"(?:model|layers|\d+)"


def _tag_of(name: str) -> str:
    return ".".join(part for part in name.split(".") if not re.fullmatch(_NOISE, part))


def _tag(tag: str) -> Matcher:
    """Names whose tag is ``tag``."""
    between = rf"\.(?:{_NOISE}\.)*"
    return Matcher(rf"(?:{_NOISE}\.)*{between.join(map(re.escape, tag.split('.')))}(?:\.{_NOISE})*$", "regex")
