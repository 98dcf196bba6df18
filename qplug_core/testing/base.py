"""Cases of the conformance kit: every declaration, with every scheme that it names."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar

from ..decl import Declarations, FormatDecl, KernelDecl, QuantizerDecl
from ..device import Device, local_devices
from ..hookspecs import ENTRY_POINTS
from ..registry import Registry, _declared
from ..samples import schemes_of
from ..scheme import QuantScheme, TensorQuant

if TYPE_CHECKING:
    import pytest


@dataclass(frozen=True)
class FormatCase:
    """One format with one of its schemes."""

    decl: FormatDecl
    scheme: QuantScheme

    def __str__(self) -> str:
        return f"{self.decl.name}-{self.scheme}"


@dataclass(frozen=True)
class KernelCase:
    """One kernel with one of its schemes, on a device that it is declared for; ``runs``: this machine has that device."""

    decl: KernelDecl
    scheme: QuantScheme
    device: Device
    runs: bool

    def __str__(self) -> str:
        return f"{self.decl.name}-{self.scheme}" + ("" if self.runs else "-declared-only")


@dataclass(frozen=True)
class QuantizerCase:
    """One quantizer with one of its schemes."""

    decl: QuantizerDecl
    scheme: QuantScheme

    def __str__(self) -> str:
        return f"{self.decl.name}-{self.scheme}"


class Conformance:
    """Base of all checks: a subclass sets ``plugin``, and its tests are parametrized by what that plugin declares."""

    plugin: ClassVar[str] = ""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not cls.plugin:
            return
        for name in [name for name in dir(cls) if name.startswith("test_")]:
            parameters = inspect.signature(getattr(cls, name)).parameters
            if any(not make(cls.declarations()) for case, make in CASES.items() if case in parameters):
                # Nothing of this kind is declared, so there is nothing to test, which is not a skip.
                setattr(cls, name, None)

    @classmethod
    def module_name(cls) -> str:
        """The plugin's module."""
        found = [point.value for point in entry_points(group=ENTRY_POINTS) if point.name == cls.plugin]
        return found[0] if found else cls.plugin

    @classmethod
    def declarations(cls) -> Declarations:
        """What the plugin declares."""
        return _declared(importlib.import_module(cls.module_name()))[0]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test for each case."""
        for name, make in CASES.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, make(self.declarations()), ids=str)


def device_for(decl: KernelDecl) -> tuple[Device, bool]:
    """A device that a kernel is declared for, and whether this machine has it and what the kernel requires."""
    unmet = Registry([]).kernel_requirements(decl)
    for device in local_devices():
        if device.matches_any(decl.devices):
            return device, not unmet
    named = decl.devices[0].removesuffix("+").split("-")[0].replace("*", "00")
    generic = {"any": "cpu", "cuda": "sm_80", "rocm": "gfx942"}
    return Device.from_name(generic.get(named, named)), False


def _formats(declared: Declarations) -> list[FormatCase]:
    return [FormatCase(decl, scheme) for decl in declared.formats if decl.writes for scheme in schemes_of(decl.schemes)]


def _kernels(declared: Declarations) -> list[KernelCase]:
    cases = []
    for decl in declared.kernels:
        if decl.ops != ("kv_cache",):
            device, runs = device_for(decl)
            cases += [KernelCase(decl, scheme, device, runs) for scheme in schemes_of(decl.schemes) if _is_plain(scheme)]
    return cases


def _is_plain(scheme: QuantScheme) -> bool:
    """Whether weights can be drawn for it. A convolutional code has its own: the tests of the plugin hold its kernels."""
    return scheme.weight is None or scheme.weight.dtype != "ccq2"


def _quantizers(declared: Declarations) -> list[QuantizerCase]:
    """One activation scheme stands for all: a quantizer of weights passes it on."""
    cases: dict[tuple[str, TensorQuant | None, bool], QuantizerCase] = {}
    for decl in declared.quantizers:
        for scheme in schemes_of(decl.schemes):
            cases.setdefault((decl.name, scheme.weight, scheme.weight_only), QuantizerCase(decl, scheme))
    return list(cases.values())


CASES: dict[str, Callable[[Declarations], list[Any]]] = {
    "format_case": _formats,
    "kernel_case": _kernels,
    "running_case": lambda declared: [case for case in _kernels(declared) if case.runs],
    "quantizer_case": _quantizers,
}
"""Makers of cases by the name of the test argument that takes them."""


def load(impl: str) -> Any:
    """An instance of ``package.module:Class``."""
    module, _, name = impl.partition(":")
    return getattr(importlib.import_module(module), name)()
