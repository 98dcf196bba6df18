"""Engine: load a checkpoint, look at its logits, generate text."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
)

from ..device import Device
from ..errors import CheckpointError, UsageError
from ..layer import PlainSlot
from ..method import QuantMethod
from ..planner import Planner
from ..quant_plan import CacheDecision, Decision, QuantPlan
from ..reference.kv_cache import CacheCoder
from ..registry import Registry, get_registry
from ..repository import open_checkpoint
from ..resolve import Policy
from ..scheme import QuantScheme
from ..source import Source
from .attention import use_own_attention
from .cache import bytes_per_token, quant_cache
from .decode import DecodeLoop, kept_loop
from .decode_layer import use_own_layers
from .decode_norm import use_own_norms
from .describe import Description, describe
from .memory import Heap, trim
from .names import StoredNames, left_out
from .place import fill_slot, place_experts, place_layer, plain_weight
from .reload import reload_weights
from .skeleton import model_config, skeleton
from .slab import Coders

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Engine:
    """A loaded model.

    model
        The Hugging Face model, with qplug modules where weights are quantized.
    plan
        What was decided for every layer, and why.
    source
        The checkpoint, still open for :meth:`reload`.
    slots
        Parameters and buffers that are no layers: norms, biases.
    coders
        What quantizes keys and values, by layer of the cache; empty where they stay at 16 bit.
    cache_bytes_per_token
        Bytes of one token of one sequence in all layers, as counted in the last generation with a quantized cache; None before it.
    """

    def __init__(
        self,
        model: Any,
        plan: QuantPlan,
        source: Source,
        methods: dict[str, QuantMethod],
        coders: Mapping[int, Coders] | None = None,
        slots: Sequence[PlainSlot] = (),
    ) -> None:
        self.model = model
        self.slots = tuple(slots)
        self.coders = dict(coders or {})
        self.cache_bytes_per_token: int | None = None
        self.plan = plan
        self.source = source
        self.methods = methods
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer beside the weights.

        :raises CheckpointError: where there is none.
        """
        if self._tokenizer is None:
            try:
                self._tokenizer = self.source.load_tokenizer()
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{self.source.path} has no tokenizer that loads ({str(error).splitlines()[0]}); put tokenizer.json there"
                ) from None
            self._tokenizer.padding_side = "left"
            if self._tokenizer.pad_token_id is None:
                self._tokenizer.pad_token = self._tokenizer.eos_token
        return self._tokenizer

    @property
    def nbytes(self) -> int:
        """Bytes of all weights: packed ones and plain ones."""
        plain = {t.data_ptr(): t.nbytes for t in [*self.model.parameters(), *self.model.buffers()]}
        packed: int = sum(m.nbytes for m in self.methods.values())
        return packed + int(sum(plain.values()))

    @property
    def notes(self) -> list[str]:
        """What turned out only when the weights were read."""
        return [f"{m.decision.layer.name}: {note}" for m in self.methods.values() for note in getattr(m, "notes", ())]

    @torch.inference_mode()
    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """LongTensor ``[B, T]`` to float32 ``[B, T, V]``.

        :raises UsageError: for a model that has none, or that takes two inputs.
        """
        if self.model.config.is_encoder_decoder:
            raise UsageError(
                f"{type(self.model).__name__} has an encoder and a decoder; call engine.forward(input_ids=..., decoder_input_ids=...) "
                "instead"
            )
        cache = self._cache() if self.coders else None
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=cache is not None
        )
        if not hasattr(out, "logits"):
            raise UsageError(
                f"{type(self.model).__name__} has no language-model head, so it has no logits; call engine.model(...) instead"
            )
        return out.logits.float()  # type: ignore[no-any-return]

    def _cache(self) -> Cache:
        cache = quant_cache(self.model.config, self.coders)
        configs = (self.model.config, self.model.config.get_text_config(decoder=True))
        if any(config.is_encoder_decoder for config in configs):
            # What a decoder sees of its encoder is read from the cache as it lies there, so it stays at 16 bit.
            return EncoderDecoderCache(cache, DynamicCache(config=self.model.config))
        return cache

    @torch.inference_mode()
    def forward(self, **inputs: Tensor) -> Any:
        """The model's own forward, for encoders and images: ``engine.forward(input_ids=..., pixel_values=...)``."""
        if self.coders:
            return self.model(**inputs, past_key_values=self._cache(), use_cache=True)
        return self.model(**inputs)

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 64,
        *,
        stream: bool = False,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        num_beams: int = 1,
    ) -> str | list[str] | Iterator[str]:
        """Text after ``prompt`` (not with it): a string, a list for a list of prompts, or an iterator with ``stream``.

        ``temperature`` 0 is greedy; ``num_beams`` above 1 searches. ``stop``: generation ends
        before the first of these strings. ``seed`` makes sampling repeatable.

        :raises UsageError: for streaming a batch, or a negative temperature.
        """
        if not self.model.can_generate():
            raise UsageError(
                f"{type(self.model).__name__} does not generate text; call engine.model(...) for its own forward"
            )
        if temperature < 0 or max_new_tokens < 1 or num_beams < 1:
            raise UsageError(
                f"temperature {temperature}, max_new_tokens {max_new_tokens} and num_beams {num_beams} were given; at least 0, 1 and 1 "
                "are needed"
            )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(prompts):
            raise UsageError("an empty prompt was given; at least one character is needed")
        if stream and (len(prompts) > 1 or num_beams > 1):
            raise UsageError(f"{len(prompts)} prompts and {num_beams} beams were given with stream=True; stream one of each")
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True)
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "do_sample": temperature > 0,
            "num_beams": num_beams,
        }
        if temperature > 0:
            options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        config = GenerationConfig(
            **options,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.model.generation_config.eos_token_id,
            bos_token_id=self.model.generation_config.bos_token_id,
        )
        if stream:
            return self._stream(inputs, config, stop, seed)
        out = self._run(inputs, config, stop, seed)
        width = inputs["input_ids"].shape[1]
        texts = [_before(self.tokenizer.decode(row[width:], skip_special_tokens=True), stop) for row in out]
        return texts[0] if isinstance(prompt, str) else texts

    def _run(
        self,
        inputs: Mapping[str, Tensor],
        config: GenerationConfig,
        stop: Sequence[str],
        seed: int | None,
        streamer: Any = None,
    ) -> Tensor:
        more: dict[str, Any] = {"streamer": streamer} if streamer is not None else {}
        if stop:
            more["stopping_criteria"] = StoppingCriteriaList([StopStringCriteria(self.tokenizer, list(stop))])
        own = (config.num_beams or 1) == 1 and kept_loop(self.model) is None
        if own:
            more["custom_generate"] = DecodeLoop(streamer)
        kept = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        with torch.inference_mode(), torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            cache = self._cache() if self.coders or own else None
            if cache is not None:
                more["past_key_values"] = cache
            out: Tensor = self.model.generate(**kept, generation_config=config, **more)
            if self.coders and cache is not None:
                self.cache_bytes_per_token = bytes_per_token(getattr(cache, "self_attention_cache", cache))
            return out

    def _stream(
        self, inputs: Mapping[str, Tensor], config: GenerationConfig, stop: Sequence[str], seed: int | None
    ) -> Iterator[str]:
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []

        def work() -> None:
            try:
                self._run(inputs, config, stop, seed, streamer)
            except BaseException as error:
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        yield from _until(streamer, stop)
        thread.join()
        if failure:
            raise failure[0]

    def add_adapter(self, path: str | Path, name: str = "default") -> tuple[str, ...]:
        """Put the LoRA adapter in ``path`` (PEFT's folder) over the weights in use and make it active; the names of its layers come back.

        :raises UsageError: where PEFT is missing, the name is taken, or the adapter is no LoRA.
        :raises CheckpointError: where the adapter is for another model.
        """
        from .adapter import add_adapter

        return add_adapter(self.model, path, name)

    def use_adapter(self, name: str | None) -> None:
        """Make one of the added adapters active, or none."""
        from .adapter import use_adapter

        use_adapter(self.model, name)

    def reload(self, source: Source | Any) -> None:
        """New weights of the same shapes into the storage in use: every address stays.

        ``source``: another checkpoint of this model, or a :class:`~qplug_core.source.MemorySource`, with the stored names of the plan.

        :raises CheckpointError: where it lacks a tensor or has another shape; then nothing was changed.
        """
        reload_weights(self.model, self.plan, self.methods, self.slots, self.source, source)


