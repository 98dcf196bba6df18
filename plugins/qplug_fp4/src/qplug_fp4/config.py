"""The ``quantization_config`` of NVFP4, MXFP4 and MXFP8 checkpoints: read and written.

These methods have no common tool behind them, so little is said: ``{"quant_method": "mxfp4", "modules_to_not_convert": [...]}``
is all that gpt-oss has. What is left out is read from the headers, or, where there are none yet, is the default of the method.
Two keys are this format's own: ``scheme`` (``"Wmxfp4Afp8"``) and ``layers`` (a scheme for each module that differs).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qplug_core.config import LayerQuant, QuantizationConfig, Rule
from qplug_core.errors import CannotEncode, ConfigError, SchemeError
from qplug_core.keys import check_keys, check_values, list_of_names
from qplug_core.match import Matcher
from qplug_core.scheme import QuantScheme, TensorQuant

if TYPE_CHECKING:
    from qplug_core.source import Source

DIVISOR = "weight_global_scale"
GLOBALS = ("weight_scale_2", DIVISOR)
WEIGHTS = {
    "nvfp4": ("fp4_e2m1", "e4m3", (16, 32)),
    "mxfp4": ("fp4_e2m1", "e8m0", (32,)),
    "mxfp8": ("fp8_e4m3", "e8m0", (32,)),
}
"""Number type, scale type and group sizes of each method."""

DEFAULTS = {"nvfp4": "Wnvfp4Anvfp4", "mxfp4": "Wmxfp4A16", "mxfp8": "Wmxfp8Amxfp8_a:rule=ceil"}
"""What the name alone means to the engines: NVFP4 and MXFP8 quantize activations too, gpt-oss does not."""

LISTS = {"modules_to_not_convert": "", "ignored_layers": "exact", "ignore": "fnmatch", "exclude_modules": "fnmatch"}
"""Lists of modules that stay 16 bit, with their dialects; the first has one for each method."""

FIXED: dict[str, tuple[Any, ...]] = {
    "quant_method": (),
    "group_size": (),
    "weight_block_size": ([1, 32],),
    "activation_scheme": ("dynamic",),
    "fmt": ("e4m3",),
    "scale_fmt": ("ue8m0",),
    "global_scale": GLOBALS,
}
"""Keys that change the numbers, with the values that are understood."""

OWN = ("scheme", "layers", "kv_cache_scheme", "kv_cache_quant_algo")
METADATA = {"dequantize", "producer", "version", "quantizer"}
"""Keys that say who wrote the file, or how some engine is to run it."""


def parse(source: Source, method: str) -> QuantizationConfig:
    """Rules in the order in which they decide: ``layers``, lists of 16-bit modules, embeddings and lm_head, then all others.

    gpt-oss (headers with ``_blocks``, and ``mxfp4`` where there are no headers yet) quantizes its experts and nothing else.

    :raises ConfigError: for a key that is not understood, or that the headers contradict.
    """
    raw = source.quant_config or {}
    _check_keys(raw, method)
    inferred: list[str] = []
    opts = _options(raw, source, method, inferred)
    scheme = _scheme(raw, source, method, inferred)
    blocks = method == "mxfp4" and "scheme" not in raw and _has_blocks(source, inferred)
    layout = "mxfp4_blocks" if blocks else method
    _check_shapes(source, scheme, method)
    rules: list[Rule] = []
    layers = raw.get("layers") or {}
    if not isinstance(layers, dict):
        raise ConfigError(
            f"the {method} config says layers: {layers!r}; an object of names and schemes was needed, so correct it"
        )
    for name, text in layers.items():
        rules.append(Rule(Matcher(name, "exact"), _quant(_read(text, method, name), layout, opts), origin="layers"))
    ignored = _ignored(raw, method)
    rules += ignored
    if blocks:
        rules.append(
            Rule(Matcher("experts", "component"), _quant(scheme, layout, opts), origin="gpt-oss quantizes its experts")
        )
        rules.append(Rule(Matcher("", "all"), None, implicit=True, origin="gpt-oss quantizes nothing but its experts"))
    else:
        rules.append(Rule(Matcher("Embedding", "class"), None, implicit=True, origin="embeddings have no FP4 tensors"))
        if not _head_quantized(source, inferred):
            rules.append(
                Rule(Matcher("lm_head", "suffix"), None, implicit=True, origin="the producers leave lm_head at 16 bit")
            )
        rules.append(Rule(Matcher("", "all"), _quant(scheme, layout, opts), origin="quant_method"))
    metadata = {key: value for key, value in raw.items() if key in METADATA}
    producer = raw.get("producer")
    if isinstance(producer, dict):
        producer = f"{producer.get('name', '')} {producer.get('version', '')}".strip()
    return QuantizationConfig(
        method, rules, kv=_kv(raw, method, scheme), producer=str(producer or ""), inferred=inferred, metadata=metadata
    )


def write(layers: Mapping[str, LayerQuant | None], method: str) -> dict[str, Any]:
    """The config that says ``layers``: the commonest scheme, every other by name, and the modules that stay 16 bit.

    :raises CannotEncode: where layers are stored in different ways, or nothing is quantized.
    """
    quants = {name: quant for name, quant in layers.items() if quant is not None}
    if not quants:
        raise CannotEncode("no layer is quantized; write a 16-bit checkpoint without a quantization config")
    ways = sorted({(quant.layout, quant.opts) for quant in quants.values()})
    if len(ways) > 1:
        raise CannotEncode(
            f"layers stored as {ways[0]} and {ways[1]} were given; one {method} checkpoint has one way, so store all alike"
        )
    layout, opts = ways[0]
    plain = [name for name, quant in layers.items() if quant is None]
    common = Counter(quant.scheme for quant in quants.values()).most_common(1)[0][0]
    if layout == "mxfp4_blocks":
        others = [name for name in quants if "experts" not in name.split(".")]
        if others or any(quant.scheme != common for quant in quants.values()) or common.act is not None:
            raise CannotEncode(
                f"{others[0] if others else 'experts of several schemes'} was given for mxfp4_blocks; gpt-oss stores experts alone, "
                "with 16-bit activations, so store the model as mxfp4"
            )
        return {"quant_method": method, "modules_to_not_convert": plain}
    config: dict[str, Any] = {"quant_method": method, "scheme": str(common), "modules_to_not_convert": plain}
    config.update({key: value for key, value in opts if key == "global_scale"})
    named = {name: str(quant.scheme) for name, quant in quants.items() if quant.scheme != common}
    # The rule for lm_head is implicit, so a quantized one is named.
    named.update({name: str(q.scheme) for name, q in quants.items() if name.rsplit(".", 1)[-1] == "lm_head"})
    if named:
        config["layers"] = named
    return config


def problem(scheme: QuantScheme, method: str, layout: str = "") -> str:
    """What keeps ``scheme`` out of a method, as the end of a sentence, or an empty string."""
    part, act = scheme.weight, scheme.act
    dtype, scale_dtype, groups = WEIGHTS[method]
    if part is None or part.dtype != dtype or part.scale_dtype != scale_dtype or part.block not in {(1, g) for g in groups}:
        return f"{method} stores {dtype} with {scale_dtype} scales in groups of {' or '.join(map(str, groups))} columns"
    if scheme.act_order or scheme.sparsity:
        return f"{method} has no tensor for act order or sparsity"
    if layout == "mxfp4_blocks" and act is not None and act.dynamic is not True:
        return "gpt-oss files have no tensor for an activation scale"
    if act is not None and not _act_fits(act, method, part):
        return f"activations {act.dtype} with scales by {act.block} have no tensors in {method}"
    return ""


def _act_fits(act: TensorQuant, method: str, part: TensorQuant) -> bool:
    if method == "nvfp4" and act.dynamic == "local":
        return act.dtype == "fp4_e2m1" and act.block == part.block == (1, 16)
    if act.dtype == "fp8_e4m3" and act.scale_dtype == "float":
        return method != "mxfp8" and (act.block == (0, 0) if act.dynamic is False else act.dynamic is True)
    wanted = {"mxfp4": ("fp4_e2m1", "fp8_e4m3"), "mxfp8": ("fp8_e4m3",), "nvfp4": ()}[method]
    return act.dtype in wanted and act.scale_dtype == "e8m0" and act.block == (1, 32) and act.dynamic is True


def _check_keys(raw: Mapping[str, Any], method: str) -> None:
    check_keys(raw, (*FIXED, *LISTS, *OWN, *METADATA), f"the {method} config", "qplug-fp4")
    check_values(raw, {key: values for key, values in FIXED.items() if values}, f"the {method} config")
    groups = WEIGHTS[method][2]
    if (group := raw.get("group_size")) not in (None, *groups):
        raise ConfigError(
            f"the {method} config says group_size: {group!r}; {' or '.join(map(str, groups))} was needed, so correct it"
        )


def _read(text: Any, method: str, where: str) -> QuantScheme:
    try:
        scheme = QuantScheme.parse(text if isinstance(text, str) else "")
    except SchemeError as error:
        raise ConfigError(f"the {method} config says {where}: {text!r}; {error}") from None
    if reason := problem(scheme, method):
        raise ConfigError(f"the {method} config says {where}: {text!r}; {reason}, so correct it")
    return scheme


def _scheme(raw: Mapping[str, Any], source: Source, method: str, inferred: list[str]) -> QuantScheme:
    """``scheme``, or the default of the method: without activations where an NVFP4 file has no scale for them."""
    if raw.get("scheme"):
        scheme = _read(raw["scheme"], method, "scheme")
        if raw.get("group_size") and scheme.weight is not None and scheme.weight.block[1] != raw["group_size"]:
            raise ConfigError(
                f"the {method} config says scheme: {raw['scheme']!r} and group_size: {raw['group_size']}, which contradict each other; "
                "correct one"
            )
        return scheme
    scheme = QuantScheme.parse(DEFAULTS[method])
    if method == "nvfp4":
        static = any(name.endswith((".input_scale", ".input_global_scale")) for name in source.tensors)
        if source.tensors and not static:
            inferred.append("activations stay 16 bit: the file holds no input_scale and no input_global_scale")
            scheme = scheme.without_act()
        if raw.get("group_size") == 32:
            if scheme.act is not None:
                raise ConfigError(
                    "the nvfp4 config says group_size: 32 and the activations are quantized; which of FP8 or FP4 is not said, so add "
                    "scheme, for example 'Wnvfp4Afp8_g32_static'"
                )
            assert scheme.weight is not None
            scheme = replace(scheme, weight=replace(scheme.weight, block=(1, 32)))
    elif method == "mxfp8":
        inferred.append("activations are MXFP8 with exponents rounded up: what the name means where no scheme is said")
    return scheme


def _options(raw: Mapping[str, Any], source: Source, method: str, inferred: list[str]) -> tuple[tuple[str, Any], ...]:
    """How this file names its scales."""
    if method == "nvfp4":
        stored = {name.rsplit(".", 1)[-1] for name in source.tensors} & set(GLOBALS)
        said = raw.get("global_scale")
        if len(stored) > 1 or (said and stored and stored != {said}):
            raise ConfigError(
                f"the file holds {' and '.join(sorted(stored))}{f' and the config says global_scale: {said!r}' if said else ''}; one is a "
                "multiplier and one a divisor, so a checkpoint has one of them: quantize it again"
            )
        if DIVISOR in (said, *stored):
            if not said:
                inferred.append(f"global scales are divisors: the file holds {DIVISOR}")
            return (("global_scale", DIVISOR),)
    if method == "mxfp8" and any(name.endswith(".weight_scale_inv") for name in source.tensors):
        inferred.append("block scales are called weight_scale_inv: they multiply all the same")
        return (("scale_name", "weight_scale_inv"),)
    return ()


def _has_blocks(source: Source, inferred: list[str]) -> bool:
    if not source.tensors:
        inferred.append("no tensors are known yet: mxfp4 is taken to be the layout of gpt-oss")
        return True
    return any(name.endswith("_blocks") for name in source.tensors)


def _head_quantized(source: Source, inferred: list[str]) -> bool:
    info = next((source.tensors[n] for n in source.tensors if n == "lm_head.weight" or n.endswith(".lm_head.weight")), None)
    if info is None or info.dtype not in ("U8", "F8_E4M3"):
        return False
    inferred.append(f"lm_head is quantized: {info.name} is {info.dtype}")
    return True


def _check_shapes(source: Source, scheme: QuantScheme, method: str) -> None:
    """Refuse scales that are not one for each row and group: swizzled ones are padded to 128 rows and 4 columns."""
    assert scheme.weight is not None
    group = scheme.weight.block[1]
    for name, info in source.tensors.items():
        scales = source.tensors.get(f"{name}_scale")
        if not name.endswith(".weight") or scales is None or len(info.shape) != 2 or info.dtype not in ("U8", "F8_E4M3"):
            continue
        columns = info.shape[1] * (2 if info.dtype == "U8" else 1)
        wanted = (info.shape[0], -(-columns // group))
        padded = (-(-wanted[0] // 128) * 128, -(-wanted[1] // 4) * 4)
        if scales.shape == padded != wanted or (len(scales.shape) != 2 and scales.shape and scales.shape != (1,)):
            raise ConfigError(
                f"{scales.name} has shape {list(scales.shape)}, which is padded to the tiles of a kernel; {method} has {list(wanted)}, row "
                "by row, so export the checkpoint with linear scales"
            )


def _ignored(raw: Mapping[str, Any], method: str) -> list[Rule]:
    rules = []
    for key, dialect in LISTS.items():
        names = list_of_names(raw.get(key), f"the {method} config says {key}")
        rules += [Rule(_matcher(text, dialect, method), None, origin=key) for text in names]
    return rules


def _matcher(text: str, dialect: str, method: str) -> Matcher:
    if dialect == "exact":
        return Matcher(text, "exact")
    if dialect == "fnmatch" or method == "mxfp4":
        # gpt-oss means a module and all below it. At a dot: layers.1 is not layers.10.
        return Matcher(text.rstrip("*").rstrip(".") if text.endswith("*") and text.rstrip("*.") else text, "fnmatch")
    # transformers: from the start up to a module boundary, or the end of the name.
    return Matcher(rf"(?:{text})(?:\.|$)|(?:.*\.)?(?:{text})$", "regex")


def _quant(scheme: QuantScheme, layout: str, opts: Iterable[tuple[str, Any]]) -> LayerQuant:
    return LayerQuant(replace(scheme, kv=None), layout, tuple(opts))


def _kv(raw: Mapping[str, Any], method: str, scheme: QuantScheme) -> TensorQuant | None:
    said = raw.get("kv_cache_quant_algo") or raw.get("kv_cache_scheme")
    if not said:
        return scheme.kv
    as_fp8 = isinstance(said, dict) and (said.get("type"), said.get("num_bits"), bool(said.get("dynamic"))) == (
        "float",
        8,
        False,
    )
    if as_fp8 or (isinstance(said, str) and said.upper() == "FP8"):
        return TensorQuant("fp8_e4m3", (0, 0))
    raise ConfigError(
        f"the {method} config says {said!r} of the KV cache; FP8 by tensor is understood, so calibrate it again"
    )
