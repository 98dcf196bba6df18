"""QuantMethod: what an engine holds for one layer. HubMethod binds format, scheme and kernel, and serves nearly everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .axes import Axis, StoredTensor, Window, covering, slices
from .config import LayerQuant
from .errors import CheckpointError, DecodeError, PluginError, SplitRequired
from .format import CheckpointFormat
from .kernel import Kernel, PackedWeight, problem_of
from .layer import LayerSpec, StoredPart
from .quant_plan import Decision, Segment
from .quantizer import Quantizer
from .resolve import Choice, Resolver
from .scheme import QuantScheme
from .source import TensorInfo
from .weight import OpaqueWeight, QuantWeight, concat, without_act

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .decl import QuantizerDecl
    from .registry import Registry


FLOATING = (torch.float16, torch.bfloat16, torch.float32)


class TensorSource(Protocol):
    """Where tensors come from: a :class:`~qplug_core.source.Source` or :class:`~qplug_core.source.MemorySource`."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Headers by stored name."""
        ...

    def read(self, name: str, index: tuple[slice | int, ...] = ()) -> Tensor:
        """A tensor or a cut of it."""
        ...

    def transpose(self, name: str) -> None:
        """See a matrix that is stored ``[K, N]`` as ``[N, K]``."""
        ...

    def release(self, name: str) -> None:
        """The tensor is not needed again soon."""
        ...


class QuantMethod(Protocol):
    """One layer's weights and how to multiply with them. A method that does not fit the hub implements this."""

    decision: Decision

    def load(self, source: TensorSource) -> None:
        """Read, decode and pack the weights of the layer."""
        ...

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [*, K]`` to ``[*, N]`` (embedding: LongTensor ``[*]`` to ``[*, K]``)."""
        ...

    def reload(self, source: TensorSource) -> None:
        """Load again into the storage in use, so that every address stays."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        ...


@dataclass
class _Run:
    """Rows of a layer with one packed weight, and the kernel that multiplies them (None: a plain 16-bit weight)."""

    kernel: Kernel | None
    packed: PackedWeight


