"""One benchmark run: every kernel that takes a scheme here, bf16, the peers, and the limits, interleaved, with errors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..aliases import parse_word
from ..decl import KernelDecl, Rank
from ..device import Device, local_devices
from ..errors import SchemeError, UsageError
from ..kernel import problem_of
from ..quantizer import online_scheme
from ..random_weight import random_weight
from ..registry import Registry
from ..resolve import Policy, Resolver
from ..scheme import QuantScheme
from ..weight import QuantWeight
from .contender import Contender, beyond_cache, of_bf16, of_kernel
from .limits import Limits, measure_limits, synchronize
from .peer import Peer
from .peers import peers_of
from .results import Report, Result, machine_facts, rows_of
from .timing import take_turns

SCHEMES = ("W4A16_g128", "W4A16_g128_asym", "W8A16", "W8A8", "Wfp8A16", "Wfp8Afp8", "WNF4A16_g64", "Wmxfp4A16", "W2A16_g64")
"""What is run where no scheme is named, if some kernel other than the reference one takes it on the device."""
ALL = (
    *SCHEMES, "W4A16_g32", "W4A16_g128_actorder", "W3A16_g128", "W2A16_g128", "W8A16_g128", "Wnvfp4A16", "Wfp8A16_b128x128", "Wfp8Afp8_b128x128",
    "W4A8_g128", "Wmxfp4Amxfp4", "Wnvfp4Anvfp4", "Wmxfp8Amxfp8",
)  # fmt: skip
"""What ``--all`` runs, as far as kernels take it."""
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
TOKENS = (1, 8, 512)
CHECKED = 32
"""Rows of x whose products are compared with float64."""
SLOW = 4.0
"""Seconds: a contender whose call would take longer is left out, with its estimate."""

Tell = Callable[[str], None]


def bench(
    registry: Registry,
    schemes: Sequence[str] = (),
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    *,
    device: Device | None = None,
    dtype: str = "bfloat16",
    seconds: float = 0.5,
    quick: bool = False,
    every: bool = False,
    tell: Tell = lambda text: None,
) -> Report:
    """Run everything; ``tell`` is told what is going on.

    schemes
        Names, or engines' words for them; :data:`SCHEMES` where there are none, with ``every`` :data:`ALL`.
    seconds
        Of calls for each contender and M.

    :raises UsageError: for a scheme that no random weight can be made of, or a device that is not here.
    """
    device = here(device or Device.current())
    resolver = Resolver(registry, device, Policy())
    report = Report(machine_facts(device, registry))
    peers, report.missing = peers_of(device)
    with torch.inference_mode():
        for scheme in wanted(schemes, resolver, report.notes, ALL if every else SCHEMES):
            for n, k in shapes:
                tell(f"{scheme} [{n}, {k}]: packing")
                weight = sample_weight(online_scheme(scheme, k), n, k).to(device.torch_device())
                exact = weight.dequantize().double()
                beyond = beyond_cache(device, quick)
                group = [*kernels_for(resolver, weight, dtype, beyond), of_bf16(exact, beyond)]
                group += others([p for p in peers if p.takes(weight.scheme, n, k)], weight, beyond, device, report.notes)
                limits, found = Limits(0.0, 0.0), []
                for m in tokens:
                    what = f"{weight.scheme} [{n}, {k}], M={m}"
                    tell(what)
                    limits = limits.best(measure_limits(device, quick))
                    found.append(measure(group, exact, m, device, dtype, seconds, report.notes, what))
                report.limits.append(
                    {
                        "scheme": str(weight.scheme),
                        "n": n,
                        "k": k,
                        "read_gb_per_s": limits.read / 1e9,
                        "matmul_tflop_per_s": limits.matmul / 1e12,
                    }
                )
                for m, results in zip(tokens, found, strict=True):
                    report.rows += rows_of(results, weight, m, limits, resolver)
    return report


@contextmanager
def run_options(threads: int | None) -> Iterator[None]:
    """``threads`` of torch while the run lasts; as they are where it is None."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def here(device: Device) -> Device:
    """``device``, which has to be one of this machine.

    :raises UsageError: where it is not.
    """
    if device not in local_devices():
        raise UsageError(f"{device} is not in this machine; measuring needs {' or '.join(map(str, local_devices()))}")
    return device


