"""Checks of checkpoint formats: exact round trips, exact cuts, fusing and stacking, configs that say what was meant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ..config import LayerQuant, ModuleName
from ..errors import CannotEncode, ConfigError
from ..format import CheckpointFormat
from ..layer import LayerSpec, StoredPart
from ..method import decode_part
from ..scheme import QuantScheme
from ..source import MemorySource, Source
from ..weight import QuantWeight, _same_bits, concat, stack
from .base import Conformance, FormatCase, load
from .weights import random_weight

SHAPES = ((256, 512), (96, 320), (160, 384), (128, 100), (33, 128), (1, 1))
"""``(N, K)``. A format must store the first, and refuses any other by CannotEncode or stores it exactly."""
CUTS = ((0, 80, 171, 256), (0, 64, 256), (0, 1, 255, 256))
"""Where 256 rows (or twice as many columns) are cut, besides 2 and 4 equal parts."""
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODULE = "model.layers.0.mlp.up_proj"


class FormatConformance(Conformance):
    """Every scheme of every format, in every layout that takes it."""

    def test_decode_of_encode_is_the_weight(self, format_case: FormatCase) -> None:
        """Bit for bit, over ragged shapes, scale dtypes and the whole range of zero points."""
        fmt: CheckpointFormat = load(format_case.decl.impl)
        stored_first = False
        for i, (n, k) in enumerate(SHAPES):
            for zeros in _zero_ranges(format_case.scheme):
                weight = _weight(format_case, n, k, seed=i, zeros=zeros, scale_dtype=SCALE_DTYPES[i % 3])
                for quant, tensors in _stored(format_case, fmt, weight):
                    stored_first |= i == 0
                    _check_declared(fmt, quant, tensors, n, k)
                    before = {name: t.clone() for name, t in tensors.items()}
                    decoded = fmt.decode(tensors, quant, n, k)
                    assert isinstance(decoded, QuantWeight)
                    assert decoded.equal(weight), (
                        f"decode(encode(w)) differs for [{n}, {k}] in {quant.layout}: {_difference(weight, decoded)}"
                    )
                    again = fmt.encode(decoded, quant)
                    for name, tensor in before.items():
                        assert _same_bits(tensor, tensors[name]), f"decode changed the stored tensor {name}"
                        assert _same_bits(tensor, again[name]), f"encode(decode(file)) differs from the file in {name}"
        assert stored_first, (
            f"no layout of {format_case.decl.name} stores {format_case.scheme} as {list(SHAPES[0])}, which it declares"
        )

    def test_layout_of_a_weight(self, format_case: FormatCase) -> None:
        """``quant_for_scheme`` names a declared layout that holds the weight, or says that none does."""
        fmt: CheckpointFormat = load(format_case.decl.impl)
        for i, zeros in enumerate(_zero_ranges(format_case.scheme)):
            weight = _weight(format_case, *SHAPES[0], seed=1, zeros=zeros)
            try:
                quant = fmt.quant_for_scheme(weight)
            except CannotEncode:
                assert i, f"{format_case.decl.name} declares {format_case.scheme} and finds no layout for it"
                continue
            assert quant.layout in format_case.decl.layouts, (
                f"layout {quant.layout!r} is not declared: {format_case.decl.layouts}"
            )
            decoded = _through(fmt, weight)
            assert decoded.equal(weight), f"the weight changed on its way through the file: {_difference(weight, decoded)}"

    def test_cut_is_the_cut_of_the_whole(self, format_case: FormatCase) -> None:
        """Tensor parallelism: a window read by the declared axes is the window of the whole, for rows and for columns."""
        fmt: CheckpointFormat = load(format_case.decl.impl)
        n, k = SHAPES[0]
        for zeros in _zero_ranges(format_case.scheme)[:1]:
            weight = _weight(format_case, n, k, seed=2, zeros=zeros)
            whole = weight.dequantize()
            for quant, tensors in _stored(format_case, fmt, weight):
                source = MemorySource(_named(fmt, quant, tensors))
                for n0, n1, k0, k1 in _windows(n, k):
                    layer = LayerSpec(MODULE, "linear", n1 - n0, k, columns=(k0, k1))
                    part = StoredPart(MODULE, n1 - n0, rows=(n0, n1), stored_n=n)
                    cut = decode_part(source, fmt, quant, layer, part).dequantize()
                    assert torch.equal(cut, whole[n0:n1, k0:k1]), (
                        f"rows {n0}:{n1}, columns {k0}:{k1} read through the axes of layout {quant.layout} differ from "
                        "that cut of the whole"
                    )

    def test_fused_parts_are_the_parts(self, format_case: FormatCase) -> None:
        """Fusing qkv or gate_up after decode equals stacking the dequantized parts."""
        fmt: CheckpointFormat = load(format_case.decl.impl)
        zeros = _zero_ranges(format_case.scheme)[0]
        weights = [_weight(format_case, n, 512, n, zeros=zeros) for n in (256, 128, 64)]
        parts = [_through(fmt, _with_shared_inputs(weight, weights[0])) for weight in weights]
        fused = concat(parts)
        assert torch.equal(fused.dequantize(), torch.cat([part.dequantize() for part in parts]))

    def test_stacked_experts_are_the_experts(self, format_case: FormatCase) -> None:
        """Stacking experts after decode equals stacking them dequantized."""
        fmt: CheckpointFormat = load(format_case.decl.impl)
        zeros = _zero_ranges(format_case.scheme)[0]
        experts = [_through(fmt, _weight(format_case, 128, 256, seed, zeros=zeros)) for seed in (4, 5, 6)]
        assert torch.equal(stack(experts).dequantize(), torch.stack([expert.dequantize() for expert in experts]))

    def test_config_says_what_was_written(self, format_case: FormatCase) -> None:
        """``parse`` of the config that was written gives every layer its quantization back, and 16 bit where that was "
        "said."""
        fmt: CheckpointFormat = load(format_case.decl.impl)
        weight = _weight(format_case, *SHAPES[0], seed=7, zeros=_zero_ranges(format_case.scheme)[0])
        quant = fmt.quant_for_scheme(weight)
        layers = {MODULE: quant, "model.layers.1.mlp.up_proj": quant, "model.layers.1.mlp.down_proj": None, "lm_head": None}
        written = fmt.quantization_config(layers)
        stored = fmt.encode(weight, quant)
        tensors = {name: t for module, q in layers.items() if q for name, t in _named(fmt, q, stored, module).items()}
        config = fmt.parse(_source(written, tensors))
        for module, meant in layers.items():
            found = config.quant_for(ModuleName((module,)))
            assert found == meant, f"{module} was written as {meant} and is read as {found}"

    def test_unknown_key_is_refused(self, format_case: FormatCase) -> None:
        """A key that may change the numbers and is not understood is an error that names it."""
        fmt: CheckpointFormat = load(format_case.decl.impl)
        weight = _weight(format_case, *SHAPES[0], seed=7, zeros=_zero_ranges(format_case.scheme)[0])
        quant = fmt.quant_for_scheme(weight)
        written = {**fmt.quantization_config({MODULE: quant}), "no_such_numerics": 3}
        with pytest.raises(ConfigError, match="no_such_numerics"):
            fmt.parse(_source(written, _named(fmt, quant, fmt.encode(weight, quant))))


