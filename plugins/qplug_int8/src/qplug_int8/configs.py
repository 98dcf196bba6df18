"""Rules of a checkpoint whose config says little: a few keys, a list of names, and what the headers show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from qplug_core.config import LayerQuant, Rule
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.keys import check_values, list_of_names, says_nothing, take
from qplug_core.match import Matcher
from qplug_core.source import Source, TensorInfo


def read_keys(
    raw: Mapping[str, Any],
    name: str,
    known: Mapping[str, tuple[Any, ...]],
    free: tuple[str, ...] = (),
    metadata: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The keys that say something.

    ``known``: keys with the values that are understood; ``free``: keys whose value the caller reads; ``metadata``: keys that
    change no number. Empty values say nothing.

    :raises ConfigError: for another key, or another value.
    """
    said = {key: value for key, value in raw.items() if not says_nothing(value)}
    values = take(said, dict.fromkeys((*known, *free)), metadata, f"the {name} config", "qplug-int8")
    check_values(said, known, f"the {name} config")
    return values


def ignored(entries: Any, name: str) -> list[Rule]:
    """One rule for each name (exact) or pattern (``re:``, matched from the start) of a list.

    :raises ConfigError: for anything but a list of strings.
    """
    return [
        Rule(Matcher(text[3:], "regex") if text.startswith("re:") else Matcher(text, "exact"), None, origin="ignore")
        for text in list_of_names(entries, f"the {name} config says ignore")
    ]


def modules(source: Source, suffix: str, dtypes: tuple[str, ...] = ("I8",)) -> dict[str, TensorInfo]:
    """Every module that has a tensor ``<module>.<suffix>`` of one of ``dtypes``."""
    end = f".{suffix}"
    return {
        name.removesuffix(end): info for name, info in source.tensors.items() if name.endswith(end) and info.dtype in dtypes
    }


def require_codes(source: Source, found: Mapping[str, Any], name: str, needed: str) -> None:
    """Refuse a file that is known and holds no int8 weight: it would run at 16 bit under the name of a quantized model.

    :raises ConfigError: where ``found`` is empty and there are headers.
    """
    if source.tensors and not found:
        raise ConfigError(
            f"{source.path} is called a {name} checkpoint and none of its {len(source.tensors)} tensors is {needed}; quantize it "
            "first, or remove what calls it quantized to load it at 16 bit"
        )


def rules_of(found: Mapping[str, LayerQuant], default: LayerQuant, first: list[Rule]) -> list[Rule]:
    """``first``, then one rule for all layers (the commonest of ``found``, or ``default``), with exceptions by name before it.

    Embeddings and the output embedding stay 16 bit unless the headers show codes for them.
    """
    common = Counter(found.values()).most_common(1)[0][0] if found else default
    rules = list(first)
    for module, quant in found.items():
        if quant != common or module.rsplit(".", 1)[-1] == "lm_head":
            rules.append(Rule(Matcher(module, "exact"), quant, implicit=True, origin="its tensors"))
    rules.append(Rule(Matcher("Embedding", "class"), None, implicit=True, origin="no engine reads quantized embeddings"))
    rules.append(Rule(Matcher("lm_head", "suffix"), None, implicit=True, origin="no engine reads a quantized lm_head"))
    rules.append(Rule(Matcher("", "all"), common, origin="the format"))
    return rules


def written(method: str, layers: Mapping[str, LayerQuant | None], **more: Any) -> dict[str, Any]:
    """The config that names ``method`` and every layer that stays 16 bit.

    :raises CannotEncode: where no layer is quantized.
    """
    if not any(layers.values()):
        raise CannotEncode("no layer is quantized; write a 16-bit checkpoint without a quantization config")
    return {"quant_method": method, **more, "ignore": [name for name, quant in layers.items() if quant is None]}
