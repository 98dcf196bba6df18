"""Registry: which plugins are installed, what each declares, and what is wrong with those that cannot be used.

Discovery imports the plugins' declarations and no torch. One bad plugin is one bad row; nothing depends on install order.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import pluggy

from . import builtin, hookspecs
from .decl import API, ConfigDecl, Declarations, FormatDecl, KernelDecl, QuantizerDecl
from .device import check_pattern
from .errors import PluginError, QplugError
from .settings import CORE, Settings
from .support import Refusal

if TYPE_CHECKING:
    from .layer import LayerSpec
    from .quant_plan import Decision

State = Literal["ready", "blocked", "incompatible", "broken"]
Decl = FormatDecl | KernelDecl | QuantizerDecl | ConfigDecl
D = TypeVar("D", FormatDecl, KernelDecl, QuantizerDecl, ConfigDecl)

_HOOKS: dict[str, tuple[str, type[Decl], str]] = {
    "qplug_formats": ("formats", FormatDecl, "parse"),
    "qplug_kernels": ("kernels", KernelDecl, "supports"),
    "qplug_quantizers": ("quantizers", QuantizerDecl, "quantize"),
    "qplug_quantization_configs": ("configs", ConfigDecl, "parse"),
}
"""Hook: field of Declarations, type of one declaration, and a method that its implementation must have."""


@dataclass(frozen=True)
class PluginRow:
    """One installed plugin.

    state
        ``ready``; ``blocked`` by the user; ``incompatible`` with this version of the contract; ``broken``: its import or
        a hook raised, or it declares nonsense.
    module
        Dotted name of its declarations.
    traceback
        Of what it raised, where it is broken.
    """

    name: str
    distribution: str
    version: str
    api: str
    state: State
    reason: str = ""
    traceback: str = ""
    module: str = ""
    declarations: Declarations = field(default_factory=Declarations)
    observers: tuple[Callable[..., object], ...] = ()

    def to_json(self) -> dict[str, str]:
        """The row of ``qplug list-methods --json``."""
        return {key: getattr(self, key) for key in ("name", "distribution", "version", "api", "state", "reason")}


@dataclass(frozen=True)
class Entry(Generic[D]):
    """A declaration and the plugin that made it."""

    decl: D
    plugin: PluginRow


@dataclass(frozen=True)
class Conflict:
    """A name that several distributions claim, which nobody may use until it is pinned."""

    kind: str
    name: str
    distributions: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"the {self.kind} {self.name!r} is claimed by the distributions {' and '.join(self.distributions)}; uninstall one, or pin "
            f'it in qplug.toml: [plugins] pin = {{"{self.name}" = "{self.distributions[0]}"}}'
        )


@dataclass
class Registry:
    """All plugins and all that they declare, each list sorted by name."""

    plugins: list[PluginRow]
    formats: list[Entry[FormatDecl]] = field(default_factory=list)
    kernels: list[Entry[KernelDecl]] = field(default_factory=list)
    quantizers: list[Entry[QuantizerDecl]] = field(default_factory=list)
    configs: list[Entry[ConfigDecl]] = field(default_factory=list)
    conflicts: list[Conflict] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    """Tracebacks of implementations that could not be imported, by declared name."""
    _loaded: dict[tuple[type, str, str], Any] = field(default_factory=dict, repr=False)

    @classmethod
    def discover(cls, environ: Mapping[str, str] | None = None, settings: Settings | None = None) -> Registry:
        """Look at every installed plugin.

        :raises UsageError: where the user's settings name what is not installed. Plugins raise nothing: they become rows.
        """
        environ = os.environ if environ is None else environ
        settings = Settings.read(environ) if settings is None else settings
        points = sorted(entry_points(group=hookspecs.ENTRY_POINTS), key=lambda p: (p.name, _distribution(p)[0], p.value))
        settings.check((p.name for p in points), (_distribution(p)[0] for p in points))
        rows = [_core()]
        for point in points:
            others = {_distribution(p)[0] for p in points if p.name == point.name} | (
                {"qplug-core"} if point.name == CORE else set()
            )
            rows.append(_look_at(point, settings, others))
        registry = cls(rows)
        registry._collect(settings.pin)
        return registry

    def _collect(self, pin: Mapping[str, str]) -> None:
        """Sort declarations into lists; leave out what a pin gives to another; note what several claim."""
        claims: dict[tuple[str, str], set[str]] = {}
        for row in self.plugins:
            for field_name, _, _ in _HOOKS.values():
                for decl in getattr(row.declarations, field_name):
                    for claim in _claims(decl):
                        claims.setdefault(claim, set()).add(row.distribution)
        lost = {
            (claim, owner)
            for claim, owners in claims.items()
            for owner in owners
            if len(owners) > 1 and pin.get(claim[1]) in owners and owner != pin[claim[1]]
        }
        for row in self.plugins:
            for field_name, _, _ in _HOOKS.values():
                for decl in getattr(row.declarations, field_name):
                    if not any((claim, row.distribution) in lost for claim in _claims(decl)):
                        getattr(self, field_name).append(Entry(decl, row))
        for field_name, _, _ in _HOOKS.values():
            getattr(self, field_name).sort(key=lambda entry: (entry.decl.name, entry.plugin.distribution))
        for (kind, name), owners in sorted(claims.items()):
            left = sorted(owner for owner in owners if ((kind, name), owner) not in lost)
            if len(left) > 1:
                self.conflicts.append(Conflict(kind, name, tuple(left)))

    def check(self, kind: str, name: str) -> None:
        """Check that at most one distribution claims a name; ``kind`` is format, quant_method, layout, kernel or quantizer.

        :raises PluginError: naming all that do.
        """
        for conflict in self.conflicts:
            if (conflict.kind, conflict.name) == (kind, name):
                raise PluginError(str(conflict))

    def format(self, name: str) -> Entry[FormatDecl]:
        """The format called ``name``.

        :raises PluginError: where there is none, or several.
        """
        return self._find("format", name, self.formats, lambda decl: decl.name == name)

    def format_for_method(self, quant_method: str) -> Entry[FormatDecl] | Entry[ConfigDecl]:
        """Who reads checkpoints with this ``quant_method`` (any case).

        :raises PluginError: where nobody does, or several.
        """
        wanted = quant_method.lower()
        both: list[Any] = [*self.formats, *self.configs]
        return self._find("quant_method", wanted, both, lambda decl: wanted in decl.detects)

    def layout(self, name: str) -> Entry[FormatDecl]:
        """The format that decodes the layout called ``name``.

        :raises PluginError: where there is none, or several.
        """
        return self._find("layout", name, self.formats, lambda decl: name in decl.layouts)

    def kernel(self, name: str) -> Entry[KernelDecl]:
        """The kernel called ``name``.

        :raises PluginError: where there is none, or several.
        """
        return self._find("kernel", name, self.kernels, lambda decl: decl.name == name)

    def quantizer(self, name: str) -> Entry[QuantizerDecl]:
        """The quantizer called ``name``.

        :raises PluginError: where there is none, or several.
        """
        return self._find("quantizer", name, self.quantizers, lambda decl: decl.name == name)

    def _find(self, kind: str, name: str, entries: list[Entry[D]], wanted: Callable[[D], bool]) -> Entry[D]:
        self.check(kind, name)
        for entry in entries:
            if wanted(entry.decl):
                return entry
        known = sorted({n for e in entries for k, n in _claims(e.decl) if k == kind})
        bad = [f"{row.name} is {row.state} ({row.reason})" for row in self.plugins if row.state != "ready"]
        raise PluginError(
            f"no plugin provides the {kind} {name!r}; installed ones provide {', '.join(known) or 'none'}"
            + (f"; not in use: {'; '.join(bad)}" if bad else "")
            + "; install a plugin for it, or see 'qplug doctor'"
        )

    def load(self, decl: Decl) -> Any:
        """The implementation of a declaration, imported and instantiated once (a class, for a :class:`ConfigDecl`).

        :raises PluginError: where it cannot be; the traceback is kept in ``failures``.
        """
        for kind, name in _claims(decl):
            self.check(kind, name)
        key = (type(decl), decl.name, decl.impl)
        if key not in self._loaded:
            try:
                self._loaded[key] = _instantiate(decl)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                self.failures[decl.name] = traceback.format_exc()
                self._loaded[key] = PluginError(
                    f"{decl.name} cannot be used: importing {decl.impl} gave {_said(error)}; see 'qplug doctor --verbose'"
                )
        found = self._loaded[key]
        if isinstance(found, PluginError):
            raise found
        return found

    def load_refusal(self, decl: KernelDecl) -> Refusal | None:
        """Why the implementation of a kernel cannot be loaded, as data; None where it can."""
        try:
            self.load(decl)
        except PluginError as error:
            return Refusal("import", str(error), "an implementation that loads", "see 'qplug doctor --verbose'")
        return None

    def kernel_requirements(self, decl: KernelDecl) -> list[Refusal]:
        """Every requirement of a kernel that this environment lacks, without importing the kernel."""
        return [refusal for text in decl.requires if (refusal := _unmet(text)) is not None]

    @property
    def observers(self) -> list[Callable[..., object]]:
        """Implementations of ``qplug_layer_ready`` of all ready plugins."""
        return [observer for row in self.plugins for observer in row.observers]

    def layer_ready(self, layer: LayerSpec, decision: Decision) -> None:
        """Tell every observer. One that raises is warned of, and the others are told all the same."""
        for observer in self.observers:
            try:
                observer(layer=layer, decision=decision)
            except Exception as error:
                warnings.warn(f"observer {observer!r} raised {_said(error)} at {layer.name}", RuntimeWarning, stacklevel=2)


@functools.cache
def get_registry() -> Registry:
    """The registry of this process: discovered once."""
    return Registry.discover()


def _distribution(point: EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution that an entry point came from."""
    dist = point.dist
    return ("unknown", "unknown") if dist is None else (dist.name or "unknown", dist.version or "unknown")