@dataclass
class HubMethod:
    """decode -> narrow -> concat -> pack, for every segment of a decision, and one product for each.

    ``dtype``: of activations; parts that stay at 16 bit are held in it. ``notes``: what turned out at load and could
    not be known from headers.
    """

    decision: Decision
    resolver: Resolver
    layout: Callable[[str], CheckpointFormat]
    dtype: torch.dtype
    device: torch.device | str = "cpu"
    notes: list[str] = field(default_factory=list)
    _runs: list[_Run] = field(default_factory=list)
    _apply: Callable[..., Tensor] | None = None

    def load(self, source: TensorSource) -> None:
        """See :class:`QuantMethod`."""
        self._runs = self._build(source, None)
        self._bind()

    def reload(self, source: TensorSource) -> None:
        """See :class:`QuantMethod`.

        :raises CheckpointError: where the new weights need other kernels or storage than those in use.
        """
        previous = self._runs
        fresh = self._build(source, previous)
        if len(fresh) != len(previous):
            raise CheckpointError(
                f"{self.decision.layer.name} was loaded as {len(previous)} weights and the new ones need {len(fresh)}; load the model again"
            )
        self._runs = fresh

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :class:`QuantMethod`."""
        if self._apply is not None:
            return self._apply(x, self._runs[0].packed, bias)
        pieces = [_product(run, x) for run in self._runs]
        y = torch.cat(pieces, dim=-1)
        return y if bias is None else y + bias

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(run.packed.nbytes for run in self._runs)

    @property
    def packed(self) -> tuple[PackedWeight, ...]:
        """The packed weights, in order of the rows."""
        return tuple(run.packed for run in self._runs)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels in use, in order of the rows."""
        return tuple(run.kernel.name if run.kernel else "16 bit" for run in self._runs)

    def tensors(self) -> dict[str, Tensor]:
        """The packed tensors by name, for engines that register them as buffers."""
        return {f"{i}.{name}": t for i, run in enumerate(self._runs) for name, t in run.packed.tensors.items()}

    def weights(self, source: TensorSource) -> list[tuple[StoredPart, Segment, QuantWeight | OpaqueWeight | Tensor]]:
        """Each part as it is before packing, for engines that save or dequantize what they loaded; 16-bit parts are tensors."""
        parts = [(part, segment) for segment in self.decision.segments for part in segment.parts]
        return [(part, segment, self._weights(replace(segment, parts=(part,)), source)[0]) for part, segment in parts]

    def _bind(self) -> None:
        only = self._runs[0].kernel if len(self._runs) == 1 else None
        self._apply = only.apply if only is not None else None

    def _build(self, source: TensorSource, previous: list[_Run] | None) -> list[_Run]:
        runs: list[_Run] = []
        for segment in self.decision.segments:
            for weight in self._weights(segment, source):
                old = previous[len(runs)] if previous and len(runs) < len(previous) else None
                runs.append(self._pack(weight, segment, old))
        for segment in self.decision.segments:
            for name in stored_names(segment, source, self.layout):
                source.release(name)
        return runs

    def _weights(self, segment: Segment, source: TensorSource) -> Sequence[QuantWeight | OpaqueWeight | Tensor]:
        layer = self.decision.layer
        if segment.quant is None:
            plain = [read_plain(source, layer, part) for part in segment.parts]
            if segment.online is None:
                return (
                    [torch.cat(plain).to(self.device, self.dtype)]
                    if len(plain) > 1
                    else [plain[0].to(self.device, self.dtype)]
                )
            scheme = segment.scheme
            assert scheme is not None
            quantizer = online_quantizer(self.resolver, scheme)
            weights: list[Any] = [quantizer.quantize(w, scheme) for w in plain]
        else:
            fmt = self.layout(segment.quant.layout)
            weights = [decode_part(source, fmt, segment.quant, layer, part) for part in segment.parts]
            if segment.weight_only:
                weights = [without_act(weight) for weight in weights]
        if len(weights) == 1 or any(isinstance(w, OpaqueWeight) for w in weights):
            return weights
        try:
            return [concat(weights, by_row=segment.online is not None)]
        except SplitRequired as reason:
            self.notes.append(str(reason))
            return weights

    def _pack(self, weight: QuantWeight | OpaqueWeight | Tensor, segment: Segment, old: _Run | None) -> _Run:
        if isinstance(weight, Tensor):
            packed = PackedWeight("16 bit", weight.shape[0], weight.shape[1], {"weight": weight})
            return _Run(None, packed if old is None else old.packed.refill(packed))
        assert segment.choice is not None
        weight = weight.to(self.device)
        kernel = self.resolver.kernel(self._choose(weight, segment.choice).kernel)
        if old is not None and (old.kernel is None or old.kernel.name != kernel.name):
            raise CheckpointError(
                f"{self.decision.layer.name} runs on {old.kernel.name if old.kernel else '16 bit'} and the new weights need {kernel.name}; "
                "load the model again"
            )
        try:
            return _Run(kernel, kernel.pack(weight, None if old is None else old.packed))
        except ValueError as reason:
            if old is None:
                raise
            raise CheckpointError(
                f"{self.decision.layer.name}: the new weights need other storage ({reason}); load the model again"
            ) from None

    def _choose(self, weight: QuantWeight | OpaqueWeight, planned: Choice) -> Choice:
        """The planned kernel, or another where the weights are more general than headers and config said."""
        layer = self.decision.layer
        dtype = str(self.dtype).removeprefix("torch.")
        problem = problem_of(weight, layer.op, dtype)
        decl = self.resolver.registry.kernel(planned.kernel).decl
        reasons = self.resolver.refusals(decl, problem)
        if not reasons:
            return planned
        actual = self.resolver.choose(problem, layer.name)
        self.notes.append(
            f"the weights are {problem.scheme}: {planned.kernel} does not take them ({reasons[0]}), {actual.kernel} does"
        )
        return actual


def _product(run: _Run, x: Tensor) -> Tensor:
    if run.kernel is None:
        return torch.nn.functional.linear(x, run.packed.tensors["weight"])
    return run.kernel.apply(x, run.packed, None)


def online_quantizer(resolver: Resolver, scheme: QuantScheme) -> Quantizer:
    """The quantizer for load-time quantization: the first by name that takes the scheme, round to nearest before others.

    :raises PluginError: where none is installed.
    """
    quantizer: Quantizer = resolver.registry.load(online_decl(resolver.registry, scheme))
    return quantizer


def online_decl(registry: Registry, scheme: QuantScheme) -> QuantizerDecl:
    """The declaration of :func:`online_quantizer`, which a plan asks for before anything is loaded."""
    found = [e.decl for e in registry.quantizers if not e.decl.calibrated and e.decl.makes(scheme)]
    if not found:
        raise PluginError(
            f"no installed quantizer makes {scheme} from a 16-bit weight at load; see the online column of `qplug list-methods`"
        )
    return min(found, key=lambda d: (d.name != "rtn", d.name))


