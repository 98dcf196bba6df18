"""Resolver: which kernel takes a problem on this device, and why each other one does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from .decl import KernelDecl, Rank
from .device import Device
from .errors import NoKernel, UsageError
from .kernel import Kernel, Problem
from .kernels.triton_tables import use as use_tiles
from .registry import Registry
from .support import Refusal
from .tuning import Tuning, Verdict


@dataclass(frozen=True)
class Policy:
    """What the user wants of the choice.

    kernels
        ``auto`` takes the best; ``reference`` takes the reference kernels only, as an oracle.
    pin
        Layer pattern (fnmatch) to kernel name; the first pattern that matches decides.
    forbid
        Kernel patterns that are never taken; ``core.*`` forbids the reference kernels, which makes a missing kernel an error.
    activations
        ``quantized`` does what the scheme says; ``16bit`` leaves activations as they are: another function than the
        checkpoint's, which a device without the number type may want, and a comparison of weights alone needs.
    """

    kernels: str = "auto"
    pin: Mapping[str, str] = field(default_factory=dict)
    forbid: frozenset[str] = frozenset()
    activations: str = "quantized"

    def __post_init__(self) -> None:
        if self.activations not in ("quantized", "16bit"):
            raise UsageError(f"activations={self.activations!r} was given; 'quantized' or '16bit' is needed")
        if self.kernels not in ("auto", "reference"):
            raise UsageError(
                f"kernels={self.kernels!r} was given; 'auto' or 'reference' is needed (pin one kernel with pin=)"
            )

    def pinned(self, layer: str) -> str | None:
        """The kernel that the user pinned for a layer."""
        return next((kernel for pattern, kernel in self.pin.items() if fnmatchcase(layer, pattern)), None)

    def forbidden(self, kernel: str) -> bool:
        """True where the user forbids a kernel."""
        return any(fnmatchcase(kernel, pattern) for pattern in self.forbid)

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return {
            "kernels": self.kernels,
            "pin": dict(self.pin),
            "forbid": sorted(self.forbid),
            "activations": self.activations,
        }


@dataclass(frozen=True)
class Tried:
    """One kernel that was not taken, with every reason."""

    kernel: str
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True)
class Choice:
    """The kernel that was taken, how it does the scheme, what decided, and all others with their reasons."""

    kernel: str
    mode: str
    why: str
    tried: tuple[Tried, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Kernel, mode, reason, and refusals of the others."""
        tried = {t.kernel: [r.to_json() for r in t.refusals] for t in self.tried}
        return {"kernel": self.kernel, "mode": self.mode, "why": self.why, "tried": tried}


