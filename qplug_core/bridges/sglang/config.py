"""The ``quantization_config`` of a checkpoint as SGLang holds it: claims checkpoints, plans layers, hands out methods."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.runtime_context import get_server_args
from sglang.srt.utils import is_hip

from ...config import ModuleName
from ...device import Device
from ...errors import CheckpointError, PluginError, QplugError, UsageError
from ...layer import LayerSpec
from ...method import QuantMethod
from ...planner import Planner, assumed_source
from ...quant_plan import Decision, QuantPlan
from ...registry import get_registry
from ...repository import is_repository, open_headers
from ...source import Source
from . import NAME, changed, log
from .policy import OPTIONS, Claim, Options, decide, has_fp8_scales

_said: set[str] = set()
ADDED = ("packed_modules_mapping", "hf_config", "requantization_method")
"""Keys that SGLang writes into the ``quantization_config`` that it hands on."""
EMBEDDINGS = ("embed_tokens", "word_embeddings", "tok_embeddings", "wte")


class QplugConfig(QuantizationConfig):
    """Of one checkpoint.

    ``config``: the dict of config.json with what SGLang adds to it; empty for a 16-bit checkpoint that ``--quantization qplug``
    was given for.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        given = dict(config or {})
        hf_config: Any = given.get("hf_config")
        text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
        self.packed_modules_mapping = dict(given.get("packed_modules_mapping") or {})
        self.config = {key: value for key, value in given.items() if key not in ADDED}
        self.model = str(getattr(hf_config, "_name_or_path", "") or get_server_args().model_path)
        self.tied = bool(getattr(text, "tie_word_embeddings", False))
        self.mapper: Any = None
        self._planner: Planner | None = None
        self._stored: dict[str, str] | None = None
        self._plans: dict[str, QuantPlan] = {}
        self._waiting: set[str] = set()
        _check_engine()
        try:
            self.planner()
        except QplugError as error:
            raise ValueError(str(error)) from None

    # What SGLang asks of every quantization config.

    def get_name(self) -> str:
        """The name under which SGLang knows this config."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What the reference kernels take, which is everything."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """None: kernels refuse by themselves."""
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: core finds the files beside config.json."""
        return []

    def get_scaled_act_names(self) -> list[str]:
        """None: a scale of activations is part of the weight that follows."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QplugConfig:
        """From the dict in config.json."""
        return cls(config)

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None) -> str | None:
        """``qplug`` where qplug serves the checkpoint; the log says who does, and why.

        :raises ValueError: one sentence, where only qplug could serve it and cannot.
        """
        config = {key: value for key, value in dict(hf_quant_cfg or {}).items() if key not in ADDED}
        try:
            claim = decide(config, user_quant, _own(cls, hf_quant_cfg, user_quant), get_registry())
        except PluginError as error:
            claim = Claim(False, f"qplug cannot run ({error})")
        except QplugError as error:
            raise ValueError(str(error)) from None
        if claim is None:
            return None
        if claim.qplug and is_hip():
            # ModelConfig._verify_quantization has a fixed list of methods for ROCm, which no plugin can add to.
            claim = Claim(False, "SGLang refuses on ROCm every method that is not in a list of its own")
        _say(
            f"{'qplug' if claim.qplug else 'SGLang'} serves the {config.get('quant_method', '')} checkpoint: {claim.reason}"
        )
        return NAME if claim.qplug else None

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        """How stored names become SGLang's."""
        self.mapper = hf_to_sglang_mapper
        self._stored = None

    @property
    def kv_cache_quant_algo(self) -> str | None:
        """``FP8`` makes SGLang keep an FP8 cache where the user asked for none."""
        kv = self.planner().config.kv
        return "FP8" if kv is not None and has_fp8_scales(kv) else None

    def is_linear_unquantized(self, prefix: str) -> bool:
        """Whether a linear layer stays at 16 bit, as the config says it: SGLang asks before there is a layer."""
        from .layers import part_names

        planner = self.planner()
        names = [self.stored(name) for name in part_names(prefix, self.packed_modules_mapping)]
        return not planner.online and all(
            planner.config.quant_for(ModuleName((name, prefix), "Linear")) is None for name in names
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method of one layer: qplug's, or None for SGLang's own where it stays at 16 bit.

        :raises ValueError: one sentence.
        """
        from .methods import method_for

        try:
            return method_for(self, layer, prefix)
        except QplugError as error:
            raise ValueError(str(error)) from None

    # What qplug's methods ask.

    def plan(self, specs: list[LayerSpec], dtype: torch.dtype) -> QuantPlan:
        """The decisions for the parts of one layer.

        :raises QplugError: where the checkpoint does not hold what the layer needs.
        """
        key = specs[0].name
        self._plans[key] = self.planner(dtype).plan(specs, complete=False)
        return self._plans[key]

    def planner(self, dtype: torch.dtype | None = None) -> Planner:
        """The planner of this checkpoint, from its headers where they can be read, else from the config alone.

        ``dtype``: of activations; the planner is made again where it turns out to be another than was assumed.

        :raises UsageError: where ``--quantization qplug`` was given for a 16-bit checkpoint without a scheme.
        """
        name = str(dtype or torch.get_default_dtype()).removeprefix("torch.")
        if self._planner is not None and (dtype is None or self._planner.dtype == name):
            return self._planner
        options = Options.read(os.environ)
        source = self._planner.source if self._planner is not None else self._source()
        if source.quant_config is None and not source.files and options.quantize is None:
            raise UsageError(
                f"{self.model} is 16 bit and --quantization {NAME} does not say what to make of it; set "
                f'{OPTIONS}=\'{{"quantize": "W4A16_g128"}}\', or leave the flag out'
            )
        self._planner = Planner(source, _device(), name, options.policy, options.quantize, assumed=not source.tensors)
        return self._planner

    def stored(self, module: str) -> str:
        """The stored name of what SGLang calls ``module``; some of its models leave out the ``model.`` in front."""
        if self._stored is None:
            names = [] if self._planner is None else list(self._planner.source.tensors)
            whole = {self._renamed(name).rpartition(".")[0]: name.rpartition(".")[0] for name in names}
            self._stored = {engine.removeprefix("model."): name for engine, name in whole.items()} | whole
        return self._stored.get(module, module)

    def _renamed(self, name: str) -> str:
        return name if self.mapper is None else self.mapper._map_name(name) or name

    def embedding(self) -> str:
        """The input embedding, which some of SGLang's models make without a name; an empty string where the file does not say."""
        self.stored("")
        found = {name for name in (self._stored or {}).values() if name.rpartition(".")[2] in EMBEDDINGS}
        return found.pop() if len(found) == 1 else ""

    def bind(self, decision: Decision, dtype: torch.dtype) -> QuantMethod:
        """The method that multiplies with one layer."""
        planner = self.planner(dtype)
        return planner.method(decision, planner.device.torch_device())

    def wait_for(self, prefix: str) -> None:
        """A layer whose weights will come."""
        self._waiting.add(prefix)

    def arrived(self, prefix: str) -> None:
        """A layer is loaded; after the last one the log has the plan."""
        self._waiting.discard(prefix)
        if self._waiting or not self._plans:
            return
        plans = list(self._plans.values())
        decisions = tuple(decision for plan in plans for decision in plan.decisions)
        _say(f"qplug loaded {replace(plans[-1], decisions=decisions).report()}")

    def _source(self) -> Source:
        """The checkpoint's configs and headers; the config alone where SGLang's loader knows of files that core does not."""
        if not self.model or not (Path(self.model).exists() or is_repository(self.model)):
            return assumed_source(self.config)
        try:
            source = open_headers(self.model)
        except CheckpointError as error:
            _say(f"qplug plans from the config alone: {error}")
            return assumed_source(self.config)
        if source.quant_config is None and self.config:
            source.quant_config, source.quant_config_from = self.config, "the quantization_config that SGLang gave"
        return source


def _own(cls: type, config: Any, asked: str | None) -> str:
    """The method of SGLang that takes a checkpoint, as SGLang would find it without qplug; empty where there is none."""
    table = import_module("sglang.srt.layers.quantization").QUANTIZATION_METHODS
    others = {name: method for name, method in table.items() if method is not cls}
    for method in others.values():
        if found := method.override_quantization_method(config, asked):
            return str(found)
    named = str((config or {}).get("quant_method", "")).lower()
    return named if named in others else ""


def _device() -> Device:
    """The device that SGLang makes the model on."""
    return Device.cpu() if torch.get_default_device().type == "cpu" else Device.current()


def _check_engine() -> None:
    """Import all that touches SGLang, before anything is loaded.

    :raises ValueError: one sentence, where SGLang is not as this bridge knows it.
    """
    try:
        from . import experts, kv_cache, linear, methods  # noqa: F401
    except (ImportError, AttributeError) as error:
        raise ValueError(changed(error)) from None


def _say(text: str) -> None:
    """Log once in each process."""
    if text not in _said:
        _said.add(text)
        log.info("%s", text)