def _zero_ranges(scheme: QuantScheme) -> list[tuple[int, int] | None]:
    """Ranges of zero points: one that every convention holds, then those with an end that some cannot."""
    part = scheme.weight
    assert part is not None
    if part.symmetric:
        return [None]
    top = 2**part.bits
    return [(1, top - 1), (0, top - 1), (1, top)]


def _weight(case: FormatCase, n: int, k: int, seed: int, **options: Any) -> QuantWeight:
    """A random weight, as the format can hold it, which it says by refusing."""
    weight = random_weight(case.scheme, n, k, torch.Generator().manual_seed(seed), **options)
    fmt: CheckpointFormat = load(case.decl.impl)
    for variant in (weight, *_variants(weight)):
        try:
            fmt.quant_for_scheme(variant)
        except CannotEncode:
            continue
        return variant
    return weight


def _variants(weight: QuantWeight) -> Iterator[QuantWeight]:
    """What formats store in its place: divisors for second-level scales; scales of few digits, so that a stored multiple is
    exact; float16 scales, and then a float16 shift for zero points."""
    act = weight.scheme.act
    local = act is not None and act.dynamic == "local"
    if weight.global_scale is not None or local:
        yield replace(weight, global_div=weight.global_scale is not None, act_div=local)
    elif weight.scales.dtype.itemsize > 1:
        yield replace(weight, scales=weight.scales.bfloat16().float())
        half = replace(weight, scales=weight.scales.half())
        yield half
        if weight.zeros is not None:
            yield replace(half, zeros=None, shift=(half.scales.float() * weight.zeros).half())


