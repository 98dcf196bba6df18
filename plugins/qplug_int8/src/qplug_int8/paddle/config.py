"""FastDeploy's ``quantization_config``: read and written.

FastDeploy chooses by the kind of a layer, never by its name: experts, vision experts, attention caches, and all other
linear layers ("dense"). What it never quantizes is an implicit rule here. Two keys are qplug's: ``weight_layout`` (the order of
weight-only codes, which FastDeploy takes from the GPU it runs on) and ``ignore`` (layers left at 16 bit).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qplug_core.axes import FLOATS
from qplug_core.config import LayerQuant, QuantizationConfig, Rule
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.keys import list_of_names, says_nothing, take
from qplug_core.match import Matcher
from qplug_core.paddle import orient

from .types import ORDERS, TYPES, cache, layer_quant
from .wint2_config import wint2_rules

if TYPE_CHECKING:
    from qplug_core.source import Source

COMMON: dict[str, Any] = {
    "quantization": None,
    "is_quantized": None,
    "is_moe_quantized": None,
    "weight_layout": None,
    "ignore": [],
}
MIX: dict[str, Any] = {
    "dense_quant_type": None, "moe_quant_type": None, "kv_cache_quant_type": None, "image_moe_quant_type": None,
    "is_channel_wise": False, "has_zero_point": False, "is_permuted": True, "moe_dynamic_quant": False,
}  # fmt: skip
KNOWN: dict[str, dict[str, Any]] = {
    "mix_quant": MIX,
    "wint2": {
        "dense_quant_type": None, "dense_quant_config": None, "dense_quant_granularity": "per_channel",
        "moe_quant_type": None, "moe_quant_config": {},
    },
    "weight_only": {"algo": None},
    "w4a8": {"is_permuted": True},
}  # fmt: skip
"""Keys of each ``quantization`` beside the common ones, with their defaults."""
METADATA = ("quant_method", "quantization_type", "producer", "version", "hadamard_block_size")
"""Keys that change no number here: the Hadamard block is of types that are refused or another plugin's."""

NEVER = (
    (Matcher("Embedding", "class"), "FastDeploy quantizes no embedding"),
    (Matcher("lm_head", "suffix"), "FastDeploy quantizes no lm_head"),
    (Matcher("gate", "suffix"), "FastDeploy keeps routers in float32"),
    (Matcher("eh_proj", "component"), "FastDeploy keeps the projection of its draft layers at 16 bit"),
)
EXPERTS = r"(^|\.)experts\."


def parse(source: Source) -> QuantizationConfig:
    """Rules in the order in which they decide: ``ignore``, what FastDeploy never quantizes, vision experts, experts, the rest.

    The orientation of the codes, and whether there are any, is read from the headers where the config does not say it.

    :raises ConfigError: for unknown keys and types, and for keys that contradict each other or the headers.
    """
    raw = dict(source.quant_config or {})
    method = str(raw.get("quantization") or raw.get("quant_method") or "").lower()
    values = take(raw, {**COMMON, **KNOWN.get(method, {})}, METADATA, f"the FastDeploy config of {method}", "qplug-int8")
    inferred = [said for said in [orient(source)] if said]
    dense, moe = _quantized(source, values, inferred)
    ignore = list_of_names(values["ignore"], "the FastDeploy config says ignore")
    rules = [Rule(Matcher(name, "exact"), None, origin="ignore") for name in ignore]
    rules += [Rule(Matcher(m.text, m.dialect), None, implicit=True, origin=why) for m, why in NEVER]
    kv = None
    if method == "mix_quant" and (kind := values["kv_cache_quant_type"]) is not None:
        kv = cache(f"{kind}_zp" if values["has_zero_point"] and "zp" not in str(kind) else str(kind))
    if dense or moe:
        order = _order(source, values["weight_layout"], inferred)
        experts, rest = _types(method, source, values, order, inferred)
        rules += [Rule(r.matcher, r.quant if moe else None, r.implicit, r.origin) for r in experts]
        rules.append(Rule(Matcher("", "all"), rest if dense else None, implicit=bool(experts), origin="dense layers"))
    metadata = {key: value for key, value in raw.items() if key in METADATA or says_nothing(value)}
    return QuantizationConfig("fastdeploy", rules, kv=kv, producer="FastDeploy", inferred=inferred, metadata=metadata)


