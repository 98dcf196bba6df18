"""The ``quantization_config`` of a checkpoint as vLLM holds it: claims checkpoints, plans layers, hands out methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ...device import Device
from ...errors import CheckpointError, PluginError, QplugError, UsageError
from ...layer import LayerSpec
from ...method import HubMethod, QuantMethod
from ...planner import Planner, assumed_source, read_config
from ...quant_plan import Decision, QuantPlan
from ...registry import get_registry
from ...repository import is_repository, local_folder, open_checkpoint
from ...source import Source
from . import NAME, changed, log
from .policy import Claim, Options, decide

_said: set[str] = set()
ADDED = ("total_num_heads", "total_num_kv_heads")
"""Keys that vLLM writes into the ``quantization_config`` that it hands on."""
RENAMED = {"mixtral": {".mlp.": ".block_sparse_moe."}}
"""By model_type, names of transformers 5, which tools now write, and vLLM's own."""
EMBEDDINGS = ("embed_tokens", "word_embeddings", "tok_embeddings", "wte")


class QplugConfig(QuantizationConfig):
    """Of one checkpoint. Travels to vLLM's workers, where the checkpoint's headers are read again.

    ``config``: the dict of config.json; empty for a 16-bit checkpoint that ``--quantization qplug`` was given for.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config = {key: value for key, value in (config or {}).items() if key not in ADDED}
        if self.config.get("quant_method") == NAME:  # Core finds the file beside config.json that says more.
            self.config = {}
        self.model = ""
        self.model_type = ""
        self.tied = False
        self._reset()

    def _reset(self) -> None:
        self.mapper: Any = None
        self._planner: Planner | None = None
        self._stored: dict[str, str] | None = None
        self._plans: dict[str, QuantPlan] = {}
        self._fused: dict[str, tuple[str, int | str]] = {}
        self._waiting: set[str] = set()
        self._flat: dict[str, str] = {}
        self.quantized_embedding = False

    def __getstate__(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("config", "model", "model_type", "tied", "packed_modules_mapping")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    # What vLLM asks of every quantization config.

    def get_name(self) -> str:
        """The name under which vLLM knows this config."""
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

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QplugConfig:
        """From the dict in config.json."""
        return cls(config)

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None) -> str | None:
        """``qplug`` where qplug serves the checkpoint; the log says who does, and why.

        :raises ValueError: one sentence, where only qplug could serve it and cannot.
        """
        config = dict(hf_quant_cfg or {})
        method = str(config.get("quant_method") or config.get("quantization") or "")
        if method == NAME and user_quant in (None, NAME):
            return NAME
        try:
            claim = decide(config, user_quant, device(), get_registry(), moe=_has_experts(hf_config))
        except PluginError as error:
            claim = Claim(False, f"qplug cannot run ({error})")
        except QplugError as error:
            raise ValueError(str(error)) from None
        if claim is None:
            return None
        if claim.qplug:
            _check_engine()
        _say(f"{'qplug' if claim.qplug else 'vLLM'} serves the {method} checkpoint: {claim.reason}")
        return NAME if claim.qplug else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Learn where the checkpoint is, and refuse early what cannot be read.

        :raises ValueError: one sentence.
        """
        named = revision is not None and not Path(model_name).exists()
        self.model = f"{model_name}@{revision}" if named else model_name
        text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
        self.model_type = str(getattr(text, "model_type", ""))
        self.tied = bool(getattr(text, "tie_word_embeddings", False))
        _check_engine()
        try:
            read_config(self._source(), get_registry())
        except QplugError as error:
            raise ValueError(str(error)) from None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """How stored names become vLLM's."""
        self.mapper = hf_to_vllm_mapper
        self._stored = None

    def get_checkpoint_weight_mapper(self) -> Any:
        """Drops what the format says may be left unread, and nothing else (vLLM's default drops every ``g_idx``); renames what this file
        stores under other names than vLLM's.
        """
        from vllm.model_executor.models.utils import WeightsMapper

        ignorable = self._planner.config.ignorable if self._planner is not None else {}
        return WeightsMapper(
            orig_to_new_substr=RENAMED.get(self.model_type, {}),
            orig_to_new_stacked=self._fused,
            orig_to_new_suffix={f".{suffix}": None for suffix in ignorable} | self._flat,
        )

    def get_cache_scale_mapper(self) -> Any:
        """Where the checkpoint's KV-cache scales go."""
        from .kv_cache import scale_mapper

        return scale_mapper(self, super().get_cache_scale_mapper())

    @property
    def kv_cache_scheme(self) -> dict[str, Any] | None:
        """Anything but None makes vLLM keep an FP8 cache where the user asked for none."""
        from .kv_cache import is_served

        kv = None if self._planner is None else self._planner.config.kv
        return {"strategy": "tensor"} if kv is not None and is_served(kv) else None

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method of one layer: qplug's, or vLLM's own for what stays at 16 bit.

        :raises ValueError: one sentence.
        """
        from .methods import method_for

        try:
            return method_for(self, layer, prefix)
        except QplugError as error:
            raise ValueError(str(error)) from None
        except (AttributeError, TypeError) as error:
            raise ValueError(changed(error)) from error

    # What qplug's methods ask.

    def plan(self, specs: list[LayerSpec], dtype: torch.dtype) -> QuantPlan:
        """The decisions for the parts of one layer, made once: a layer that is asked for again has the same.

        :raises QplugError: where the checkpoint does not hold what the layer needs.
        """
        key = specs[0].name
        if key not in self._plans:
            self._plans[key] = self.planner(dtype).plan(specs, complete=False)
        return self._plans[key]

    def planner(self, dtype: torch.dtype) -> Planner:
        """The planner of this checkpoint, from its headers where they can be read, else from the config alone.

        :raises UsageError: where ``--quantization qplug`` was given for a 16-bit checkpoint without a scheme.
        """
        if self._planner is None:
            source, options = self._source(), Options.current()
            if source.quant_config is None and not source.files and options.quantize is None:
                raise UsageError(
                    f"{self.model} is 16 bit and --quantization {NAME} does not say what to make of it; add --additional-config "
                    '\'{"qplug": {"quantize": "W4A16_g128"}}\', or leave the flag out'
                )
            name = str(dtype).removeprefix("torch.")
            self._planner = Planner(source, device(), name, options.policy, options.quantize, assumed=not source.tensors)
        return self._planner

    def stored(self, module: str) -> str:
        """The stored name of what vLLM calls ``module``."""
        if self._stored is None:
            names = [] if self._planner is None else list(self._planner.source.tensors)
            self._stored = {self.renamed(name).rpartition(".")[0]: name.rpartition(".")[0] for name in names}
        return self._stored.get(module, module)

    def fused_here(self, part: str, leaf: str, shard: int | str) -> None:
        """The file holds ``part`` by itself and vLLM expects it in ``leaf`` already: say where it goes."""
        self._fused[f".{part}."] = (f".{leaf}.", shard)

    def flat(self, suffix: str) -> str:
        """The name of the parameter for stored tensors that end with ``suffix``: torch takes no dots in it."""
        name = suffix.replace(".", "__")
        if name != suffix:
            self._flat[f".{suffix}"] = f".{name}"
        return name

    def renamed(self, name: str) -> str:
        """vLLM's name of a stored tensor."""
        name = name if self.mapper is None else self.mapper.map_name(name) or name
        for old, new in RENAMED.get(self.model_type, {}).items():
            name = name.replace(old, new, 1)
        return name

    def embedding(self) -> str:
        """The input embedding, which some of vLLM's models make without a name; an empty string where the file does not say."""
        self.stored("")
        found = [module for module in self._stored or () if module.rpartition(".")[2] in EMBEDDINGS]
        return found[0] if len(found) == 1 else ""

    def holds_head(self) -> bool:
        """True where the checkpoint has tensors of a head, tied or not."""
        self.stored("")
        return any(module.rpartition(".")[2] == "lm_head" for module in self._stored or ())

    def bind(self, decision: Decision, dtype: torch.dtype) -> QuantMethod:
        """The method that multiplies with one layer."""
        planner = self.planner(dtype)
        own = planner.config.get_quant_method(decision.layer, decision)
        return own or HubMethod(decision, planner.resolver, planner.layout, dtype, planner.device.torch_device())

    def wait_for(self, prefix: str) -> None:
        """A layer whose weights will come."""
        self._waiting.add(prefix)

    def arrived(self, prefix: str) -> None:
        """A layer is loaded; after the last one the log has the plan."""
        self._waiting.discard(prefix)
        if self._waiting or not self._plans:
            return
        plans = list(self._plans.values())
        whole = replace(
            plans[0],
            decisions=tuple(d for plan in plans for d in plan.decisions),
            caches=tuple(c for plan in plans for c in plan.caches),
            notes=tuple(dict.fromkeys(note for note in plans[-1].notes)),
        )
        _say(f"qplug loaded {whole.report()}")

    def readable(self) -> Source:
        """The checkpoint with its weights, for layers that core reads from the files itself.

        :raises CheckpointError: where there are no files.
        """
        return open_checkpoint(local_folder(self.model), get_registry())

    def _source(self) -> Source:
        """The checkpoint's configs and headers; the config alone where vLLM's loader knows of files that core does not."""
        if not self.model or not (Path(self.model).exists() or is_repository(self.model)):
            return assumed_source(self.config)
        try:
            source = open_checkpoint(self.model, get_registry(), headers=True)
        except CheckpointError as error:
            _say(f"qplug plans from the config alone: {error}")
            return assumed_source(self.config)
        if self.config:
            source.quant_config, source.quant_config_from = self.config, "the quantization_config that vLLM gave"
        return source


def device() -> Device:
    """The device that vLLM runs on."""
    from vllm.platforms import current_platform

    return Device.cpu() if current_platform.is_cpu() else Device.current()


def _has_experts(hf_config: Any) -> bool:
    text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    return any(
        getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    )


def _check_engine() -> None:
    """Import all that touches vLLM, before anything is loaded.

    :raises ValueError: one sentence, where vLLM is not as this bridge knows it.
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
