"""What the headers of a checkpoint say of its FP8 layers: names of scales, granularity, static activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from qplug_core.axes import FLOATS
from qplug_core.config import ModuleName
from qplug_core.errors import ConfigError
from qplug_core.match import Matcher, Named
from qplug_core.source import Source, TensorInfo

from .layouts import LAYOUTS, PLAIN, Layout

FP8_DTYPES = {"F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2"}
E8M0_DTYPES = ("F8_E8M0", "U8")
"""Seen for powers of two: some producers lack the dtype and write the bytes."""
EXTENTS = (128, 64, 32, 256, 16, 512)
"""Block extents that are tried, in this order, where a config does not say them."""


@dataclass(frozen=True)
class Found:
    """One FP8 matrix: ``shape`` [N, K], the shape and dtype of its scale, whether a static activation scale lies beside it."""

    module: str
    family: tuple[Layout, ...]
    dtype: str
    shape: tuple[int, int]
    scale_shape: tuple[int, ...]
    e8m0: bool
    static: bool

    def granularity(self, block: tuple[int, int] | None) -> str:
        """tensor, channel or block, in a checkpoint whose blocks are ``block`` (None: it has none)."""
        n = self.shape[0]
        if block is not None and len(self.scale_shape) == 2:
            return "block"
        if all(length == 1 for length in self.scale_shape):
            return "tensor"
        return "channel" if self.scale_shape in ((n,), (n, 1)) else "block"


EXPERT_SCALES = {"gate_up_proj_scale_inv": ("gate_proj", "up_proj"), "down_proj_scale_inv": ("down_proj",)}
"""Scales of all experts of a layer in one tensor ``[E, rows, columns]``, and the projections that its rows belong to."""


def split_expert_scales(source: Source) -> int:
    """Scales of all experts, where codes are stored one expert at a time (transformers 5), under a name for each; how many were split.

    :raises ConfigError: where their number or rows do not fit the experts that are stored.
    """
    found = [name for name in source.tensors if name.endswith(tuple(f".experts.{ending}" for ending in EXPERT_SCALES))]
    count = 0
    for name in found:
        parent, _, ending = name.rpartition(".")
        if name.removesuffix("_scale_inv") in source.tensors:
            continue
        parts, shape = EXPERT_SCALES[ending], source.tensors[name].shape
        modules = [[f"{parent}.{e}.{part}" for part in parts] for e in range(shape[0])]
        beyond = f"{parent}.{shape[0]}.{parts[0]}.weight"
        missing = [m for group in modules for m in group if f"{m}.weight" not in source.tensors]
        if len(shape) != 3 or shape[1] % len(parts) or missing or beyond in source.tensors:
            wrong = (
                f"{missing[0]}.weight is not stored"
                if missing
                else f"{beyond} is stored"
                if beyond in source.tensors
                else "rows"
            )
            raise ConfigError(
                f"{name} has shape {list(shape)} and {wrong}; scales of all experts, {' and '.join(parts)} of equal height, were "
                "needed, so save the checkpoint again"
            )
        rows = shape[1] // len(parts)
        source.split(name, [(f"{module}.weight_scale_inv", rows) for group in modules for module in group])
        count += 1
    return count


def survey(tensors: Mapping[str, TensorInfo]) -> list[Found]:
    """Every FP8 matrix that has a scale.

    :raises ConfigError: for files that are known to be broken, with what broke them.
    """
    found = []
    for name, info in tensors.items():
        _check_scale_without_codes(name, info, tensors)
        if info.dtype not in FP8_DTYPES:
            continue
        if len(info.shape) == 3 and f"{name}_scale_inv" in tensors:
            found.append(_found(name, (LAYOUTS["fp8_experts"],), info, tensors[f"{name}_scale_inv"], False))
        if len(info.shape) != 2 or not name.endswith(".weight"):
            continue
        module = name.removesuffix(".weight")
        scales = dict.fromkeys(layout.scale for layout in PLAIN if f"{module}.{layout.scale}" in tensors)
        if len(scales) > 1:
            raise ConfigError(
                f"{module} has {' and '.join(scales)} beside one weight; one scale was needed, so remove the one that the "
                "tool did not mean"
            )
        for scale in scales:
            family = tuple(layout for layout in PLAIN if layout.scale == scale)
            static = any(layout.act and f"{module}.{layout.act}" in tensors for layout in family)
            found.append(_found(module, family, info, tensors[f"{module}.{scale}"], static))
    return found


def _found(module: str, family: tuple[Layout, ...], info: TensorInfo, scale: TensorInfo, static: bool) -> Found:
    experts = len(info.shape) - 2
    shape, scale_shape = info.shape[experts:], scale.shape[experts:]
    if len(scale_shape) == 1 and scale_shape[0] not in (1, shape[0]):
        raise ConfigError(
            f"{scale.name} has {scale_shape[0]} values for a weight {list(shape)}, one for each of the shards that vLLM fused; which "
            "rows they mean is not stored, so use the checkpoint that vLLM loaded"
        )
    return Found(
        module, family, FP8_DTYPES[info.dtype], (shape[0], shape[1]), scale_shape, scale.dtype in E8M0_DTYPES, static
    )


def _check_scale_without_codes(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> None:
    if name.endswith(".weight_scale_inv"):
        weight = tensors.get(name.removesuffix("_scale_inv"))
        if weight is not None and weight.dtype in FLOATS:
            raise ConfigError(
                f"{weight.name} is {weight.dtype} and has a weight_scale_inv, so the tool gave up on quantizing it (transformers "
                f"does where a shape, here {list(weight.shape)}, is no multiple of the block) and the scale is not initialised; "
                "quantize the model again with another tool"
            )


def block_of(found: Iterable[Found]) -> tuple[int, int] | None:
    """The block extent ``(bn, bk)`` that all grids of scales agree on; None where there are no grids.

    :raises ConfigError: where no usual extent fits.
    """
    grids = [f for f in found if f.granularity(None) == "block" and len(f.scale_shape) == 2]
    if not grids:
        return None
    extents = []
    for axis in (0, 1):
        fits = [b for b in EXTENTS if all(-(-f.shape[axis] // b) == f.scale_shape[axis] for f in grids)]
        if not fits:
            first = grids[0]
            raise ConfigError(
                f"the config has no weight_block_size, and {first.module} [{first.shape[0]}, {first.shape[1]}] has scales "
                f"{list(first.scale_shape)}, which fit no usual block; add weight_block_size to the config"
            )
        extents.append(fits[0])
    return (extents[0], extents[1])


@dataclass
class ModuleSet(Matcher):
    """Modules by exact name, as the headers list them: one look-up, however many there are."""

    names: frozenset[str] = field(default=frozenset(), compare=False)

    @classmethod
    def of(cls, names: Iterable[str]) -> ModuleSet:
        """The matcher of ``names``."""
        listed = sorted(names)
        text = listed[0] if len(listed) == 1 else f"{listed[0]} and {len(listed) - 1} more"
        return cls(text, "exact", names=frozenset(listed))

    def matches(self, module: Named) -> bool:
        """True where one of the module's names is in the set."""
        return any(name in self.names for name in module.all_names)


def modules_meant(found: Iterable[Found], matchers: Iterable[Matcher]) -> Iterator[str]:
    """Names of FP8 matrices that some matcher means, without counting a hit."""
    listed = list(matchers)
    for f in found:
        if any(m.matches(ModuleName((f.module,))) for m in listed):
            yield f.module
