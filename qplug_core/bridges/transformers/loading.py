"""One load: plan and exact cover before a weight is read, modules on meta, weights when transformers has read its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from ...device import Device
from ...engine.describe import describe, is_transposed
from ...engine.engine import cache_coders
from ...engine.memory import Heap, trim
from ...engine.modules import QuantEmbedding, QuantLinear
from ...engine.names import StoredNames, left_out
from ...engine.place import fill_slot, place_experts, place_layer, plain_weight
from ...engine.slab import Coders
from ...errors import CheckpointError, CoverError, UsageError
from ...method import QuantMethod
from ...planner import Planner
from ...quant_plan import QuantPlan
from ...registry import get_registry
from ...repository import open_checkpoint
from ...source import Source
from . import log
from .config import QplugConfig
from .parallel import check_style, local_layers, plan_of, world_of

CHECK = "_adjust_missing_and_unexpected_keys"
"""What transformers calls on a model when it knows which weights it did not find."""


class Loading:
    """A model of transformers on its way from a checkpoint.

    Plain parameters are read by transformers, with its devices and shardings. What is quantized is read by the
    methods of the plan, from the same files.
    """

    def __init__(self, model: Any, config: QplugConfig, dtype: torch.dtype, device: str, files: list[str] | None) -> None:
        """Plan, check the cover, and put modules in place; nothing is read but headers.

        :raises QplugError: and nothing is loaded.
        """
        self.model, self.config, self.dtype, self.device = model, config, dtype, device
        self.registry = get_registry()
        with plain_torch():
            self.source = open_files(files)
            target = Device.cpu() if device == "cpu" else Device.current()
            name = str(dtype).removeprefix("torch.")
            self.planner = Planner(
                self.source, target, name, config.policy, config.scheme, self.registry, kv_cache=config.kv_cache
            )
            self.described = describe(model, StoredNames(model, self.source.tensors, self.planner.model_name))
            self.planner.config.ignorable.update(left_out(model, self.source.tensors))
            self.rank, self.world = world_of(model)
            self.styles = plan_of(model, self.world)
            layers = local_layers(model, self.described, self.styles, self.rank, self.world)
            self.plan: QuantPlan = self.planner.plan(layers, self.described.slots)
            self.methods: dict[str, QuantMethod] = {}
            self._place()
        if not callable(getattr(model, CHECK, None)):
            raise AttributeError(f"PreTrainedModel has no {CHECK}")
        setattr(model, CHECK, MethodType(self._check, model))

    def finish(self) -> None:
        """Read, decode and pack every quantized layer."""
        for name in [n for n in vars(self.model) if n == CHECK]:
            delattr(self.model, name)
        heap = Heap()
        for decision in self.plan.decisions:
            method = self.methods.get(decision.layer.name)
            if method is not None:
                method.load(self.source)
                heap.loaded(method.nbytes)
            self.registry.layer_ready(decision.layer, decision)
        trim()
        self._check_complete()
        if self.plan.caches:
            log.warning(
                "%s has a quantized KV cache, and transformers makes 16-bit ones; give generate() past_key_values=new_cache(model) "
                "from qplug_core.bridges.transformers, or load with QplugConfig(kv_cache='16bit')",
                self.source.path,
            )
        log.info("%s", self.plan.report())

    @property
    def coders(self) -> dict[int, Coders]:
        """What quantizes keys and values, by layer of the cache."""
        return {self.described.attention[c.layer]: cache_coders(self.planner, c) for c in self.plan.caches}

    def _place(self) -> None:
        whole = {name for name in self.described.experts if self._any_quantized(name)}
        self.described.experts = {name: count for name, count in self.described.experts.items() if name in whole}
        self.transposed = {name: is_transposed(self.model.get_submodule(name)) for name in whole}
        for decision in self.plan.decisions:
            layer = decision.layer
            if layer.op == "experts" and layer.name.rsplit(".", 2)[0] not in whole:
                continue
            if layer.op != "experts" and not decision.quantized:
                continue
            check_style(self.styles, layer)
            method = self.planner.method(decision, self.device)
            self.methods[layer.name] = method
            if layer.op != "experts":
                original = self.model.get_submodule(layer.name)
                place_layer(self.model, decision, method, self.dtype)
                self._mark(layer.name, original)
        place_experts(self.model, self.described, self.methods)
        for name in self.described.experts:
            self._mark(name, self.model.get_submodule(name).original)
        if self.world > 1:
            gone = [f"{name}.{leaf}" for name in whole for leaf in ("gate_up_proj", "up_proj", "down_proj")]
            plan = self.model.tp_plan
            self.model.tp_plan = {rule: style for rule, style in plan.items() if not any(fnmatchcase(n, rule) for n in gone)}

    def _any_quantized(self, experts: str) -> bool:
        return any(d.quantized for d in self.plan.decisions if d.layer.name.startswith(f"{experts}."))

    def _mark(self, name: str, original: Any) -> None:
        """Tell transformers what it asks of quantized modules: not to initialize them, and that they hold a rank's part."""
        module: Any = self.model.get_submodule(name)
        for each in (module, original):
            each._is_hf_initialized = True
        module._hf_quantized_needs_local_tp = True
        if isinstance(module, QuantLinear):
            # Its tensor-parallel styles look at the whole widths.
            module.in_features, module.out_features = original.in_features, original.out_features
            extra: Any = module
            extra.infeatures, extra.outfeatures = original.in_features, original.out_features  # PEFT's names for them.
            extra.source = self.source
        elif isinstance(module, QuantEmbedding):
            if f"{name}.weight" in dict(getattr(self.model, "all_tied_weights_keys", {})).values():
                raise UsageError(
                    f"{name} is quantized and its weight is shared with another layer, which qplug does not load into transformers"
                )
            if module.scale is not None:
                module.scale = torch.tensor(float(original.scalar_embed_scale))

    def _check(self, model: Any, loading_info: Any) -> None:
        """In the place of transformers' report of missing and unexpected weights.

        Tensors that it did not take were claimed by the plan, or the load had been refused. Parameters that it did not
        fill, because the checkpoint holds them in another shape, are filled here.
        """
        getattr(type(model), CHECK)(model, loading_info)
        loading_info.unexpected_keys = set()
        lost = sorted(name for name in loading_info.missing_keys if not self._fill(name))
        wrong = sorted(str(key[0] if isinstance(key, tuple) else key) for key in loading_info.mismatched_keys)
        failed = [*loading_info.conversion_errors, *loading_info.error_msgs]
        loading_info.missing_keys = set(lost)
        if found := [*lost, *wrong, *map(str, failed)]:
            raise CoverError(
                f"{self.source.path}: transformers gave no value to {found[0]}{f' and {len(found) - 1} more' if found[1:] else ''}, which the plan "
                "says the checkpoint holds; load it with qplug_core.load, and report the model"
            )

    def _fill(self, name: str) -> bool:
        """Fill one parameter or buffer from the checkpoint; False where that is not to be had."""
        if hasattr(self.model.get_parameter_or_buffer(name), "device_mesh"):
            return False  # A rank's part: transformers alone knows which.
        own = name.replace(".original.", ".")  # Experts keep their biases in the module that they replace.
        with plain_torch():
            slot = next((s for s in self.described.slots if s.name == own), None)
            if slot is not None:
                return fill_slot(self.model, slot, self.source, self.device, name)
            layer = own.removesuffix(".weight")
            if layer not in self.plan or self.plan[layer].quantized or own == layer:
                return False
            target = self.model.get_submodule(layer)
            value = plain_weight(self.source, self.plan[layer])
            target.weight = torch.nn.Parameter(value.to(self.device, target.weight.dtype), requires_grad=False)
        return True

    def _check_complete(self) -> None:
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        empty = [name for name, tensor in tensors if tensor.is_meta]
        if empty:
            raise CheckpointError(f"{empty[0]} and {len(empty) - 1} more parameters got no value from {self.source.path}")


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """torch as it is outside of ``from_pretrained``, which makes models on meta and in the model's dtype."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def open_files(files: list[str] | None) -> Source:
    """The checkpoint that transformers found: one GGUF file, or safetensors files.

    :raises UsageError: for weights that are neither, or not those that the folder is known by.
    """
    if files and files[0].endswith(".gguf"):
        return open_checkpoint(files[0], get_registry())
    if not files or not all(file.endswith(".safetensors") for file in files):
        raise UsageError(
            f"the weights are {Path(files[0]).name if files else 'a state dict'}; qplug reads *.safetensors in one folder, so save them as that"
        )
    folder = Path(files[0]).parent
    source = Source.open(folder)
    known = {info.file.name for info in source.tensors.values()}
    if other := {Path(file).name for file in files} ^ known:
        raise UsageError(
            f"transformers opened {len(files)} files and {folder} is known by {len(known)} ({sorted(other)[0]} is the difference); "
            "give a folder with this checkpoint alone"
        )
    return source