class Resolver:
    """Chooses kernels for one device under one policy. Deterministic: pin, then measurements where there are any, rank, name."""

    def __init__(self, registry: Registry, device: Device, policy: Policy, tuning: Tuning | None = None) -> None:
        self.registry = registry
        self.device = device
        self.policy = policy
        self.tuning = tuning
        self._seen: dict[tuple[Problem, str | None], Choice] = {}
        known = {entry.decl.name for entry in registry.kernels}
        for pattern, name in policy.pin.items():
            if name not in known:
                raise UsageError(
                    f"kernel {name!r} is pinned for {pattern!r} and is not installed; installed are {', '.join(sorted(known))}"
                )

    def choose(self, problem: Problem, layer: str = "") -> Choice:
        """The kernel for ``problem``.

        :raises NoKernel: where a pinned kernel refuses, or every kernel does because the reference one is forbidden.
        """
        pinned = self.policy.pinned(layer)
        key = (problem, pinned)
        if key not in self._seen:
            self._seen[key] = self._choose(problem, layer, pinned)
        return self._seen[key]

    def kernel(self, name: str) -> Kernel:
        """The kernel itself, imported and instantiated once; tiles that were measured on this device are in use from then on."""
        if self.tuning is not None:
            use_tiles(self.tuning.tiles.items())
        loaded: Kernel = self.registry.load(self.registry.kernel(name).decl)
        return loaded

    def _choose(self, problem: Problem, layer: str, pinned: str | None) -> Choice:
        refused: dict[str, list[Refusal]] = {}
        fit: list[KernelDecl] = []
        for decl in sorted((entry.decl for entry in self.registry.kernels), key=lambda d: (-d.rank, d.name)):
            if problem.op not in decl.ops:
                continue
            reasons = self.refusals(decl, problem)
            if not reasons and pinned is not None and decl.name != pinned:
                reasons = [Refusal("policy", f"kernel {pinned} is pinned", "this kernel's name", "change the pin")]
            refused[decl.name] = reasons
            if not reasons:
                fit.append(decl)
        if not fit:
            details = (
                "; ".join(f"{name}: {r[0]}" for name, r in refused.items()) or f"no kernel is declared for {problem.op}"
            )
            raise NoKernel(
                f"no kernel takes {layer or problem.op} ({problem.scheme}, [{problem.n}, {problem.k}], {problem.dtype}) on "
                f"{self.device.name}: {details}; allow the reference kernels or change the pin"
            )
        taken, why, verdict = self._best(problem, fit, pinned)
        slower = dict(verdict.others) if verdict else {}
        for decl in fit:
            if decl is not taken:
                refused[decl.name] = [_slower(decl, taken, slower, verdict)]
        tried = tuple(Tried(name, tuple(reasons)) for name, reasons in refused.items() if name != taken.name)
        return Choice(taken.name, taken.mode, why, tried)

    def _best(
        self, problem: Problem, fit: Sequence[KernelDecl], pinned: str | None
    ) -> tuple[KernelDecl, str, Verdict | None]:
        """The kernel of those that fit (by rank and name), what decided, and the measurement where that did."""
        first = fit[0]
        if pinned:
            return first, "pinned by the user", None
        if self._reference_only:
            return first, "the policy asks for reference kernels", None
        if self.tuning is None:
            return first, "rank", None
        # A measurement chooses among kernels that compute the same function: it never drops the quantization of activations.
        alike = [decl for decl in fit if (decl.mode == "weight-only") == (first.mode == "weight-only")]
        slow = [decl.name for decl in alike if decl.rank == Rank.REFERENCE]
        found = self.tuning.best(problem, [decl.name for decl in alike], slow)
        if isinstance(found, str):
            return first, f"rank; {found} was not measured for this shape" if found else "rank", None
        return next(decl for decl in alike if decl.name == found.kernel), found.why(), found

    @property
    def _reference_only(self) -> bool:
        return self.policy.kernels == "reference"

    def refusals(self, decl: KernelDecl, problem: Problem) -> list[Refusal]:
        """Every reason why a kernel does not take ``problem`` here, from its declaration first, then from itself."""
        reasons = []
        if self._reference_only and decl.rank != Rank.REFERENCE:
            reasons.append(Refusal("policy", "kernels='reference'", "kernels='auto'"))
        if self.policy.forbidden(decl.name):
            reasons.append(Refusal("policy", "forbidden by the user", "a kernel that is allowed", "drop it from forbid"))
        if not any(self.device.matches(pattern) for pattern in decl.devices):
            reasons.append(Refusal("device", self.device.name, " or ".join(decl.devices)))
        if mismatch := decl.pattern_for(problem.scheme):
            reasons.append(Refusal("scheme", mismatch, " or ".join(decl.schemes)))
        if problem.dtype not in decl.dtypes:
            reasons.append(Refusal("dtype", f"{problem.dtype} activations", " or ".join(decl.dtypes)))
        if reasons:
            return reasons
        reasons += self.registry.kernel_requirements(decl)
        if reasons:
            return reasons
        if (failed := self.registry.load_refusal(decl)) is not None:
            return [failed]
        kernel: Kernel = self.registry.load(decl)
        return kernel.supports(problem, self.device)


def _slower(
    decl: KernelDecl, taken: KernelDecl, times: Mapping[str, Mapping[int, float]], verdict: Verdict | None
) -> Refusal:
    """Why a kernel that fits was not taken: its times, or its rank."""
    if verdict is not None and decl.name in times:
        shown = ", ".join(f"{ms:.3g} ms at M={m}" for m, ms in sorted(times[decl.name].items()))
        return Refusal("measured", shown, f"less time than {taken.name}", "pin it to use it")
    if verdict is not None:
        return Refusal(
            "measured", "no measured time of the same function", f"one below that of {taken.name}", "pin it to use it"
        )
    return Refusal("rank", f"rank {decl.rank}", f"more than {taken.rank}, the rank of {taken.name}", "pin it to use it")