def load(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "bfloat16",
    quantize: str | QuantScheme | None = None,
    kernels: str = "auto",
    pin: Mapping[str, str] | None = None,
    forbid: Sequence[str] = (),
    activations: str = "quantized",
    kv_cache: str | None = None,
    progress: bool = False,
    registry: Registry | None = None,
) -> Engine:
    """Load a checkpoint into the reference engine: a folder or file, or ``owner/name[@revision]`` of the Hugging Face Hub.

    device
        Where it runs: ``cpu`` or a torch device.
    dtype
        ``float32`` is exact arithmetic; ``bfloat16`` and ``float16`` are native: one rounding of each weight, the producer's order.
    quantize
        A scheme for a 16-bit checkpoint, quantized layer by layer while it is read.
    kv_cache
        None or ``auto``: what the checkpoint says; ``16bit``; or ``fp8``, ``int8``, ``int4``, ``nvfp4`` for any checkpoint.
    kernels, pin, forbid, activations
        See :class:`~qplug_core.resolve.Policy`.

    :raises QplugError: and nothing is loaded.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} was given; {', '.join(DTYPES)} are known")
    registry = registry or get_registry()
    source = open_checkpoint(path, registry)
    target = Device.current() if device != "cpu" else Device.cpu()
    policy = Policy(kernels, dict(pin or {}), frozenset(forbid), activations)
    planner = Planner(source, target, dtype, policy, quantize, registry, kv_cache=kv_cache)
    model = skeleton(model_config(source), DTYPES[dtype])
    described = describe(model, StoredNames(model, source.tensors, planner.model_name))
    planner.config.ignorable.update(left_out(model, source.tensors))
    plan = planner.plan(described.layers, described.slots)
    loader = _Loader(model, source, planner, plan, described, DTYPES[dtype], device, registry)
    methods = loader.run(progress)
    if planner.kv_wanted not in (None, "16bit") and not plan.caches:
        raise UsageError(
            f"{type(model).__name__} keeps no keys and values from token to token, so it has no KV cache to quantize; leave kv_cache out"
        )
    coders = {described.attention[c.layer]: cache_coders(planner, c) for c in plan.caches}
    quant_cache(model.config, coders)
    if device == "cpu" and kernels != "reference":
        plan.notes += use_own_attention(model, described)
        use_own_norms(model)
        use_own_layers(model)
    return Engine(model, plan, source, methods, coders, described.slots)


def cache_coders(planner: Planner, cache: CacheDecision) -> Coders:
    """The coders of keys and values of one layer, with the scales of the checkpoint."""
    stored = {role: planner.source.read(name) for role, name in cache.scales.items()}
    factors = dict(planner.format.decode_kv(stored)) if planner.format is not None else stored
    if cache.unit_scale:
        factors = {"k_scale": torch.ones(()), "v_scale": torch.ones(())}
    for role in ("k_scale", "v_scale"):
        if role in factors and not bool((factors[role].float() > 0).all() and factors[role].float().isfinite().all()):
            raise CheckpointError(
                f"{cache.scales[role]} holds {factors[role].float().flatten().tolist()[:4]}; positive finite scales are needed, so "
                "calibrate the KV cache again, or load with kv_cache='16bit'"
            )
    keys, values = ((factors.get(f"{which}_scale"), factors.get(f"{which}_zero")) for which in "kv")
    return CacheCoder(cache.scheme, *keys), CacheCoder(cache.scheme, *values)


class _Loader:
    """Streams weights through the plan into a model: what is held is the packed model and one layer."""

    def __init__(
        self,
        model: Any,
        source: Source,
        planner: Planner,
        plan: QuantPlan,
        described: Description,
        dtype: torch.dtype,
        device: str,
        registry: Registry,
    ) -> None:
        self.model, self.source, self.planner, self.plan = model, source, planner, plan
        self.described, self.dtype, self.device, self.registry = described, dtype, device, registry

    def run(self, progress: bool) -> dict[str, QuantMethod]:
        methods: dict[str, QuantMethod] = {}
        heap = Heap()
        columns = (
            TextColumn("loading"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} layers"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, transient=True, disable=not progress) as bar:
            task = bar.add_task("loading", total=len(self.plan.decisions))
            for decision in self.plan.decisions:
                method = self._layer(decision)
                if method is not None:
                    methods[decision.layer.name] = method
                    heap.loaded(method.nbytes)
                self.registry.layer_ready(decision.layer, decision)
                bar.advance(task)
            for slot in self.described.slots:
                fill_slot(self.model, slot, self.source, self.device)
        trim()
        place_experts(self.model, self.described, methods)
        self.model.tie_weights()
        self._check_complete()
        folder = self.source.path if self.source.path.is_dir() else self.source.path.parent
        if (folder / "generation_config.json").exists() and self.model.can_generate():
            self.model.generation_config = GenerationConfig.from_pretrained(folder)
        return methods

    def _layer(self, decision: Decision) -> QuantMethod | None:
        layer = decision.layer
        if not decision.quantized and layer.op != "experts":
            name = decision.segments[0].parts[0].name
            if f"{name}.weight" in self.source.tensors and not self._is_redundant(decision):
                weight = plain_weight(self.source, decision)
                target = self.model.get_submodule(layer.name)
                target.weight = nn.Parameter(weight.to(self.device, target.weight.dtype), requires_grad=False)
            return None
        method = self.planner.method(decision, self.device)
        method.load(self.source)
        if layer.op != "experts":
            place_layer(self.model, decision, method, self.dtype)
        return method

    def _is_redundant(self, decision: Decision) -> bool:
        """A tied weight that the file holds twice: the owner's copy is the one."""
        return decision.layer.tied_to is not None and bool(getattr(self.model.config, "tie_word_embeddings", False))

    def _check_complete(self) -> None:
        empty = [n for n, p in [*self.model.named_parameters(), *self.model.named_buffers()] if p.is_meta]
        if empty:
            raise CheckpointError(
                f"{empty[0]} and {len(empty) - 1} more parameters got no value; the checkpoint does not hold them"
            )


def _before(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first stop string."""
    ends = [at for s in stop if (at := text.find(s)) >= 0]
    return text[: min(ends)] if ends else text


def _until(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """The stream up to the first stop string, holding back text that may be the beginning of one."""
    held = ""
    longest = max((len(s) for s in stop), default=0)
    done = False
    for piece in pieces:
        if done:
            continue
        held += piece
        kept = _before(held, stop)
        done = kept != held
        ready = len(kept) if done else max(0, len(held) - longest + 1) if stop else len(held)
        if ready:
            yield kept[:ready]
        held = "" if done else held[ready:]
    if held:
        yield held