def wanted(names: Sequence[str], resolver: Resolver, notes: list[str], common: Sequence[str] = SCHEMES) -> list[QuantScheme]:
    """The schemes that were named, or those of ``common`` that a kernel of some plugin takes on this device."""
    if names:
        return [parsed(name) for name in names]
    found = []
    for scheme in map(QuantScheme.parse, common):
        weight = sample_weight(scheme, 256, 512)
        if any(decl.rank != Rank.REFERENCE for decl in taking(resolver, weight, "bfloat16")):
            found.append(scheme)
        else:
            notes.append(f"{scheme} was left out, because only reference kernels take it here; name it to run it")
    return found


def parsed(name: str) -> QuantScheme:
    """A scheme by name, with quantized weights.

    :raises UsageError: for what is none.
    """
    scheme = parse_word(name)
    if scheme.weight is None:
        raise SchemeError(f"{name} quantizes no weights; name a scheme such as W4A16_g128")
    return scheme


def sample_weight(scheme: QuantScheme, n: int, k: int) -> QuantWeight:
    """A random weight whose scales bf16 and float16 hold exactly, so that every contender has the same one.

    :raises UsageError: for a scheme that is not affine.
    """
    try:
        return random_weight(scheme, n, k, torch.Generator().manual_seed(0), scale_dtype=torch.bfloat16)
    except ValueError as error:
        raise UsageError(f"{scheme} cannot be measured: {error}") from None


def taking(resolver: Resolver, weight: QuantWeight, dtype: str) -> list[KernelDecl]:
    """Declarations of all kernels that take ``weight`` in a linear layer, best rank first."""
    problem = problem_of(weight, "linear", dtype)
    decls = sorted((entry.decl for entry in resolver.registry.kernels), key=lambda d: (-d.rank, d.name))
    return [decl for decl in decls if problem.op in decl.ops and not resolver.refusals(decl, problem)]


def kernels_for(resolver: Resolver, weight: QuantWeight, dtype: str, beyond: int) -> list[Contender]:
    """A contender for each kernel that takes ``weight``."""
    return [of_kernel(resolver.kernel(d.name), weight, d.name, beyond) for d in taking(resolver, weight, dtype)]


def others(peers: Sequence[Peer], weight: QuantWeight, beyond: int, device: Device, notes: list[str]) -> Iterator[Contender]:
    """A contender for each peer that can be made ready; the reason of each other one goes to ``notes``."""
    for peer in peers:
        made = attempt(partial(peer.contender, weight, beyond, device))
        if isinstance(made, Contender):
            yield made
        else:
            notes.append(f"{peer.name} was left out of {weight.scheme} [{weight.n}, {weight.k}]: {made}")


def measure(
    group: Sequence[Contender],
    exact: Tensor,
    m: int,
    device: Device,
    dtype: str,
    seconds: float,
    notes: list[str],
    what: str,
) -> list[Result]:
    """Times and errors with one x. ``exact``: the dequantized weight ``[N, K]`` in float64. ``what``: the problem, for notes."""
    x = torch.randn(m, exact.shape[1], generator=torch.Generator().manual_seed(1)).to(
        device.torch_device(), getattr(torch, dtype)
    )
    order, errors = screen(group, x, exact, device, notes, what)
    samples = take_turns(order, [c.prepare(x) for c in order], seconds, device)
    return [(c, sample, errors[c.name]) for c, sample in zip(order, samples, strict=True)]


def screen(
    group: Sequence[Contender], x: Tensor, exact: Tensor, device: Device, notes: list[str], what: str
) -> tuple[list[Contender], dict[str, float]]:
    """Contenders that give a product in reasonable time, and its error; the reason of each other one goes to ``notes``.

    A kernel of qplug that raises is not caught: that is a bug to be seen.
    """
    rows = x[:CHECKED]
    y = rows.double() @ exact.T
    order, errors = [], {}
    for contender in group:
        given = contender.prepare(rows)
        product = partial(_product, contender, given)
        found = product() if contender.kind == "qplug" else attempt(product)
        if not isinstance(found, Tensor):
            notes.append(f"{contender.name} was left out of {what}: {found}")
            continue
        synchronize(device)
        start = time.perf_counter()
        contender.calls[0](given)
        synchronize(device)
        expected = (time.perf_counter() - start) * len(x) / len(rows)
        if expected > SLOW:
            notes.append(f"{contender.name} was left out of {what}: a call would take about {expected:.0f} s")
            continue
        errors[contender.name] = float((found.to(y.device).double() - y).norm() / y.norm())
        order.append(contender)
    return order, errors


def _product(contender: Contender, given: Any) -> Tensor:
    return contender.result(contender.calls[0](given))  # type: ignore[no-any-return]


def attempt(call: Callable[[], Any]) -> Any:
    """What ``call`` of another library returns, or one line on why it failed: foreign code ends no run of ours."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