def decode_part(
    source: TensorSource, fmt: CheckpointFormat, quant: LayerQuant, layer: LayerSpec, part: StoredPart
) -> QuantWeight | OpaqueWeight:
    """The rows of ``part`` and the columns of ``layer`` that this rank holds, as one weight of the hub.

    Reads the smallest window that the stored tensors can be cut at, decodes it as a layer of its own, and narrows
    it to the rows and columns that were asked for.
    """
    stored_n = part.stored_n or part.n
    n0, n1 = part.rows or (0, stored_n)
    k0, k1 = layer.columns or (0, layer.k)
    matched = _matched(source, fmt, quant, layer, part)
    window = covering(matched, Window(n0, n1, k0, k1), stored_n, layer.k)
    tensors = {}
    for tensor, axes in matched.items():
        index: tuple[slice | int, ...] = slices(tensor, axes, window, layer.k)
        if part.expert is not None and any(a.var == "E" for a in axes):
            index = tuple(part.expert if a.var == "E" else i for a, i in zip(axes, index, strict=True))
        tensors[tensor.name] = source.read(tensor.full_name(part.name), index)
    weight = fmt.decode(tensors, quant, window.n1 - window.n0, window.k1 - window.k0)
    if isinstance(weight, QuantWeight):
        _check_finite(weight, part)
    cut = ((n0 - window.n0, n1 - window.n0), (k0 - window.k0, k1 - window.k0))
    return weight.narrow(*cut)


def _check_finite(weight: QuantWeight, part: StoredPart) -> None:
    """Refuse scales that make every product NaN or infinite, which no later step would notice."""
    for name, values in weight.tensors().items():
        # A sum is one pass without a mask; what overflows it is looked at again.
        if values.dtype in FLOATING and not bool(values.sum(dtype=torch.float32).isfinite()):
            bad = int((~values.isfinite()).sum())
            if bad:
                raise DecodeError(
                    f"{bad} of {values.numel()} {name} of {part.name} are NaN or infinite; finite ones were needed, so fetch the file again or "
                    "quantize the layer again"
                )


def _matched(
    source: TensorSource, fmt: CheckpointFormat, quant: LayerQuant, layer: LayerSpec, part: StoredPart
) -> dict[StoredTensor, tuple[Axis, ...]]:
    sizes = {"N": part.stored_n or part.n, "K": layer.k}
    matched = {}
    for tensor in fmt.tensors(quant):
        info = source.tensors.get(tensor.full_name(part.name))
        if info is None and tensor.optional:
            continue
        if info is None:
            raise CheckpointError(
                f"{tensor.full_name(part.name)} is missing; {quant.layout} needs it, so fetch the checkpoint again"
            )
        if part.expert is not None and tensor.axes and "E" in tensor.axes:
            sizes["E"] = info.shape[0]
        axes = tensor.match(info.shape, sizes)
        if axes is None:
            raise CheckpointError(
                f"{info.name} has shape {list(info.shape)}; {quant.layout} needs {tensor.shapes(sizes)}, so the file and its config differ"
            )
        matched[tensor] = axes
    return matched


def read_plain(source: TensorSource, layer: LayerSpec, part: StoredPart) -> Tensor:
    """The 16-bit weight of a part, rows and columns of this rank, as stored."""
    rows = slice(*part.rows) if part.rows else slice(None)
    columns = slice(*layer.columns) if layer.columns else slice(None)
    index: tuple[slice | int, ...] = (columns, rows) if part.transposed else (rows, columns)
    weight = source.read(plain_name(source, part), index if part.expert is None else (part.expert, *index))
    return weight.t().contiguous() if part.transposed else weight


def plain_name(source: TensorSource, part: StoredPart) -> str:
    """Stored name of a 16-bit weight: experts that are one tensor have no ``.weight``."""
    return part.name if part.name in source.tensors else f"{part.name}.weight"


def stored_names(segment: Segment, source: TensorSource, layout: Callable[[str], CheckpointFormat]) -> list[str]:
    """Names of all stored tensors of a segment that are present."""
    names = []
    for part in segment.parts:
        if segment.quant is None:
            names.append(plain_name(source, part))
        else:
            names += [t.full_name(part.name) for t in layout(segment.quant.layout).tensors(segment.quant)]
    return [name for name in names if name in source.tensors]