def kv_tensors(attention: str) -> dict[str, str]:
    """Stored names of the largest magnitudes of one attention module's keys and values."""
    return {
        "k_scale": f"{attention}.cachek_matmul.activation_scale",
        "v_scale": f"{attention}.cachev_matmul.activation_scale",
    }


def _types(
    method: str, source: Source, values: Mapping[str, Any], order: str, inferred: list[str]
) -> tuple[list[Rule], LayerQuant | None]:
    """Rules of the experts, and the type of all other layers."""
    if method == "mix_quant":
        return _mixed(source, values, order, inferred)
    if method == "wint2":
        return wint2_rules(values, source, order, inferred)
    return _single(method, values, order)


def _quantized(source: Source, values: Mapping[str, Any], inferred: list[str]) -> tuple[bool, bool]:
    """Whether dense layers and experts are stored in low bits, by FastDeploy's own order of asking.

    :raises ConfigError: where the flags say no and the file has codes.
    """
    stored = any(name.endswith(".quant_weight") for name in source.tensors)
    flag = True if source.config.get("is_quantized") else values["is_quantized"]
    if flag is not None:
        dense = moe = bool(flag)
    elif values["is_moe_quantized"] is not None:
        dense, moe = False, bool(values["is_moe_quantized"])
    elif values.get("kv_cache_quant_type") is None:
        dense = moe = True
    else:
        dense = moe = stored
        inferred.append(
            f"no flag says whether weights are quantized: {'they' if stored else 'none'} are, by the stored names"
        )
    if not dense and not moe:
        if stored:
            raise ConfigError(
                "the config says is_quantized: false and the file has quant_weight tensors; correct the flag, or fetch the file again"
            )
        inferred.append(
            f"weights are 16 bit: FastDeploy makes them {values['quantization']} at load, qplug leaves them as they are"
        )
    return dense, moe


def _order(source: Source, said: Any, inferred: list[str]) -> str:
    """Ending of the weight-only layouts: as the config says, else by the shapes of the stored codes.

    :raises ConfigError: for an unknown order, and for shapes of both orientations.
    """
    if said is not None:
        if said not in ORDERS:
            raise ConfigError(
                f"the config says weight_layout: {said!r}; one of {', '.join(ORDERS)} was needed, so correct it"
            )
        return ORDERS[said]
    votes: dict[str, str] = {}
    for name, scale in source.tensors.items():
        module = name.removesuffix(".weight_scale")
        codes = source.tensors.get(f"{module}.quant_weight")
        # Other types have the same names: W4A8 an activation scale, WINT2 scales in bytes, FP8 scales by block, WINT2.5 words.
        other = f"{module}.activation_scale" in source.tensors or scale.dtype not in FLOATS
        if module == name or codes is None or other or codes.dtype not in ("I8", "U8") or len(codes.shape) != 2:
            continue
        n = math.prod(scale.shape)
        rows, columns = codes.shape
        by_row, by_column = rows in (n, n / 2), columns == n
        if by_row != by_column and n in scale.shape:
            votes.setdefault("" if by_row else "_kn", name)
    if len(votes) == 2:
        raise ConfigError(
            f"{votes['']} belongs to codes [N, K] and {votes['_kn']} to codes [K, N]; one orientation was needed, so say weight_layout, or "
            "fetch the files again"
        )
    if "_kn" in votes:
        inferred.append(
            f"codes are [K, N], by the shape beside {votes['_kn']}: taken as Paddle packs them before it permutes"
        )
        return "_kn"
    seen = f"by the shape beside {votes['']}" if votes else "as no shape says otherwise"
    inferred.append(f"codes are [N, K], {seen}: taken in the order of sm_75 to sm_90, which FastDeploy writes on these GPUs")
    return ""


