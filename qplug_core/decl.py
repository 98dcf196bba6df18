"""Declarations: what a plugin offers, as torch-free data. Code is a dotted string until it is needed.

The capability matrix is computed from these and from nothing else.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

from .errors import PluginError, SchemeError
from .layer import OPS, Op
from .scheme import NUMBER_TYPES, QuantScheme, TensorQuant

API = "1.0"
"""Version of the contract. A plugin with another major version, or a newer minor one, is incompatible."""


class Rank(IntEnum):
    """How fast a kernel is expected to be where nothing was measured: the order of choice."""

    REFERENCE = 0
    PORTABLE = 10
    OPTIMIZED = 50
    TUNED = 100


REFERENCE, PORTABLE, OPTIMIZED, TUNED = Rank.REFERENCE, Rank.PORTABLE, Rank.OPTIMIZED, Rank.TUNED

Mode = Literal["native", "weight-only", "emulated", "reference"]


@dataclass(frozen=True)
class SchemePattern:
    """A set of schemes, written as a name with alternatives: ``"W{2,3,4,8}A16 g* sym|asym actorder"``.

    First the base with braces for alternatives; then conditions. Granularity of the weight: ``tensor``, ``channel``,
    ``g*`` or ``g32|g64|g128``, ``b*`` or ``b128x128``, joined by ``|``; left out means any. ``sym``, ``asym`` or ``sym|asym``;
    left out means symmetric. ``actorder`` and ``2:4`` are accepted only where written. Activations: ``a:token``,
    ``a:tensor``, ``a:g*``, with ``.static`` or ``.dynamic``, ``.asym`` and ``.outlier`` (any threshold), joined by ``|``;
    left out means per token, dynamic, symmetric.
    ``rules=127|127.5`` lists the activation rules beside the common one, ``rule=127.5`` the
    only ones. ``"*"`` alone is every scheme.
    """

    text: str

    def __post_init__(self) -> None:
        for base in self.parts()[0]:
            QuantScheme.parse(base)

    def matches(self, scheme: QuantScheme) -> bool:
        """True where the scheme is in the set. The KV cache is not looked at."""
        return self.mismatch(scheme) == ""

    def mismatch(self, scheme: QuantScheme) -> str:
        """The first thing about ``scheme`` that is outside of the set, or an empty string."""
        if self.text == "*":
            return ""
        bases, conditions = self.parts()
        if not any(_same_numbers(QuantScheme.parse(base), scheme) for base in bases):
            return f"scheme {scheme}"
        weight, act = scheme.weight, scheme.act
        if scheme.act_order and "actorder" not in conditions:
            return "act order"
        if scheme.sparsity and scheme.sparsity not in conditions:
            return "2:4 sparsity"
        if weight is not None:
            wanted = [c for c in conditions if _GRANULARITY.match(c)]
            if wanted and not any(_block_matches(word, weight) for c in wanted for word in c.split("|")):
                return f"weight scales by {weight.granularity} {weight.block}"
            signs = next((c.split("|") for c in conditions if c in ("sym", "asym", "sym|asym", "asym|sym")), ["sym"])
            if ("sym" if weight.symmetric else "asym") not in signs:
                return "symmetric weights" if weight.symmetric else "zero points"
        if act is not None:
            wanted = [word for c in conditions if c.startswith("a:") for word in c[2:].split("|")] or ["token"]
            if not any(_act_matches(word, act) for word in wanted):
                return f"activation scales {_describe_act(act)}"
            rules = next((["", *c[6:].split("|")] for c in conditions if c.startswith("rules=")), [""])
            if act.dynamic is True:  # A stored scale follows no rule.
                rules = next((c[5:].split("|") for c in conditions if c.startswith("rule=")), rules)
            if act.rule not in rules:
                return f"activation rule {act.rule}"
        return ""

    def example(self) -> list[str]:
        """The base names of the set, canonical, for reports; none where it is every scheme."""
        return [str(QuantScheme.parse(base)).split("_")[0] for base in self.parts()[0]]

    def parts(self) -> tuple[list[str], list[str]]:
        """Base names, alternatives written out, and conditions as they stand.

        :raises SchemeError: for a condition that is not one.
        """
        return _read(self.text)


_WORD = r"(?:tensor|channel|g\*|g\d+|b\*|b\d+x\d+)"
_GRANULARITY = re.compile(rf"^{_WORD}(?:\|{_WORD})*$")


@functools.cache
def _read(text: str) -> tuple[list[str], list[str]]:
    if text == "*":
        return [], []
    base, *conditions = text.split()
    for condition in conditions:
        known = condition in ("sym", "asym", "sym|asym", "asym|sym", "actorder", "2:4")
        if not (known or _GRANULARITY.match(condition) or condition.startswith(("a:", "rules=", "rule="))):
            raise SchemeError(f"condition {condition!r} of scheme pattern {text!r} is not understood")
    return _expand(base), conditions


def _expand(base: str) -> list[str]:
    """``W{2,4}A16`` as ``["W2A16", "W4A16"]``."""
    found = re.search(r"\{([^}]*)\}", base)
    if not found:
        return [base]
    return [b for word in found[1].split(",") for b in _expand(base[: found.start()] + word + base[found.end() :])]


def _same_numbers(base: QuantScheme, scheme: QuantScheme) -> bool:
    def key(part: TensorQuant | None) -> tuple[str, str] | None:
        return None if part is None else (part.dtype, part.scale_dtype)

    return key(base.weight) == key(scheme.weight) and key(base.act) == key(scheme.act)


def _block_matches(word: str, weight: TensorQuant) -> bool:
    if word in ("tensor", "channel"):
        return weight.granularity == word
    if word == "g*":
        return weight.granularity == "group"
    if word == "b*":
        return weight.granularity == "block"
    if word.startswith("g"):
        return weight.block == (1, int(word[1:]))
    rows, columns = word[1:].split("x")
    return weight.block == (int(rows), int(columns))


def _describe_act(act: TensorQuant) -> str:
    words = {(0, 0): "tensor", (1, 0): "token"}.get(act.block, f"g{act.block[1]}")
    words += ".local" if act.dynamic == "local" else ".dynamic" if act.dynamic else ".static"
    return words + ("" if act.symmetric else ".asym") + (f".outlier{act.outlier:g}" if act.outlier else "")


def _act_matches(word: str, act: TensorQuant) -> bool:
    unit, *flags = word.split(".")
    units = {(0, 0): "tensor", (1, 0): "token"}.get(act.block, f"g{act.block[1]}")
    if unit != units and not (unit == "g*" and act.block[1]):
        return False
    dynamic = "static" not in flags
    if "local" in flags:
        return act.dynamic == "local"
    signs = act.symmetric == ("asym" not in flags)
    return bool(act.dynamic) == dynamic and signs and bool(act.outlier) == ("outlier" in flags)


@dataclass(frozen=True)
class FormatDecl:
    """A checkpoint format, and the row that it has in the capability report.

    name
        What a user calls it: ``gptq``.
    detects
        Values of ``quant_method`` that this format claims, lower case.
    files
        Files beside the weights whose presence claims a checkpoint without ``quant_method`` (``smoothquant.ini``).
    suffixes
        Endings of tensor names whose presence claims a checkpoint without any config: ``.W_q``.
    opens
        Suffixes of weight files that core cannot read and this format opens itself: ``.gguf``.
    layouts
        Storage variants that its decoder knows; other formats may use them by name.
    schemes
        Patterns of all schemes that it stores.
    reference
        Patterns of those of its schemes whose weights have what a pattern cannot say and kernels of the scheme refuse, a shift or
        an opaque encoding: the capability report counts on the reference kernel for them.
    ops
        Operations whose weights it stores.
    writes
        True where ``encode`` exists.
    impl
        ``package.module:Class`` of a :class:`qplug_core.format.CheckpointFormat`.
    """

    name: str
    impl: str
    detects: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    opens: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
    reference: tuple[str, ...] = ()
    ops: tuple[Op, ...] = ("linear",)
    writes: bool = True
    summary: str = ""

    def __post_init__(self) -> None:
        _check_ops(self.name, self.ops)
        for text in (*self.schemes, *self.reference):
            SchemePattern(text)


@dataclass(frozen=True)
class KernelDecl:
    """A kernel.

    name
        ``plugin.backend_scheme``, as its file is called: ``gptq.triton_w4a16``.
    op, schemes, dtypes
        What it multiplies: operations, scheme patterns, activation dtypes.
    devices
        Patterns of :meth:`qplug_core.device.Device.matches`: ``cpu``, ``avx2``, ``sm_80+``, ``gfx942``.
    rank
        Expected speed where nothing was measured.
    mode
        ``native``: does what the scheme says on units that the device has for it; ``weight-only``: leaves activations
        at 16 bit though the scheme quantizes them; ``emulated``: quantizes activations, multiplies wider.
    requires
        Requirements that must be installed, ``triton>=3.6``, and programs, ``program:cc``.
    impl
        ``package.module:Class`` of a :class:`qplug_core.kernel.Kernel`.
    """

    name: str
    impl: str
    ops: tuple[Op, ...]
    schemes: tuple[str, ...]
    devices: tuple[str, ...]
    rank: int = Rank.OPTIMIZED
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    mode: Mode = "native"
    requires: tuple[str, ...] = ()
    summary: str = ""

    def __post_init__(self) -> None:
        _check_ops(self.name, self.ops)
        for text in self.schemes:
            SchemePattern(text)

    def pattern_for(self, scheme: QuantScheme) -> str:
        """What keeps ``scheme`` out of every pattern (of the closest one), or an empty string."""
        reasons = [SchemePattern(text).mismatch(scheme) for text in self.schemes]
        if "" in reasons:
            return ""
        closer = [r for r in reasons if not r.startswith("scheme ")]
        return (closer or reasons)[0]


@dataclass(frozen=True)
class QuantizerDecl:
    """An algorithm that makes a QuantWeight from a 16-bit weight.

    ``calibrated``: needs activation statistics, so it is offline only. ``impl``: a :class:`qplug_core.quantizer.Quantizer`.
    """

    name: str
    impl: str
    schemes: tuple[str, ...]
    calibrated: bool = False
    summary: str = ""

    def __post_init__(self) -> None:
        for text in self.schemes:
            SchemePattern(text)

    def makes(self, scheme: QuantScheme) -> bool:
        """True where the algorithm makes ``scheme``."""
        return any(SchemePattern(text).matches(scheme) for text in self.schemes)


@dataclass(frozen=True)
class ConfigDecl:
    """A QuantizationConfig with a QuantMethod of its own, for a method that does not fit the hub.

    ``detects`` and ``files`` as in :class:`FormatDecl`; ``impl``: a subclass of :class:`qplug_core.config.QuantizationConfig`
    with a classmethod ``parse(source)``.
    """

    name: str
    impl: str
    detects: tuple[str, ...]
    files: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
    ops: tuple[Op, ...] = ("linear",)
    summary: str = ""


@dataclass(frozen=True)
class Declarations:
    """Everything that one plugin declares."""

    formats: tuple[FormatDecl, ...] = ()
    kernels: tuple[KernelDecl, ...] = ()
    quantizers: tuple[QuantizerDecl, ...] = ()
    configs: tuple[ConfigDecl, ...] = field(default=())


def _check_ops(name: str, ops: tuple[Op, ...]) -> None:
    unknown = set(ops) - set(OPS)
    if unknown:
        raise PluginError(f"{name} declares the operation {sorted(unknown)[0]!r}; known are {', '.join(OPS)}")


__all__ = [
    "API",
    "NUMBER_TYPES",
    "OPTIMIZED",
    "PORTABLE",
    "REFERENCE",
    "TUNED",
    "ConfigDecl",
    "Declarations",
    "FormatDecl",
    "KernelDecl",
    "Mode",
    "QuantizerDecl",
    "Rank",
    "SchemePattern",
]