def _stored(case: FormatCase, fmt: CheckpointFormat, weight: QuantWeight) -> Iterator[tuple[LayerQuant, dict[str, Tensor]]]:
    """The weight in every layout that takes it."""
    for layout in case.decl.layouts:
        quant = LayerQuant(weight.scheme, layout)
        try:
            yield quant, fmt.encode(weight, quant)
        except CannotEncode:
            continue


def _through(fmt: CheckpointFormat, weight: QuantWeight) -> QuantWeight:
    """The weight as it comes back from the file."""
    quant = fmt.quant_for_scheme(weight)
    decoded = fmt.decode(fmt.encode(weight, quant), quant, weight.n, weight.k)
    assert isinstance(decoded, QuantWeight)
    return decoded


def _with_shared_inputs(part: QuantWeight, first: QuantWeight) -> QuantWeight:
    """Parts that are fused see the same input, so its quantization and the order of its columns are shared."""
    return replace(part, act_scale=first.act_scale, act_zero=first.act_zero, group_index=first.group_index)


def _named(fmt: CheckpointFormat, quant: LayerQuant, tensors: dict[str, Tensor], module: str = MODULE) -> dict[str, Tensor]:
    return {t.full_name(module): tensors[t.name] for t in fmt.tensors(quant) if t.name in tensors}


def _source(config: dict[str, Any], tensors: dict[str, Tensor]) -> Source:
    infos = MemorySource(tensors).tensors
    return Source(Path("memory"), {"quantization_config": config}, config, "config.json quantization_config", {}, infos, {})


def _check_declared(fmt: CheckpointFormat, quant: LayerQuant, tensors: dict[str, Tensor], n: int, k: int) -> None:
    declared = {t.name: t for t in fmt.tensors(quant)}
    unknown = tensors.keys() - declared.keys()
    assert not unknown, f"encode wrote {sorted(unknown)}, which tensors() does not declare"
    infos = MemorySource(tensors).tensors
    for name, stored in declared.items():
        if name not in tensors:
            assert stored.optional, f"encode did not write {name}, which tensors() declares and does not call optional"
            continue
        info, sizes = infos[name], {"N": n, "K": k}
        assert info.dtype in stored.dtypes, f"{name} was written as {info.dtype}; {stored.dtypes} is declared"
        assert stored.match(info.shape, sizes) is not None, (
            f"{name} was written as {list(info.shape)}; {stored.shapes(sizes)} is declared"
        )


def _windows(n: int, k: int) -> Iterator[tuple[int, int, int, int]]:
    equal = [tuple(i * 256 // world for i in range(world + 1)) for world in (2, 4)]
    for ends in [*equal, *CUTS]:
        for start, stop in pairwise(ends):
            yield start * n // 256, stop * n // 256, 0, k
            yield 0, n, start * k // 256, stop * k // 256
    yield 80, 171, 171, 342


def _difference(mine: QuantWeight, theirs: QuantWeight) -> str:
    """What differs between two weights, for messages."""
    mine_tensors, their_tensors = mine.tensors(), theirs.tensors()
    words = [
        f"{name} is {getattr(theirs, name)} and was {getattr(mine, name)}"
        for name in ("scheme", "block", "global_div", "act_div")
        if getattr(mine, name) != getattr(theirs, name)
    ]
    for name in sorted(mine_tensors.keys() | their_tensors.keys()):
        a, b = mine_tensors.get(name), their_tensors.get(name)
        if a is None or b is None:
            words.append(f"{name} is {'there' if a is None else 'missing'}")
        elif a.dtype != b.dtype or a.shape != b.shape:
            words.append(f"{name} is {b.dtype} {list(b.shape)} and was {a.dtype} {list(a.shape)}")
        elif not _same_bits(a, b):
            words.append(f"{int((a != b).sum())} of {a.numel()} values of {name} differ")
    return "; ".join(words)