def _mixed(source: Source, values: Mapping[str, Any], order: str, inferred: list[str]) -> tuple[list[Rule], LayerQuant]:
    """MixQuant: each kind of layer has its key."""
    if values["moe_dynamic_quant"]:
        raise ConfigError(
            "the config says moe_dynamic_quant, which is of w4afp8 alone; that type stays unread, so quantize the 16-bit checkpoint to "
            "another type, such as wint4"
        )
    for key in ("dense_quant_type", "moe_quant_type"):
        if not isinstance(values[key], str):
            raise ConfigError(
                f"the mix_quant config says {key}: {values[key]!r}; one of {', '.join(TYPES)} was needed, so add it"
            )
    permuted = bool(values["is_permuted"])
    dense = layer_quant(values["dense_quant_type"], "dense_quant_type", experts=False, order=order)
    image = values["image_moe_quant_type"] or values["moe_quant_type"]
    rules: list[Rule] = []
    if image != values["moe_quant_type"]:
        quant = layer_quant(image, "image_moe_quant_type", experts=True, order=order, permuted=permuted)
        counts = source.config.get("moe_num_experts")
        if isinstance(counts, list) and len(counts) == 2:
            ids = "|".join(str(i) for i in range(counts[0], sum(counts)))
            rules.append(Rule(Matcher(rf"{EXPERTS}({ids})\.", "search"), quant, origin="image_moe_quant_type"))
        else:
            inferred.append(
                "image_moe_quant_type is said and moe_num_experts has no second number: there are no vision experts"
            )
    if values["moe_quant_type"] == "wint2":
        wint2, _ = wint2_rules({"moe_quant_config": {}}, source, order, inferred)
        return [*rules, *wint2], dense
    quant = layer_quant(values["moe_quant_type"], "moe_quant_type", experts=True, order=order, permuted=permuted)
    # A dense model has this key too, and no experts.
    rules.append(Rule(Matcher(EXPERTS, "search"), quant, implicit=True, origin="moe_quant_type"))
    return rules, dense


def _single(method: str, values: Mapping[str, Any], order: str) -> tuple[list[Rule], LayerQuant | None]:
    """One type for all layers, or for the experts alone where no other layer has it."""
    if method == "weight_only":
        method = str(values["algo"])
        if method not in ("weight_only_int8", "weight_only_int4"):
            raise ConfigError(
                f"the weight_only config says algo: {values['algo']!r}; weight_only_int8 or weight_only_int4 was needed, so correct it"
            )
    quant = layer_quant(method, "quantization", True, order, bool(values.get("is_permuted", True)))
    if method == "w4a8":
        return [Rule(Matcher(EXPERTS, "search"), quant, origin="quantization")], None
    return [], quant


def write(layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
    """The config that says ``layers``.

    :raises CannotEncode: where it has no place for them: two types among the experts, or among the others.
    """
    found: dict[bool, str] = {}
    ignore, orders = [], set()
    for name, quant in layers.items():
        never = name.rsplit(".", 1)[-1] in ("lm_head", "gate", "embed_tokens")
        if quant is None:
            ignore += [] if never else [name]
            continue
        experts = re.search(EXPERTS, name) is not None
        kind, orders_ = quant.layout[:5], quant.layout[5:]
        orders.add(orders_)
        if never or found.setdefault(experts, kind) != kind or not kind.startswith("wint"):
            raise CannotEncode(
                f"{name} was given as {quant.scheme}; FastDeploy has one type for all experts and one for all other linear layers, and none "
                "for lm_head, so quantize evenly or write compressed-tensors"
            )
    if not found:
        raise CannotEncode("no layer is quantized; write a 16-bit checkpoint without a quantization config")
    if len(orders) > 1:
        raise CannotEncode(
            "layers in several orders of codes were given; one checkpoint has one weight_layout, so write one order"
        )
    config: dict[str, Any] = {"quantization": next(iter(found.values())), "is_quantized": True}
    if len(set(found.values())) > 1:
        config = {"quantization": "mix_quant", "is_quantized": True}
        config |= {"dense_quant_type": found[False], "moe_quant_type": found[True]}
    config["weight_layout"] = next(said for said, ending in ORDERS.items() if ending == orders.copy().pop())
    if ignore:
        config["ignore"] = ignore
    return config
