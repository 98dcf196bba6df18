"""Metadata: the Hugging Face config that the keys of a GGUF file mean.

transformers has such tables for these families in a module without a stable interface, which drops what it does not know
(scaled rotary embeddings among it); here a key that changes numbers and is not understood is an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qplug_core.errors import ConfigError

from .header import Array, Header

FAMILIES = {"llama": ("llama", "mistral"), "qwen2": ("qwen2",), "qwen3": ("qwen3",)}
"""Architectures that are read, with the ``model_type`` values that may stand for each in a config.json; the first is the default."""

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

NUMBERS = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length", "rope.freq_base", "rope.dimension_count",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
    "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "rope.scale_linear", "attention.causal", "expert_count", "expert_used_count", "vocab_size",
)  # fmt: skip
"""Keys that are understood, after the architecture's prefix."""

SILENT = ("tensor_data_layout", "rope.scaling.finetuned")
"""Keys that change no number."""

NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scale_linear": 1.0,
}
"""Keys of which one value only is understood."""


class Metadata:
    """The keys of one file, checked.

    :raises ConfigError: for another architecture, a key that is not understood, and one that is missing.
    """

    def __init__(self, header: Header) -> None:
        self.file = header.file
        self.values = header.metadata
        self.architecture = header.architecture
        if self.architecture not in FAMILIES:
            raise ConfigError(
                f"{self.file} holds a model of architecture {self.architecture!r}; {', '.join(FAMILIES)} are read, so load the "
                "checkpoint that it was converted from"
            )
        prefix = f"{self.architecture}."
        own = {key.removeprefix(prefix): value for key, value in self.values.items() if key.startswith(prefix)}
        for key, value in own.items():
            if key in NEUTRAL and value != NEUTRAL[key]:
                raise ConfigError(
                    f"{self.file} says {prefix}{key} = {value!r}; {NEUTRAL[key]!r} is what is understood, so load the checkpoint that "
                    "it was converted from"
                )
            if key not in NUMBERS and key not in SILENT:
                raise ConfigError(
                    f"{self.file} has the key {prefix}{key!s} = {value!r}, which is not known and may change the numbers; use a newer "
                    "qplug-gguf"
                )

    def __contains__(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.values

    def number(self, key: str) -> Any:
        """The value of ``<architecture>.<key>``.

        :raises ConfigError: where it is missing, or given for each layer.
        """
        name = f"{self.architecture}.{key}"
        value = self.values.get(name)
        if value is None or isinstance(value, Array):
            what = "no" if value is None else f"{value.length} values, one for each layer, of"
            raise ConfigError(f"{self.file} has {what} {name}; one value was needed, so convert the model again")
        return _shortest(value)

    def head_dim(self) -> int:
        """Columns of one head."""
        dims = {
            k: self.number(k)
            for k in ("attention.key_length", "attention.value_length", "rope.dimension_count")
            if k in self
        }
        if len(set(dims.values())) > 1:
            raise ConfigError(
                f"{self.file} says {dims}; one head dimension was needed, so load the model it was converted from"
            )
        return int(next(iter(dims.values()), self.number("embedding_length") // self.number("attention.head_count")))

    def config(self, vocab: int, tied: bool, attention_bias: bool, factors: list[float] | None) -> dict[str, Any]:
        """A config.json. ``factors``: divisors of the rotary frequencies that the file holds as a tensor."""
        ids = {
            name: self.values.get(f"tokenizer.ggml.{key}_token_id")
            for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        }
        turn = self.values.get("tokenizer.ggml.eot_token_id")
        eos: Any = ids["eos"] if turn in (None, ids["eos"]) else [ids["eos"], turn]
        config = {
            "architectures": [CLASSES[self.architecture]],
            "model_type": FAMILIES[self.architecture][0],
            "vocab_size": vocab,
            "hidden_size": self.number("embedding_length"),
            "intermediate_size": self.number("feed_forward_length"),
            "num_hidden_layers": self.number("block_count"),
            "num_attention_heads": self.number("attention.head_count"),
            "num_key_value_heads": self.kv_heads(),
            "head_dim": self.head_dim(),
            "max_position_embeddings": self.number("context_length"),
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon"),
            "rope_parameters": self.rope(factors),
            "tie_word_embeddings": tied,
            "bos_token_id": ids["bos"],
            "eos_token_id": eos,
            "pad_token_id": ids["pad"],
        }
        return config if self.architecture == "qwen2" else {**config, "attention_bias": attention_bias}

    def kv_heads(self) -> int:
        """Heads of keys and values."""
        key = "attention.head_count_kv"
        return int(self.number(key if key in self else "attention.head_count"))

    def rope(self, factors: list[float] | None) -> dict[str, Any]:
        """``rope_parameters``.

        Factors become ``longrope``, which is transformers' name for frequencies that are divided one by one.
        """
        theta = self.number("rope.freq_base") if "rope.freq_base" in self else 10000.0
        kind = self.number("rope.scaling.type") if "rope.scaling.type" in self else "none"
        found: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        if kind in ("linear", "yarn"):
            found |= {"rope_type": kind, "factor": self.number("rope.scaling.factor")}
        elif kind != "none":
            raise ConfigError(
                f"{self.file} scales rotary embeddings by {kind!r}; none, linear and yarn are understood, so put the model's config.json "
                "beside it"
            )
        if kind == "yarn":
            found["original_max_position_embeddings"] = self.number("rope.scaling.original_context_length")
            betas = {name: f"rope.scaling.yarn_{name}" for name in ("beta_fast", "beta_slow")}
            found |= {name: self.number(key) for name, key in betas.items() if key in self}
        if factors is None:
            return found
        if kind != "none":
            raise ConfigError(
                f"{self.file} has rope_freqs.weight and {kind} scaling; one of them was needed, so convert the model again"
            )
        length = self.number("context_length")
        return {
            "rope_type": "longrope",
            "rope_theta": theta,
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": length,
        }

    def check(self, config: dict[str, Any]) -> None:
        """Refuse a config.json of another model.

        :raises ConfigError: naming the first value that differs.
        """
        kind = config.get("model_type")
        if kind not in FAMILIES[self.architecture]:
            raise ConfigError(
                f"config.json beside {self.file} has model_type {kind!r} and the file holds a {self.architecture} model; remove the one "
                "that does not belong"
            )
        said = {
            "hidden_size": "embedding_length",
            "num_hidden_layers": "block_count",
            "num_attention_heads": "attention.head_count",
            "num_key_value_heads": "attention.head_count_kv",
            "intermediate_size": "feed_forward_length",
        }
        pairs = {name: (config[name], self.number(key)) for name, key in said.items() if name in config and key in self}
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if "rope.freq_base" in self and (theta := rope.get("rope_theta", config.get("rope_theta"))) is not None:
            pairs["rope_theta"] = (theta, self.number("rope.freq_base"))
        kind = self.number("rope.scaling.type") if "rope.scaling.type" in self else "none"
        if kind != "none":
            pairs["rope_type"] = (rope.get("rope_type", rope.get("type", "default")), kind)
        for name, (theirs, ours) in pairs.items():
            if theirs != ours:
                raise ConfigError(
                    f"config.json beside {self.file} says {name} = {theirs} and the file says {ours}; remove the one that does not belong"
                )


def _shortest(value: Any) -> Any:
    """A float32 as the shortest decimal number that means it: 1e-06 was written, and 9.999999974752427e-07 is read."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
