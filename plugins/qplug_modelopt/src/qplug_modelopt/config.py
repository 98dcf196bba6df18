"""The rules that a ModelOpt config means, and the config that means given rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from qplug_core.config import LayerQuant, ModuleName, QuantizationConfig, Rule
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.match import Matcher
from qplug_core.scheme import TensorQuant

from . import headers
from .algos import ALGOS, MIXED, NO_QUANT, Algo, find, group_config, of_quant
from .dialects import Said, merge, read

if TYPE_CHECKING:
    from qplug_core.source import Source

FILE = "hf_quant_config.json"

KV = {
    "FP8": TensorQuant("fp8_e4m3", (0, 0)),
    "INT8": TensorQuant("int8", (0, 0)),
    "NVFP4": TensorQuant("fp4_e2m1", (1, 16), dynamic="local", scale_dtype="e4m3"),
}
"""KV-cache algorithms: one stored scale for all keys, one for all values; NVFP4 computes block scales under it."""


def parse(source: Source) -> QuantizationConfig:
    """Rules in the order in which they decide: ``quantized_layers``, the excluded modules, then ``quant_algo``.

    Group sizes, static activation scales and a quantized lm_head are read from the headers where the config leaves them out.

    :raises ConfigError: for what is not understood, or contradicts itself, the other file, or the headers.
    """
    said = _read_all(source)
    inferred: list[str] = []
    if said.algo is None and said.groups:
        said.algo = _algo_of_groups(said)
        inferred.append(f"quant_algo is not said: {said.algo}, from config_groups")
    if said.algo is None and (said.layers or said.kv is None):
        raise ConfigError(
            f"{said.origin} has no quant_algo; add the one that the checkpoint was exported with, or {NO_QUANT!r} for 16-bit weights"
        )
    excluded = [Rule(Matcher(text, "fnmatch"), None, origin="exclude_modules") for text in said.exclude or []]
    _check_smoothing(said, source)
    rules = _layer_rules(said, source, excluded, inferred)
    rules += excluded
    rules.append(Rule(Matcher("Embedding", "class"), None, implicit=True, origin="embeddings are quantized only by name"))
    if said.exclude is None and "lm_head.weight_scale" not in source.tensors:
        rules.append(Rule(Matcher("lm_head", "suffix"), None, implicit=True, origin="there is no list of excluded modules"))
    if said.algo not in (None, MIXED, NO_QUANT):
        assert said.algo is not None
        default = _quant(ALGOS[said.algo], said.group_size, said, source, inferred)
        rules.append(Rule(Matcher("", "all"), default, origin=f"quant_algo {said.algo}"))
    _check_groups(said, rules)
    return QuantizationConfig(
        "modelopt",
        rules,
        kv=KV[said.kv] if said.kv else None,
        producer=said.producer,
        inferred=inferred,
        metadata=said.metadata,
    )


def write(layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
    """The flat config that says ``layers``: one ``quant_algo``, or ``MIXED_PRECISION`` with every layer by name.

    :raises CannotEncode: where no layer is quantized, or a quantization has no ``quant_algo``.
    """
    found = {name: algo_for(quant) for name, quant in layers.items() if quant is not None}
    if not found:
        raise CannotEncode("no layer is quantized; write a 16-bit checkpoint without a quantization config")
    config: dict[str, Any] = {"quant_method": "modelopt"}
    kinds = Counter(found.values())
    # FP8 with and without input_scale has one name; the headers tell them apart layer by layer, if each is named.
    if len({quant.scheme for quant in layers.values() if quant is not None}) == len(kinds) == 1:
        algo, group = next(iter(kinds))
        config["quant_algo"] = algo.name
        if group:
            config["group_size"] = group
        config["config_groups"] = {"group_0": {**group_config(algo, group), "targets": ["Linear"]}}
    else:
        config["quant_algo"] = MIXED
        config["quantized_layers"] = {
            name: {"quant_algo": algo.name, **({"group_size": group} if group else {})}
            for name, (algo, group) in found.items()
        }
        config["config_groups"] = {
            f"group_{i}": {**group_config(*kind), "targets": sorted(n for n, k in found.items() if k == kind)}
            for i, kind in enumerate(kinds)
        }
    config["ignore"] = [name for name, quant in layers.items() if quant is None]
    config["producer"] = {"name": "qplug-modelopt", "version": version("qplug-modelopt")}
    return config


def _read_all(source: Source) -> Said:
    raw = source.quant_config
    other = source.files.get(FILE)
    if raw is None and not isinstance(other, dict):
        raise ConfigError(
            f"there is neither a quantization_config in config.json nor an {FILE}; copy the file that the exporter wrote"
        )
    if raw is None:
        assert isinstance(other, dict)
        return read(other, FILE)
    said = read(raw, source.quant_config_from or "the quantization config")
    if isinstance(other, dict) and other is not raw:
        second = read(other, FILE)
        _check_excluded(said, second, source)
        said = merge(said, second)
    return said


def _check_excluded(mine: Said, other: Said, source: Source) -> None:
    """Two lists may be written differently; they may not decide differently about a module that the file holds."""
    if mine.exclude is None or other.exclude is None or set(mine.exclude) == set(other.exclude):
        return
    differ = sorted(set(mine.exclude) ^ set(other.exclude))
    if source.tensors:
        differ = [m for m in headers.modules(source) if _excludes(mine.exclude, m) != _excludes(other.exclude, m)]
    if differ:
        raise ConfigError(
            f"{mine.origin} and {other.origin} disagree on whether {differ[0]} is excluded from quantization; correct the list that is "
            "wrong"
        )


def _excludes(patterns: list[str], module: str) -> bool:
    return any(Matcher(text, "fnmatch").matches(ModuleName((module,))) for text in patterns)


def _check_smoothing(said: Said, source: Source) -> None:
    entries = {"": said.pre_quant_scale, **{name: entry.get("pre_quant_scale") for name, entry in said.layers.items()}}
    for name, flag in entries.items():
        found = headers.first_pre_quant_scale(source, name) if flag is False else None
        if found is not None:
            raise ConfigError(
                f"{said.origin} says pre_quant_scale: false and the file holds {found}; correct the config, because leaving it out "
                "changes the numbers"
            )


def _layer_rules(said: Said, source: Source, excluded: list[Rule], inferred: list[str]) -> list[Rule]:
    """One rule for each entry of ``quantized_layers``, the longest names first, so that a child goes before its parent."""
    if said.algo == MIXED and not said.layers:
        raise ConfigError(
            f"{said.origin} says quant_algo: {MIXED} without quantized_layers, which names the algorithm of each layer; copy "
            f"{FILE} of the export, which has it"
        )
    rules = []
    for name in sorted(said.layers, key=lambda text: (-text.count("."), text)):
        entry = said.layers[name]
        algo = find(entry["quant_algo"], f"{said.origin}, quantized_layers {name},")
        if said.algo != MIXED and algo.name != said.algo:
            raise ConfigError(
                f"{said.origin} says quant_algo: {said.algo} and quantized_layers {name}: {algo.name}; layers of their own need "
                f"quant_algo: {MIXED}, so correct one of the two"
            )
        hit = next((rule for rule in excluded if rule.matcher.matches(ModuleName((name,)))), None)
        if hit is not None:
            raise ConfigError(
                f"{said.origin} says that {name} is {algo.name} and excludes it by {hit.matcher.text!r}; remove it from one of "
                "quantized_layers and exclude_modules"
            )
        # A name that is a container (experts) means all that is in it.
        matcher = Matcher(name, "fnmatch") if any(c in name for c in "*?[") else Matcher(name, "prefix")
        quant = _quant(algo, entry.get("group_size") or None, said, source, inferred, name)
        rules.append(Rule(matcher, quant, origin=f"quantized_layers {name}"))
    return rules


def _quant(algo: Algo, group: int | None, said: Said, source: Source, inferred: list[str], name: str = "") -> LayerQuant:
    """The quantization of an algorithm; ``name`` is the layer that it is for, empty for all."""

    def note(text: str) -> None:
        if text not in inferred:
            inferred.append(text)

    where = f" of {name}" if name else ""
    if not algo.group:
        if group:
            note(f"group_size {group} says nothing of {algo.name}, which has no groups")
        group = None
    elif group is None:
        group = headers.group_size(source, algo.layout, name)
        if group is not None:
            note(f"group_size{where} is not said: {group}, from the shape of weight_scale")
        else:
            group = algo.group
            if len(algo.groups) != 1:
                note(f"group_size{where} is not said: taken as {group}, the usual one of {algo.name}")
    else:
        headers.check_group_size(source, algo.layout, group, name)
    quant = _activations(algo, algo.quant(group), said, source, note, name)
    if algo.layout in headers.SCALE_NAMES and headers.has_scale_inv(source, name):
        note("scales are stored as weight_scale_inv, which multiplies just as weight_scale does")
        quant = replace(quant, opts=(*quant.opts, ("scale", "weight_scale_inv")))
    if algo.name == "FP8_PB_WO":
        note("fp8_pb_wo is weight-only, as ModelOpt means it; some engines quantize activations beside it")
    return quant


def _activations(
    algo: Algo, quant: LayerQuant, said: Said, source: Source, note: Callable[[str], None], name: str
) -> LayerQuant:
    """Activations as the algorithm has them, or as ``config_groups`` and the headers say where its name leaves it open.

    A file without any input_scale: FP8 activations get their scale from each input, NVFP4 weights are weight-only. Where
    only some layers lack it, the calibration was incomplete, and the cover refuses the file.
    """
    act = quant.scheme.act
    if act is None or algo.name not in ("FP8", "NVFP4", "NVFP4_AWQ", "MXFP4"):
        return quant
    groups = [g for g in said.groups.values() if isinstance(g, Mapping) and g.get("weights")]
    if name:
        groups = [g for g in groups if name in (g.get("targets") or [])]
    silent = not groups and headers.lacks_input_scale(source, name)
    weight_only = replace(quant, scheme=quant.scheme.without_act())
    if algo.name == "FP8":
        if headers.lacks_input_scale(source, name):
            note("there is no input_scale: FP8 activation scales are computed for each input tensor")
            return replace(quant, scheme=replace(quant.scheme, act=replace(act, dynamic=True)))
    elif groups and not any(g.get("input_activations") for g in groups):
        note(f"{algo.name} is weight-only: config_groups have no input_activations")
        return weight_only
    elif algo.name == "MXFP4":
        note("mxfp4 does not say whether activations are quantized: taken as MXFP4 too, as in the preset of that name")
    elif silent:
        note(f"there is no input_scale: {algo.name} is read as weight-only")
        return weight_only
    return quant


def _algo_of_groups(said: Said) -> str:
    """The algorithm that ``config_groups`` means, where there is no ``quant_algo``."""
    candidates = ("FP8", "NVFP4", "W4A16_NVFP4", "MXFP8")
    for name in candidates:
        expected = _shape_of(group_config(ALGOS[name], 0))
        if all(_shape_of(group) == expected for group in said.groups.values()):
            return name
    raise ConfigError(
        f"{said.origin} has no quant_algo, and config_groups are those of none of {', '.join(candidates)}; add quant_algo"
    )


def _shape_of(group: Any) -> list[tuple[Any, ...] | None]:
    def numbers(part: Any) -> tuple[Any, ...] | None:
        if not isinstance(part, Mapping):
            return None
        return (part.get("num_bits"), part.get("type"), part.get("group_size") or 0)

    if not isinstance(group, Mapping):
        return [None, None]
    return [numbers(group.get("weights")), numbers(group.get("input_activations"))]


def _check_groups(said: Said, rules: list[Rule]) -> None:
    """Refuse ``config_groups`` that mean other weights than ``quant_algo``: another width, group, or no activations.

    The exporter's own groups call INT4 a float, and AWQ activations 8 bits wide, so no more than that can be compared.
    """
    for label, group in said.groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        targets = group.get("targets") or []
        mine = [
            rule.quant for rule in rules if rule.quant is not None and (said.algo != MIXED or rule.matcher.text in targets)
        ]
        missing = [t for t in targets if t not in said.layers] if said.algo == MIXED else []
        if missing:
            raise ConfigError(
                f"{said.origin} has {missing[0]} in config_groups {label} and not in quantized_layers; add it to quantized_layers "
                "with its quant_algo, or remove it"
            )
        for quant in mine:
            part, act = quant.scheme.weight, group.get("input_activations")
            assert part is not None
            found = (weights.get("num_bits"), weights.get("group_size") or part.block[1], bool(act))
            wanted = (part.bits, part.block[1], quant.scheme.act is not None)
            if found != wanted:
                raise ConfigError(
                    f"{said.origin} says {said.algo} and config_groups {label} with {found[0]}-bit weights, group_size "
                    f"{found[1]}, activations {'quantized' if found[2] else '16 bit'}; {wanted[0]}-bit weights, group_size {wanted[1]}, "
                    f"activations {'quantized' if wanted[2] else '16 bit'} were needed, so correct or remove config_groups"
                )


def algo_for(quant: LayerQuant) -> tuple[Algo, int]:
    """The algorithm that writes a quantization, with its group size.

    :raises CannotEncode: where there is none.
    """
    plain = replace(quant, scheme=replace(quant.scheme, kv=None))
    act = plain.scheme.act
    if plain.layout == "modelopt_fp8" and act is not None and act.dynamic:
        plain = replace(plain, scheme=replace(plain.scheme, act=replace(act, dynamic=False)))
    found = of_quant(plain)
    if found is None:
        raise CannotEncode(
            f"{quant.scheme} in layout {quant.layout} has no quant_algo; choose another scheme or another format"
        )
    return found
