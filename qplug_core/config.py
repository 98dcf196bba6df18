"""QuantizationConfig: what a format's ``parse`` returns. Which layer has which scheme, in which storage variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .layer import LayerSpec
from .match import Matcher
from .scheme import QuantScheme, TensorQuant

if TYPE_CHECKING:
    from .method import QuantMethod
    from .quant_plan import Decision


@dataclass(frozen=True)
class LayerQuant:
    """The quantization of one layer: its numerics, and how they are stored.

    ``layout`` names the storage variant (``gptq_v2``, ``pack-quantized``), which decides who decodes; ``opts`` are facts that
    its decoder needs and that are no numerics (``{"bits_packed_along": "N"}``).
    """

    scheme: QuantScheme
    layout: str
    opts: tuple[tuple[str, Any], ...] = ()

    def opt(self, name: str, default: Any = None) -> Any:
        """One option."""
        return dict(self.opts).get(name, default)


@dataclass
class Rule:
    """One line of a config: modules that a matcher means have ``quant``, or stay 16 bit where it is None.

    ``implicit`` rules come from the tool's habits, not from the file (``lm_head`` stays 16 bit), and may match nothing.
    """

    matcher: Matcher
    quant: LayerQuant | None
    implicit: bool = False
    origin: str = ""


@dataclass(frozen=True)
class ModuleName:
    """A module as rules see it: all the names it goes by, stored names first."""

    all_names: tuple[str, ...]
    module_class: str = "Linear"


@dataclass
class QuantizationConfig:
    """Ordered rules, first match wins; no match means 16 bit.

    method
        The ``quant_method`` that was found, or the format's name.
    producer
        What the file says of its maker, for provenance.
    kv
        Scheme of the KV cache, and the suffixes of its scales through :meth:`CheckpointFormat.kv_tensors`.
    inferred
        Facts that the config does not say, with what they were read from: shown by ``explain``.
    metadata
        Keys that change no number: listed, never refused.
    ignorable
        Exact suffixes of stored tensors that may be left unread, with the reason.
    """

    method: str
    rules: list[Rule]
    kv: TensorQuant | None = None
    producer: str = ""
    inferred: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    ignorable: dict[str, str] = field(default_factory=dict)

    def quant_for(self, module: ModuleName) -> LayerQuant | None:
        """The quantization of a module, or None for 16 bit. Counts the hit on the rule that decided."""
        for rule in self.rules:
            if rule.matcher.matches(module):
                rule.matcher.hits += 1
                return rule.quant
        return None

    def count_plain(self, module: ModuleName) -> None:
        """Count the rules that leave ``module``, which is no layer (a router, a norm), at 16 bit: they are not stale."""
        for rule in self.rules:
            if rule.quant is None and not rule.matcher.hits and rule.matcher.matches(module):
                rule.matcher.hits += 1

    def scheme_for(self, layer: LayerSpec) -> QuantScheme | None:
        """The scheme of a layer, or None for 16 bit."""
        quant = self.quant_for(module_name(layer))
        return None if quant is None else quant.scheme

    def get_quant_method(self, layer: LayerSpec, decision: Decision) -> QuantMethod | None:
        """The method that an engine holds for ``layer``, or None for core's :class:`~qplug_core.method.HubMethod`.

        A plugin whose method does not fit the hub returns its own.
        """
        return None

    def stale(self) -> list[Rule]:
        """Rules of the file that meant no module."""
        return [rule for rule in self.rules if not rule.implicit and not rule.matcher.hits]


def module_name(layer: LayerSpec, stored: Sequence[str] = ()) -> ModuleName:
    """All names of a layer: where it is stored, what the engine calls it, and further names that the engine gave."""
    ordered = dict.fromkeys([*stored, layer.name, *layer.names])
    return ModuleName(tuple(ordered), layer.module_class)
