"""Measuring for the tuning file: every kernel that takes a problem, on this device, at each M that matters."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from ..decl import KernelDecl
from ..device import Device
from ..engine.explain import explain_checkpoint
from ..errors import CheckpointError, SchemeError, UsageError
from ..kernel import Problem
from ..layer import Op
from ..planner import problem_of_segment
from ..registry import Registry
from ..resolve import Policy, Resolver
from ..tuning import VARIABLE, Key, Tuning, Verdict, threads_of, tuning_path
from .contender import beyond_cache, of_kernel
from .run import Tell, here, parsed, sample_weight, screen
from .timing import take_turns
from .tune_tiles import timer_on, tune_tiles

OPS: tuple[Op, ...] = ("linear", "lm_head", "experts")
"""Operations that multiply with a matrix; the others have one kernel."""


def problems_of(
    targets: Sequence[str], shapes: Iterable[tuple[int, int]], dtype: str, device: Device, tp: int, quantize: str | None
) -> list[Problem]:
    """The distinct problems of checkpoints (all their quantized layers), and of schemes (linear layers of ``shapes``).

    :raises UsageError: for a target that is neither.
    """
    found: dict[Problem, None] = {}
    for target in targets:
        if not Path(target).exists() and "/" not in target:
            try:
                scheme = parsed(target)
            except SchemeError as error:
                raise UsageError(f"{target!r} is no file, and as a scheme: {error}") from None
            found.update((Problem("linear", scheme, n, k, dtype), None) for n, k in shapes)
            continue
        # With this policy the present tuning file is not read, and one that cannot be read can be replaced.
        plan = explain_checkpoint(target, device, tp, dtype, quantize, policy=Policy("reference"))
        segments = [(d.layer, s) for d in plan.decisions for s in d.segments if s.scheme is not None]
        if not segments:
            raise CheckpointError(f"{target} has no quantized layer to tune; name one that has, or --quantize SCHEME")
        found.update((problem_of_segment(layer, segment, dtype), None) for layer, segment in segments)
    return list(found)


def tune(
    registry: Registry,
    problems: Sequence[Problem],
    tokens: Sequence[int],
    *,
    device: Device,
    seconds: float = 0.3,
    tell: Tell = lambda text: None,
    measured: Callable[[Problem, Verdict], None] = lambda problem, verdict: None,
) -> tuple[Tuning, list[str]]:
    """Measurements of all problems that more than one kernel takes, on a GPU with the best tiles of each, and notes on what was left out.

    ``measured`` is told each verdict as it comes.
    """
    device = here(device)
    resolver = Resolver(registry, device, Policy())
    owners = {entry.decl.name: entry.plugin for entry in registry.kernels}
    facts = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "torch": torch.__version__}
    found = Tuning(device.name, device.arch, {}, {}, facts, threads=threads_of(device))
    notes: list[str] = []
    if device.vendor != "cpu":
        # Before kernels are compared, so that each runs with its best tiles.
        where = device.torch_device()
        tiles, notes = tune_tiles(registry, problems, tokens, device, timer_on(device, seconds), where=where, tell=tell)
        found = replace(found, tiles=tiles)
    for index, problem in enumerate(problems):
        what = f"{problem.op} {problem.scheme} [{problem.n}, {problem.k}]"
        tell(f"{index + 1} of {len(problems)}: {what}")
        key = Key.of(problem, found.threads)
        if key is None or problem.op not in OPS:
            notes.append(f"{what} was left out: its weights have more than random ones, so their kernel goes by rank")
            continue
        fit = taking(resolver, problem)
        if len(fit) < 2:
            notes.append(f"{what} was left out: only {' '.join(d.name for d in fit) or 'no kernel'} takes it")
            continue
        times = _times(resolver, problem, fit, tokens, seconds, notes)
        plugins = {owners[name].distribution: owners[name].version for name in times}
        found = replace(found, plugins={**found.plugins, **plugins}, measured={**found.measured, key: times})
        verdict = found.best(problem, list(times))
        if isinstance(verdict, Verdict):
            measured(problem, verdict)
    return found, notes


def taking(resolver: Resolver, problem: Problem) -> list[KernelDecl]:
    """Declarations of all kernels that take ``problem``, best rank first."""
    decls = sorted((entry.decl for entry in resolver.registry.kernels), key=lambda d: (-d.rank, d.name))
    return [decl for decl in decls if problem.op in decl.ops and not resolver.refusals(decl, problem)]


def _times(
    resolver: Resolver, problem: Problem, fit: Sequence[KernelDecl], tokens: Sequence[int], seconds: float, notes: list[str]
) -> dict[str, dict[int, float]]:
    """Milliseconds by kernel and M; a kernel that is too slow for one M has no time at all."""
    device = resolver.device
    times: dict[str, dict[int, float]] = {decl.name: {} for decl in fit}
    with torch.inference_mode():
        weight = sample_weight(problem.scheme, problem.n, problem.k).to(device.torch_device())
        exact = weight.dequantize().double()
        group = [of_kernel(resolver.kernel(decl.name), weight, decl.name, beyond_cache(device)) for decl in fit]
        for m in tokens:
            x = torch.randn(m, problem.k, generator=torch.Generator().manual_seed(1))
            x = x.to(device.torch_device(), getattr(torch, problem.dtype))
            what = f"{problem.scheme} [{problem.n}, {problem.k}], M={m}"
            group, _ = screen(group, x, exact, device, notes, what)
            for contender, sample in zip(group, take_turns(group, [x] * len(group), seconds, device), strict=True):
                times[contender.name][m] = sample.p10 * 1e3
    return {c.name: times[c.name] for c in group}


def existing(device: Device) -> tuple[Path, Tuning | None, str]:
    """Where measurements of ``device`` go, those that are there, and a note where they cannot be read and will be replaced.

    :raises UsageError: where tuning is turned off.
    """
    path = tuning_path(device, os.environ)
    if path is None:
        raise UsageError(f"{VARIABLE}=0 turns tuning off; unset it, or set it to the file to write")
    if not path.exists():
        return path, None, ""
    try:
        return path, Tuning.read(path), ""
    except UsageError:
        return path, None, f"{path} could not be read as a tuning file and is replaced"
