"""The reference engine as a model of lm-evaluation-harness: ``--model qplug``.

lm-eval finds models in its own package and nowhere else, so its command line is run from here, with every option that it has::

    python -m qplug_core.bridges.lm_eval run --model qplug --model_args pretrained=PATH,dtype=float32 --tasks ... --include_path ...

In a program, importing this module is enough for ``lm_eval.simple_evaluate(model="qplug", ...)``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version as installed
from typing import Any

import lm_eval.models  # noqa: F401  (fills the table of models, which it does not do once another one is in it)
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from packaging.specifiers import SpecifierSet
from torch import Tensor
from tqdm import tqdm

from ..engine.engine import load
from ..errors import UsageError

VERSIONS = ">=0.4.13,<0.5"
"""Versions of lm-eval that the tests of this model pass with."""

Pair = tuple[tuple[str, str], list[int], list[int]]


class QplugLM(TemplateLM):
    """A checkpoint in the reference engine. Log-likelihoods are float32 whatever the dtype of the model is."""

    def __init__(
        self,
        pretrained: str,
        dtype: str = "bfloat16",
        device: str | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        quantize: str | None = None,
        kv_cache: str | None = None,
        kernels: str = "auto",
        activations: str = "quantized",
        max_batch_size: int | None = None,
    ) -> None:
        """``pretrained`` and the other names as in :func:`qplug_core.load`; ``batch_size`` sequences at a time (``auto`` is 8).

        :raises QplugError: where the checkpoint does not load, or lm-eval is not a version that is known.
        """
        super().__init__()
        if not SpecifierSet(VERSIONS).contains(found := installed("lm-eval"), prereleases=True):
            raise UsageError(f"lm-eval is {found} and qplug-core is tested with {VERSIONS}; install one of those")
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "cuda" if torch.cuda.is_available() else "cpu"  # lm-eval says cuda:0 where nobody said anything.
        self.engine = load(
            pretrained,
            device=device,
            dtype=dtype,
            quantize=quantize,
            kv_cache=kv_cache,
            kernels=kernels,
            activations=activations,
        )
        self.tokenizer = self.engine.tokenizer
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 8
        self.max_gen_toks = int(max_gen_toks)
        longest = getattr(self.engine.model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = int(max_length or longest or 2048)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text: where it begins."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval names its caches after."""
        return str(self.engine.source.path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's own template writes it."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids. Special tokens are added where the tokenizer does so, unless told otherwise."""
        begins = bool(self.tokenizer.bos_token and string.startswith(self.tokenizer.bos_token))
        special = not begins if add_special_tokens is None else add_special_tokens
        ids: list[int] = self.tokenizer(string, add_special_tokens=special)["input_ids"]
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each context and continuation: the log-likelihood of the continuation, and whether greedy choice gives it."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        found: dict[int, tuple[float, bool]] = {}
        for start in tqdm(range(0, len(order), self.batch_size), desc="log-likelihoods", disable=disable_tqdm):
            chosen = order[start : start + self.batch_size]
            pairs = [requests[i][1:] for i in chosen]
            for index, result in zip(chosen, self._score(pairs), strict=True):
                found[index] = result
                self.cache_hook.add_partial("loglikelihood", requests[index][0], result)
        return [found[i] for i in range(len(requests))]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        rows = [(context + continuation)[-(self.max_length + 1) :] for context, continuation in pairs]
        width = max(len(row) for row in rows) - 1
        ids = torch.full((len(rows), width), self.eot_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row) - 1] = torch.tensor(row[:-1])
            mask[i, : len(row) - 1] = 1
        device = self.engine.model.device
        logits = self.engine.logits(ids.to(device), mask.to(device))
        return [self._one(logits[i], row, len(pairs[i][1])) for i, row in enumerate(rows)]

    def _one(self, logits: Tensor, row: list[int], count: int) -> tuple[float, bool]:
        """``logits [T, V]`` of one row, of which the last ``count`` tokens are scored."""
        if not 0 < count < len(row):
            raise UsageError(
                f"a continuation of {count} tokens was asked for and {self.max_length} fit; set max_length, or shorten the task"
            )
        end = len(row) - 1
        scores = torch.log_softmax(logits[end - count : end].float(), dim=-1)
        wanted = torch.tensor(row[-count:], device=scores.device)
        picked = scores.gather(-1, wanted[:, None])[:, 0]
        return float(picked.double().sum()), bool((scores.argmax(-1) == wanted).all())

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows that share no token to predict."""
        totals = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text, False), self.prefix_token_id, self.max_length, 1)
            pairs = [(("", ""), *make_disjoint_window(window)) for window in windows]
            total = sum(score for score, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True))
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Text after each prompt, up to the first stop string."""
        texts = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            prompt, options = request.args
            until = options.get("until") or []
            text = self.engine.generate(
                prompt,
                int(options.get("max_gen_toks", self.max_gen_toks)),
                stop=[until] if isinstance(until, str) else list(until),
                temperature=float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0,
            )
            assert isinstance(text, str)
            texts.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts


def main() -> None:
    """lm-eval's own command line, with this model in its table."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv[0] = "lm-eval"
    cli_evaluate()


if __name__ == "__main__":
    # Run as a script, this file is another module than the one that programs import; that one's class is registered.
    from qplug_core.bridges.lm_eval import main as run

    run()
else:
    register_model("qplug")(QplugLM)
