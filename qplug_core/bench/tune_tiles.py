"""Measuring tiles of Triton kernels: every tile that the tables have for an architecture, with every number of splits, for one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from ..device import Device
from ..kernel import Problem
from ..kernels.triton_tables import Asked, Tile, tile_for, tiles, use, watched
from ..registry import Registry
from ..resolve import Policy, Resolver
from .contender import Contender, beyond_cache, of_kernel
from .run import Tell, sample_weight
from .timing import take_turns

SPLITS = (0, 1, 2, 4, 8, 16)
"""Numbers of splits of K that are tried; 0 is the computed one."""
FAR = 1e-2
"""Results of two tiles that are further apart than this, relative Frobenius, are not of the same product."""

Timer = Callable[[Contender, Tensor], float]
"""Seconds of one call."""


def timer_on(device: Device, seconds: float) -> Timer:
    """Calls on rotating copies of the weight, for about ``seconds``, as :mod:`.timing` does it."""
    return lambda contender, x: take_turns([contender], [x], seconds, device)[0].p10


def tune_tiles(
    registry: Registry,
    problems: Sequence[Problem],
    tokens: Sequence[int],
    device: Device,
    timer: Timer,
    *,
    where: torch.device | str,
    tell: Tell = lambda text: None,
) -> tuple[dict[Asked, Tile], list[str]]:
    """The fastest tile of each shape that a Triton kernel asks for, in use from here on, and notes on tiles that were left out.

    ``where``: the tensors are there. Tiles that the compile matrix knows are tried, and no others.
    """
    found: dict[Asked, Tile] = {}
    notes: list[str] = []
    resolver = Resolver(registry, device, Policy())
    for problem in problems:
        for entry in registry.kernels:
            decl = entry.decl
            if not any(text.startswith("triton") for text in decl.requires) or problem.op not in decl.ops:
                continue
            if resolver.refusals(decl, problem):
                continue
            with torch.inference_mode():
                weight = sample_weight(problem.scheme, problem.n, problem.k).to(where)
                contender = of_kernel(resolver.kernel(decl.name), weight, decl.name, beyond_cache(device))
                for m in tokens:
                    tell(f"tiles of {decl.name} {problem.scheme} [{problem.n}, {problem.k}], M={m}")
                    x = torch.randn(m, problem.k, generator=torch.Generator().manual_seed(1))
                    found.update(_fastest(contender, x.to(where, getattr(torch, problem.dtype)), timer, found, notes))
    use(found.items())
    return found, notes


def _fastest(contender: Contender, x: Tensor, timer: Timer, known: dict[Asked, Tile], notes: list[str]) -> dict[Asked, Tile]:
    """The tile of what one call asks for; nothing where it asks for none, or for what is known."""
    with watched() as asked:
        expected = contender.calls[0](x).double()
    # One product asks once: a call that asks for several shapes could not tell which tile was the fast one.
    if len(set(asked)) != 1 or asked[0] in known:
        return {}
    shape = asked[0]
    if tile_for(**asdict(shape)) is None:
        return {}  # So many tokens that the weight is written out.
    times: dict[Tile, float] = {}
    for tile in tiles(shape.family, shape.arch, shape.bits, shape.kind):
        for splits in SPLITS:
            tried = replace(tile, splits=splits)
            with watched(tried):
                y = contender.calls[0](x).double()
                if float((y - expected).norm()) > FAR * float(expected.norm()):
                    notes.append(
                        f"{contender.name} with {tried.arguments()} gives another product for {shape}; the tile was left out"
                    )
                    break
                times[tried] = timer(contender, x)
    return {shape: min(times, key=lambda tile: times[tile])} if times else {}