def _core() -> PluginRow:
    try:
        found = version("qplug-core")
    except PackageNotFoundError:
        found = "source tree"
    declarations, observers = _declared(builtin)
    return PluginRow(
        CORE, "qplug-core", found, API, "ready", module=builtin.__name__, declarations=declarations, observers=observers
    )


def _look_at(point: EntryPoint, settings: Settings, distributions: set[str]) -> PluginRow:
    """The row of one entry point. Never raises, except for Ctrl-C."""
    name, (distribution, number) = point.name, _distribution(point)

    def row(state: State, reason: str = "", api: str = "", **more: Any) -> PluginRow:
        return PluginRow(name, distribution, number, api, state, reason, module=point.value, **more)

    if reason := settings.refuses(name):
        return row("blocked", reason)
    if len(distributions) > 1:
        pinned = settings.pin.get(name)
        if name == CORE or pinned not in distributions:
            return row("broken", str(Conflict("plugin name", name, tuple(sorted(distributions)))))
        if pinned != distribution:
            return row("blocked", f"the plugin name {name!r} is pinned to {pinned}")
    try:
        # A library that greets on import would spoil the JSON of whoever reads stdout.
        with contextlib.redirect_stdout(sys.stderr):
            module = point.load()
            api = getattr(module, "API", None)
            if reason := _api_reason(api):
                return row("incompatible", reason, str(api or ""))
            declarations, observers = _declared(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return row("broken", _said(error), traceback=traceback.format_exc())
    return row("ready", api=str(api), declarations=declarations, observers=observers)


def _api_reason(api: object) -> str:
    """Why a plugin of this contract version cannot be used, or an empty string."""
    if not isinstance(api, str) or not re.fullmatch(r"\d+\.\d+", api):
        return f"API is {api!r}; the version of the contract was needed, such as API = {API!r}"
    (major, minor), (our_major, our_minor) = (map(int, text.split(".")) for text in (api, API))
    if major != our_major:
        return f"needs contract {api}; this core has {API}; install the version of the plugin for {our_major}.x"
    if minor > our_minor:
        return f"needs contract {api}; this core has {API}; upgrade qplug-core"
    return ""


def _declared(module: Any) -> tuple[Declarations, tuple[Callable[..., object], ...]]:
    """What a plugin module declares, checked, and its observers.

    A manager for each plugin, and each implementation called by itself: pluggy isolates neither.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(module)
    manager.check_pending()
    found: dict[str, tuple[Decl, ...]] = {}
    for hook, (field_name, kind, _) in _HOOKS.items():
        for impl in getattr(manager.hook, hook).get_hookimpls():
            result = impl.function()
            if not isinstance(result, (list, tuple)):
                raise PluginError(f"{hook} returned {type(result).__name__}; a list of {kind.__name__} was needed")
            for decl in result:
                _check_decl(hook, kind, decl)
            found[field_name] = tuple(result)
    claimed = [claim for decls in found.values() for decl in decls for claim in set(_claims(decl))]
    for kind_name, name in claimed:
        if claimed.count((kind_name, name)) > 1:
            raise PluginError(f"the {kind_name} {name!r} is declared twice; each name must be declared once")
    observers = [_adapt(impl) for impl in manager.hook.qplug_layer_ready.get_hookimpls()]
    return Declarations(**found), tuple(observers)  # type: ignore[arg-type]


def _check_decl(hook: str, kind: type[Decl], decl: object) -> None:
    if not isinstance(decl, kind):
        raise PluginError(f"{hook} returned a list with {decl!r}; {kind.__name__} was needed")
    if not re.fullmatch(r"[\w.]+:\w+", decl.impl):
        raise PluginError(f"{decl.name} declares impl={decl.impl!r}; 'package.module:Class' was needed")
    if isinstance(decl, KernelDecl):
        if not re.fullmatch(r"[\w-]+\.\w+", decl.name):
            raise PluginError(f"the kernel name {decl.name!r} was found; 'plugin.backend_scheme' was needed")
        for pattern in decl.devices:
            check_pattern(pattern)


def _adapt(impl: pluggy.HookImpl) -> Callable[..., object]:
    """An observer that is given only the arguments that it names, as pluggy does."""

    @functools.wraps(impl.function)
    def observer(**arguments: object) -> object:
        return impl.function(*[arguments[name] for name in impl.argnames])

    return observer


def _claims(decl: Decl) -> Iterator[tuple[str, str]]:
    """Every ``(kind, name)`` that a declaration takes for itself."""
    match decl:
        case FormatDecl():
            yield "format", decl.name
            yield from (("quant_method", name) for name in decl.detects)
            yield from (("layout", name) for name in decl.layouts)
            yield from (("file suffix", name) for name in decl.opens)
        case ConfigDecl():
            yield "format", decl.name
            yield from (("quant_method", name) for name in decl.detects)
        case KernelDecl():
            yield "kernel", decl.name
        case QuantizerDecl():
            yield "quantizer", decl.name


def _instantiate(decl: Decl) -> Any:
    module, _, attribute = decl.impl.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    instance = found if isinstance(decl, ConfigDecl) else found()
    method = next(method for _, kind, method in _HOOKS.values() if isinstance(decl, kind))
    if not callable(getattr(instance, method, None)):
        raise PluginError(f"{attribute} has no {method}(), which the contract asks for")
    return instance


def _unmet(text: str) -> Refusal | None:
    """What is missing for one requirement: ``triton>=3.6`` or ``program:cc``."""
    if text.startswith("program:"):
        program = text.removeprefix("program:")
        if shutil.which(program):
            return None
        return Refusal("requires", f"no program {program!r} on PATH", f"the program {program}", f"install {program}")
    from packaging.requirements import Requirement

    requirement = Requirement(text)
    if requirement.marker is not None and not requirement.marker.evaluate():
        return None
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Refusal("requires", f"{requirement.name} is not installed", text, f"pip install '{text}'")
    if requirement.specifier.contains(found, prereleases=True):
        return None
    return Refusal("requires", f"{requirement.name} {found}", text, f"pip install '{text}'")


def _said(error: BaseException) -> str:
    """An exception on one line; errors of qplug say it all themselves."""
    text = " ".join(str(error).split())
    return text if isinstance(error, QplugError) else f"{type(error).__name__}: {text}" if text else type(error).__name__
