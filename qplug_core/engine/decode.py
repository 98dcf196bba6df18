"""The decoding loop of the reference engine: greedy and sampling, token for token what transformers' own loop gives.

transformers prepares everything (logits processors, stopping criteria, cache, the first forward's inputs) and hands over to
:class:`DecodeLoop` as its ``custom_generate``. What is left out is what it does again for every token: growing tensors, preparing
inputs, copying.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

_KNOWN = frozenset({"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"})
_ITS_OWN = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_prefill", "_sample")

log = logging.getLogger(__name__)


def kept_loop(model: Any) -> str | None:
    """Why ``model`` keeps transformers' decoding loop, as a sentence; None where :class:`DecodeLoop` decodes it."""
    kept = f"decoding is transformers' own loop: {type(model).__name__} "
    if model.config.is_encoder_decoder:
        return kept + "has an encoder"
    for name in _ITS_OWN:
        if getattr(type(model), name, None) is not getattr(GenerationMixin, name):
            return kept + f"has its own {name}"
    if not model._supports_default_dynamic_cache():
        return kept + "keeps another state than keys and values"
    return None


class DecodeLoop:
    """What ``model.generate(custom_generate=...)`` calls. ``streamer``: gets each token as it is chosen."""

    def __init__(self, streamer: Any = None) -> None:
        self.streamer = streamer

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        """LongTensor ``[B, T]`` to ``[B, T + new]``, padded behind the end of each sequence."""
        cache = model_kwargs.get("past_key_values")
        device = getattr(model, "device", input_ids.device)
        more = sorted(key for key, value in model_kwargs.items() if key not in _KNOWN and value is not None)
        kept = f"decoding is transformers' own loop: it was asked for {', '.join(more)}" if more else kept_loop(model)
        if kept is None and (
            cache is None
            or cache.get_seq_length()
            or generation_config.return_dict_in_generate
            or generation_config.prefill_chunk_size is not None
            or device != input_ids.device
        ):
            kept = "decoding is transformers' own loop: more was asked for than tokens behind an empty cache on the model's device"
        if kept is not None:
            log.info(kept)
            done: Tensor = model._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, streamer=self.streamer, **model_kwargs
            )
            return done
        return self._decode(model, input_ids, logits_processor, stopping_criteria, generation_config, cache, model_kwargs)

    def _decode(
        self, model: Any, input_ids: Tensor, processors: Any, criteria: Any, config: Any, cache: Any, given: dict[str, Any]
    ) -> Tensor:
        batch, width = input_ids.shape
        end = next(c.max_length for c in criteria if type(c) is MaxLengthCriteria)
        eos = {int(t) for c in criteria if type(c) is EosTokenCriteria for t in c.eos_token_id.flatten()}
        others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        # As transformers has it: only where there is an end token are finished sequences padded.
        pad = int(config._pad_token_tensor) if any(hasattr(c, "eos_token_id") for c in criteria) else None
        ids = input_ids.new_empty(batch, end)
        ids[:, :width] = input_ids
        position, mask, all_seen = given.get("position_ids"), given.get("attention_mask"), None
        if mask is not None:
            all_seen = mask.new_ones(batch, end)
            all_seen[:, :width] = mask
        if position is not None:
            position = position[..., -1:] + 1
        kept = {key: given[key] for key in ("use_cache", "logits_to_keep") if key in given}
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **given)
        logits = model(**inputs, return_dict=True).logits
        over = [False] * batch
        while True:
            scores = logits[:, -1].to(dtype=torch.float32, copy=True)
            if processors:
                scores = processors(ids[:, :width], scores)
            if config.do_sample:
                tokens = torch.multinomial(torch.nn.functional.softmax(scores, dim=-1), num_samples=1).squeeze(1)
            else:
                tokens = torch.argmax(scores, dim=-1)
            chosen = tokens.tolist()
            if pad is not None and any(over):
                chosen = [pad if done else token for token, done in zip(chosen, over, strict=True)]
                tokens = tokens.new_tensor(chosen)
            ids[:, width] = tokens
            width += 1
            if self.streamer is not None:
                self.streamer.put(tokens.cpu())
            over = [done or token in eos for token, done in zip(chosen, over, strict=True)]
            for criterion in others:
                over = [a or b for a, b in zip(over, criterion(ids[:, :width], None).tolist(), strict=True)]
            if width >= end or all(over):
                break
            inputs = {"input_ids": tokens[:, None], "past_key_values": cache, **kept}
            if position is not None:
                inputs["position_ids"] = position
                position = position + 1
            if all_seen is not None:
                inputs["attention_mask"] = all_seen[:, :width]
            logits = model(**inputs, return_dict=True).logits
        if self.streamer is not None:
            self.streamer.end()
        return ids[:, :width]
