"""Checks of kernels: the product, the quantization of activations, honest refusals, custom ops, packing in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..device import Device
from ..kernel import Kernel, PackedWeight, Problem, problem_of
from ..quantizer import codebook_of
from ..reference.activation import quantize_activation
from ..reference.linear import ReferenceLinear
from ..scheme import NUMBER_TYPES, QuantScheme, TensorQuant
from ..support import Refusal
from ..weight import QuantWeight
from .base import Conformance, KernelCase, load
from .weights import random_weight

SHAPES = ((256, 512), (96, 320), (160, 384), (33, 100), (1, 32), (130, 257))
"""``(N, K)``. A kernel must take the first, and takes any other or refuses it."""
ROWS = (1, 3, 18)
"""M, numbers of tokens."""
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BUILT_IN = frozenset({"aten", "prim", "prims", "profiler", "mkl", "mkldnn", "_c10d_functional", "onednn", "quantized"})

Variant = Callable[[QuantWeight], QuantWeight]
VARIANTS: dict[str, Variant] = {
    "pre_scale": lambda w: replace(w, pre_scale=torch.linspace(0.5, 2.0, w.k)),
    "act_shift": lambda w: replace(w, act_shift=torch.linspace(-0.5, 0.5, w.k)),
    "shift": lambda w: replace(w, shift=torch.full(w.scales.shape, 0.0625)),
    "float_zeros": lambda w: replace(w, zeros=torch.full(w.scales.shape, 1.5)),
}
"""Fields of a weight that a kernel may not know: it must refuse them or compute with them."""


class KernelConformance(Conformance):
    """Every scheme of every kernel against the definition of correct, within the tolerance that the scheme owns."""

    def test_product(self, running_case: KernelCase) -> None:
        """On given codes: every shape that ``supports`` takes, every dtype, with and without bias, from views of "
        "memory too."""
        kernel: Kernel = load(running_case.decl.impl)
        for dtype, i, (n, k) in ((d, i, s) for d in running_case.decl.dtypes for i, s in enumerate(SHAPES)):
            weight = _weight(running_case, n, k, seed=i, scale_dtype=SCALE_DTYPES[i % 3])
            refusals = _supports(kernel, problem_of(weight, running_case.decl.ops[0], dtype), running_case.device)
            if refusals:
                assert i, (
                    f"[{n}, {k}] of {weight.scheme} with {dtype} is refused ({refusals[0]}), though the kernel declares it"
                )
                continue
            packed = kernel.pack(weight)
            for m in ROWS:
                _check_product(kernel, packed, weight, running_case, dtype, m)

    def test_activation_codes(self, running_case: KernelCase) -> None:
        """An identity weight shows the codes that the kernel gives to activations: they are those of the float32 "
        "quantizer."""
        act, dtypes = running_case.scheme.act, running_case.decl.dtypes
        if act is None or running_case.decl.mode == "weight-only":
            return
        kernel: Kernel = load(running_case.decl.impl)
        dtype = "float32" if "float32" in dtypes else dtypes[0]
        weight = _identity(_weight(running_case, 256, 256, seed=5))
        if _supports(kernel, problem_of(weight, running_case.decl.ops[0], dtype), running_case.device):
            return
        x = torch.randn(32, 256, generator=torch.Generator().manual_seed(6)).to(getattr(torch, dtype))
        x[0, :8] *= 30.0
        expected = quantize_activation(x.float(), act, weight.act_scale, weight.act_zero, weight.act_div)
        _check_codes(
            _apply(kernel, x, kernel.pack(weight), None, running_case.device).float(),
            expected.dequantize(torch.float32),
            running_case,
        )

    def test_refusals_say_why(self, kernel_case: KernelCase) -> None:
        """Of each problem: refusals are whole sentences' worth of data, the same when asked again, and all of them are "
        "listed."""
        kernel: Kernel = load(kernel_case.decl.impl)
        op, (n, k) = kernel_case.decl.ops[0], SHAPES[0]
        plain = problem_of(_weight(kernel_case, n, k, seed=0), op, kernel_case.decl.dtypes[0])
        assert not _supports(kernel, plain, kernel_case.device), (
            f"{kernel_case.scheme} [{n}, {k}] is refused on {kernel_case.device}, though the kernel declares it"
        )
        changes: list[dict[str, Any]] = [{name: True} for name in VARIANTS]
        changes += [{"n": 33}, {"k": 100}, {"encoding": "unknown"}]
        refused = [
            (change, found) for change in changes if (found := _supports(kernel, _with(plain, change), kernel_case.device))
        ]
        for (one, mine), (other, theirs) in combinations(refused, 2):
            both = {(r.code, r.need) for r in _supports(kernel, _with(plain, {**one, **other}), kernel_case.device)}
            lost = {(r.code, r.need) for r in [*mine, *theirs]} - both
            assert not lost, f"with both {one} and {other} the refusal {sorted(lost)[0]} is not listed; every reason must be"

    def test_unusual_weights_are_refused_or_right(self, running_case: KernelCase) -> None:
        """A field that the kernel does not know must not be left out of the product."""
        kernel: Kernel = load(running_case.decl.impl)
        dtype = running_case.decl.dtypes[0]
        for name, change in VARIANTS.items():
            if name == "float_zeros" and running_case.scheme.weight and running_case.scheme.weight.symmetric:
                continue
            weight = change(_weight(running_case, *SHAPES[0], seed=8))
            if _supports(kernel, problem_of(weight, running_case.decl.ops[0], dtype), running_case.device):
                continue
            x = _activations(weight, 4, dtype, seed=9)
            y = _apply(kernel, x, kernel.pack(weight), None, running_case.device).float()
            reference = ReferenceLinear()
            expected = reference.apply(x.float(), reference.pack(weight))
            bound = 5e-2 if running_case.scheme.act is not None else _bound(running_case.scheme, dtype)
            assert _distance(y, expected) <= bound, (
                f"supports() takes a weight with {name}, and apply leaves it out: {_distance(y, expected):.1e} from the "
                f"reference, {bound:.1e} is allowed"
            )

    def test_no_tokens(self, running_case: KernelCase) -> None:
        """x without rows, as experts that no token chose get, gives y without rows."""
        kernel: Kernel = load(running_case.decl.impl)
        weight = _weight(running_case, *SHAPES[0], seed=15)
        packed = kernel.pack(weight)
        for shape in ((0, weight.k), (2, 0, weight.k)):
            x = torch.empty(shape, dtype=getattr(torch, running_case.decl.dtypes[0]), device=weight.codes.device)
            _apply(kernel, x, packed, None, running_case.device)

    def test_what_is_not_finite_stays_so(self, running_case: KernelCase) -> None:
        """A NaN or infinite activation makes the values infinite or NaN that it does in the reference, and no others."""
        kernel: Kernel = load(running_case.decl.impl)
        dtype = running_case.decl.dtypes[0]
        weight = _weight(running_case, *SHAPES[0], seed=16)
        reference = ReferenceLinear()
        packed, defined = kernel.pack(weight), reference.pack(weight)
        for value in (float("nan"), float("inf"), -float("inf")):
            for m in (3, 18):
                x = _activations(weight, m, dtype, seed=17)
                x[1, weight.k // 2] = value
                y = _apply(kernel, x, packed, None, running_case.device)
                wanted = reference.apply(x.float(), defined)
                assert torch.equal(y.isfinite(), wanted.isfinite()), (
                    f"x[1, {weight.k // 2}] is {value} of M={m}: {_rows(~y.isfinite())} of y are not finite, and in the reference "
                    f"{_rows(~wanted.isfinite())}"
                )

    def test_pack_into_existing_storage(self, running_case: KernelCase) -> None:
        """``pack(w, out=)`` keeps every address and takes every new value, so that CUDA graphs see reloaded weights."""
        kernel: Kernel = load(running_case.decl.impl)
        dtype = running_case.decl.dtypes[0]
        old, new = (_weight(running_case, *SHAPES[0], seed=seed) for seed in (10, 11))
        packed = kernel.pack(old)
        held = dict(packed.tensors)
        addresses = {name: t.data_ptr() for name, t in held.items()}
        again = kernel.pack(new, out=packed)
        assert again is packed, "pack(w, out=) returned another PackedWeight than out"
        assert {name: t.data_ptr() for name, t in again.tensors.items()} == addresses, "pack(w, out=) moved a packed tensor"
        fresh = kernel.pack(new)
        for name, tensor in held.items():
            assert torch.equal(tensor.view(torch.uint8), fresh.tensors[name].view(torch.uint8)), (
                f"pack(w, out=) left old values in {name}"
            )
        x = _activations(new, 3, dtype, seed=12)
        outputs = [_apply(kernel, x, p, None, running_case.device) for p in (again, fresh)]
        assert torch.equal(*outputs), "apply after pack(w, out=) differs from apply after pack(w)"

    def test_custom_op(self, running_case: KernelCase) -> None:
        """Each op that is not torch's own passes ``torch.library.opcheck``; ``apply`` runs on fake tensors."""
        kernel: Kernel = load(running_case.decl.impl)
        dtype = running_case.decl.dtypes[0]
        weight = _weight(running_case, *SHAPES[0], seed=13)
        packed, x = kernel.pack(weight), _activations(weight, 3, dtype, seed=14)
        with _Recorder() as recorder:
            y = _apply(kernel, x, packed, None, running_case.device)
        for op, args, kwargs in recorder.calls:
            torch.library.opcheck(op, args, kwargs, test_utils=("test_schema", "test_faketensor"))
        _check_fake(kernel, packed, x, y)


def _weight(case: KernelCase, n: int, k: int, seed: int, **options: Any) -> QuantWeight:
    weight = random_weight(case.scheme, n, k, torch.Generator().manual_seed(seed), **options)
    if weight.act_scale is not None:
        # A power of two, so that activations can be given whose codes are beyond doubt.
        weight = replace(weight, act_scale=torch.tensor(2.0**-6))
    return weight.to(case.device.torch_device()) if case.runs else weight


def _supports(kernel: Kernel, problem: Problem, device: Device) -> list[Refusal]:
    refusals = kernel.supports(problem, device)
    assert kernel.supports(problem, device) == refusals, "supports() answers the same question in two ways"
    for refusal in refusals:
        assert isinstance(refusal, Refusal), f"supports() returned {refusal!r}; Refusal was needed"
        assert refusal.code, f"a refusal has no code: {refusal!r}"
        assert refusal.have, f"a refusal does not say what was found: {refusal!r}"
        assert refusal.need, f"a refusal does not say what was needed: {refusal!r}"
    return list(refusals)


def _with(problem: Problem, change: dict[str, Any]) -> Problem:
    return replace(problem, **change)


def _activations(weight: QuantWeight, m: int, dtype: str, seed: int) -> Tensor:
    """x ``[m, K]`` in ``dtype``. Where activations are quantized, each value lies on a code, so that rounding decides "
    "nothing."""
    generator = torch.Generator().manual_seed(seed)
    act, shape = weight.scheme.act, (m, weight.k)
    if act is None:
        x = torch.randn(shape, generator=generator)
    elif act.dtype.startswith("int"):
        x = _on_codes(act, shape, generator, weight)
    else:
        codebook = codebook_of(act.dtype)
        values = torch.tensor([-448.0, -208.0, -9.0, -0.5, 0.0, 1.0, 7.0, 52.0, 448.0]) if codebook is None else codebook
        largest = NUMBER_TYPES[act.dtype].largest
        x = values.clamp(-largest, largest)[torch.randint(len(values), shape, generator=generator)]
        x[:, :: act.block[1] or weight.k] = largest
        x = x * 2.0**-6
    return x.to(weight.codes.device, getattr(torch, dtype))


def _on_codes(act: TensorQuant, shape: tuple[int, int], generator: torch.Generator, weight: QuantWeight) -> Tensor:
    top = 2 ** (act.bits - 1)
    width = act.block[1] or shape[1]
    if act.symmetric:
        codes = torch.randint(1 - top, top, shape, generator=generator)
        codes[:, ::width] = top - 1
        return codes * 2.0**-6
    codes = torch.randint(-top, top, shape, generator=generator)
    zero = -7 if weight.act_zero is None else int(weight.act_zero)
    if act.dynamic and shape[1] > 1:
        codes[:, ::width], codes[:, 1::width] = -top, top - 1
    return (codes - zero) * 2.0**-6


def _apply(kernel: Kernel, x: Tensor, packed: PackedWeight, bias: Tensor | None, device: Device) -> Tensor:
    before = x.clone()
    y = kernel.apply(x, packed, bias)
    assert torch.equal(x.nan_to_num(1.0), before.nan_to_num(1.0)), "apply changed its input"
    assert y.dtype == x.dtype, f"apply returned {y.dtype} for {x.dtype}"
    assert y.shape == (*x.shape[:-1], packed.n), f"apply returned {list(y.shape)} for x {list(x.shape)} and N {packed.n}"
    return y


def _check_product(kernel: Kernel, packed: PackedWeight, weight: QuantWeight, case: KernelCase, dtype: str, m: int) -> None:
    x = _activations(weight, m, dtype, seed=m)
    values = x.double()
    if weight.scheme.act is not None and case.decl.mode != "weight-only":
        act = weight.scheme.act
        values = (
            quantize_activation(x.float(), act, weight.act_scale, weight.act_zero, weight.act_div)
            .dequantize(torch.float32)
            .double()
        )
    expected = values @ weight.dequantize().double().t()
    bias = torch.linspace(-1, 1, weight.n, device=x.device).to(x.dtype)
    bound = _bound(weight.scheme, dtype)
    what = f"{weight.scheme} [{weight.n}, {weight.k}], M={m}, {dtype}"
    for name, given, added in _views(x, bias):
        y = _apply(kernel, given, packed, added, case.device).reshape(m, weight.n).double()
        wanted = expected if added is None else expected + added.double()
        assert torch.isfinite(y).all(), f"{what}, {name}: the product has NaN or infinite values"
        assert _distance(y, wanted) <= bound, (
            f"{what}, {name}: {_distance(y, wanted):.1e} from the definition, {bound:.1e} is allowed"
        )


def _views(x: Tensor, bias: Tensor) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """The same activations in every form in which an engine hands them over."""
    yield "contiguous x", x, None
    yield "bias", x, bias
    yield "x [1, M, K]", x.unsqueeze(0), None
    spread = torch.empty(x.shape[0], x.shape[1] * 2, dtype=x.dtype, device=x.device)
    spread[:, ::2] = x
    yield "x with strides", spread[:, ::2], bias


def _rows(mask: Tensor) -> str:
    """Which rows of a mask ``[M, N]`` are set, and in how many columns."""
    counts = mask.sum(dim=1)
    return ", ".join(f"{int(counts[i])} values of row {int(i)}" for i in counts.nonzero().flatten()) or "none"


def _bound(scheme: QuantScheme, dtype: str) -> float:
    return scheme.tolerance.product if dtype == "float32" else scheme.tolerance.product_16bit


def _distance(y: Tensor, expected: Tensor) -> float:
    norm = float(expected.double().norm())
    return float((y.double() - expected.double()).norm()) / norm if norm else float(y.double().norm())


def _identity(weight: QuantWeight) -> QuantWeight:
    """The same scheme with the unit matrix as its value."""
    zeros = None if weight.zeros is None else torch.ones_like(weight.zeros)
    codes = torch.full(weight.codes.shape, 0.0 if zeros is None else 1.0, device=weight.codes.device)
    codes.fill_diagonal_(2.0 if zeros is not None else 2.0 if weight.codebook is not None else 1.0)
    scales = (
        torch.full_like(weight.scales, 127)
        if weight.scales.dtype == torch.uint8
        else torch.ones(weight.scales.shape).to(weight.scales)
    )
    unit = None if weight.global_scale is None else torch.ones_like(weight.global_scale)
    return replace(weight, codes=codes.to(weight.codes.dtype), scales=scales, zeros=zeros, global_scale=unit)


def _check_codes(y: Tensor, expected: Tensor, case: KernelCase) -> None:
    tolerance = case.scheme.tolerance
    # A step is the distance of neighbouring codes; for floats it grows with the value.
    steps = _steps(expected)
    apart = (y - expected).abs()
    share = float((apart > 0.5 * steps).float().mean())
    assert share <= tolerance.code_share, f"{share:.1%} of the activation codes differ; {tolerance.code_share:.1%} may"
    assert bool((apart <= (tolerance.code_step + 0.5) * steps).all()), (
        f"an activation code is {float((apart / steps).max()):.0f} steps off"
    )
    same = apart <= 0.5 * steps
    scale = float((apart[same] / expected[same].abs().clamp(min=1e-12)).max())
    bound = tolerance.act_scale if "float32" in case.decl.dtypes else tolerance.product_16bit
    assert scale <= bound, f"activation scales differ by {scale:.1e}; {bound:.1e} is allowed"


def _steps(expected: Tensor) -> Tensor:
    """The smallest distance of two different values of a row, for every value."""
    ordered = expected.sort(dim=1).values
    gaps = ordered.diff(dim=1)
    smallest = gaps.masked_fill(gaps <= expected.abs().amax() * 1e-6, float("inf")).amin(dim=1, keepdim=True)
    return smallest.expand_as(expected)


class _Recorder(TorchDispatchMode):
    """Notes every op that is not torch's own, with its arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in BUILT_IN:
            self.calls.append((func, args, kwargs))
        return func(*args, **kwargs)


def _check_fake(kernel: Kernel, packed: PackedWeight, x: Tensor, y: Tensor) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        tensors: dict[str, Tensor] = {name: mode.from_tensor(t) for name, t in packed.tensors.items()}
        fake = kernel.apply(mode.from_tensor(x), replace(packed, tensors=tensors))
    assert (fake.shape, fake.dtype, fake.device) == (y.shape, y.dtype, y.device), (
        f"on fake tensors apply gives {fake.dtype} {list(fake.shape)} on {fake.device}; it gives {y.dtype} "
        f"{list(y.shape)} on {y.device}"
    )
