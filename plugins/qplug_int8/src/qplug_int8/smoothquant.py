"""SmoothQuant checkpoints (arXiv:2211.10438): W8A8 with the input of some layers divided by a smoother.

The smoothing of query, key, value, gate and up is folded into the layer norm before them; the output and down projections have
no norm before them and store theirs. ``smoothquant.ini`` beside the weights is a flag: RTP-LLM writes its arguments there and
reads none of them. What decides is the names of the tensors:

====================== =========================================== ============= ========================================
layout                 tensors of a layer (see ``styles.py``)      codes         written by
====================== =========================================== ============= ========================================
smooth_quant           qweight, scales, smoother                   [K, N]        RTP-LLM's converter for Qwen and GPT-2
smooth_quant_col       weight.int8.col, scale_w_quant_orig.col,    [K, N]        RTP-LLM's converter for Llama,
                       smoother                                    [K, 3, N/3]   FasterTransformer
smooth_quant_int8      weight.int8, scale_w_quant_orig, smoother   [K, N]        the same, by tensor
smooth_quant_trt       weight, per_channel_scale, smoother         [N, K]        TensorRT-LLM, per-token
smooth_quant_lmdeploy  weight, scale                               [N, K]        LMDeploy
====================== =========================================== ============= ========================================

Activations are quantized per token as the model runs: amax / 127, which is what all of these engines do with these tensors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qplug_core.axes import StoredTensor
from qplug_core.config import LayerQuant, QuantizationConfig
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.format import CheckpointFormat
from qplug_core.scheme import QuantScheme
from qplug_core.weight import OpaqueWeight, QuantWeight

from .configs import ignored, modules, read_keys, require_codes, rules_of, written
from .styles import Style

if TYPE_CHECKING:
    from qplug_core.source import Source

COLUMN = QuantScheme.parse("W8A8")
TENSOR = QuantScheme.parse("W8A8_tensor")
STATIC = ("scale_x_orig_quant", "scale_y_accum_quant", "scale_y_quant_orig")

STYLES = {
    "smooth_quant_col": Style(
        "weight.int8.col",
        "scale_w_quant_orig.col",
        transposed=True,
        smoother="smoother",
        unused=("weight.int8", "scale_w_quant_orig", "scale_y_accum_quant.col", *STATIC),
    ),
    "smooth_quant_int8": Style(
        "weight.int8",
        "scale_w_quant_orig",
        transposed=True,
        smoother="smoother",
        unused=("scale_y_accum_quant.col", *STATIC),
    ),
    "smooth_quant": Style("qweight", "scales", transposed=True, smoother="smoother"),
    "smooth_quant_trt": Style("weight", "per_channel_scale", rows=("1", "N"), scalar=("1", "1"), smoother="smoother"),
    "smooth_quant_lmdeploy": Style("weight", "scale", rows=("N", "1"), scalar=("1", "1")),
}
"""By layout, in the order in which they are looked for: a file with ``.col`` tensors may hold those by tensor too."""

KNOWN: dict[str, tuple[Any, ...]] = {
    "quant_method": ("smooth_quant", "smoothquant"), "bits": (8,), "w_bits": (8,), "quant_dtype": ("int8",), "group_size": (0, -1),
}  # fmt: skip
METADATA = ("quant_type", "alpha", "version", "producer")
NAMES = {
    "attention.query_key_value": "self_attn.qkv_proj", "attention.qkv": "self_attn.qkv_proj", "attention.dense": "self_attn.o_proj",
    "mlp.fc": "mlp.gate_proj", "mlp.gate": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
    "post_layernorm": "post_attention_layernorm",
}  # fmt: skip
"""Modules of a layer as FasterTransformer called them, and the converters of RTP-LLM and TensorRT-LLM after it. Its ``fc`` is the
gate, and its ``gate`` is what Llama calls up."""
MODULE = re.compile(rf"^(transformer|model)\.layers\.(\d+)\.({'|'.join(map(re.escape, NAMES))})\.(.+)$")
OUTSIDE = {"transformer.vocab_embedding.": "model.embed_tokens.", "transformer.ln_f.": "model.norm."}
RANK_CUT = re.compile(r"\.(?:weight\.int8|scale_\w+_quant|scale_\w+_orig)(?:\.col)?\.\d+$|\.smoother\.\d+$")
FUSED_NORM = {
    "scale_to_int": "1.0 in checkpoints with dynamic activation scales: an input of TensorRT-LLM's fused layer norm"
}


class SmoothQuantFormat(CheckpointFormat):
    """Five layouts, told apart by the headers."""

    name = "smooth_quant"

    def parse(self, source: Source) -> QuantizationConfig:
        """Rules from the headers; without headers every linear layer is ``smooth_quant`` by channel.

        :raises ConfigError: for a foreign key, a file without int8 weights, one cut for several ranks, and static activations.
        """
        raw = source.quant_config or {}
        values = read_keys(raw, self.name, KNOWN, ("ignore",), METADATA)
        self._check_files(source)
        found = {module: quant for layout in STYLES for module, quant in _layers(source, layout).items()}
        require_codes(source, found, self.name, f"an int8 weight called {', '.join(s.weight for s in STYLES.values())}")
        inferred = _inferred(found, source)
        metadata = {key: raw[key] for key in METADATA if key in raw}
        rules = rules_of(found, LayerQuant(COLUMN, "smooth_quant"), ignored(values["ignore"], self.name))
        trt = any(quant.layout == "smooth_quant_trt" for quant in found.values())
        return QuantizationConfig(
            "smooth_quant", rules, inferred=inferred, metadata=metadata, ignorable=dict(FUSED_NORM) if trt else {}
        )

    def model_name(self, stored: str) -> str:
        """Names of RTP-LLM's Llama converter and of TensorRT-LLM as Hugging Face's; Hugging Face's own stay."""
        if found := MODULE.match(stored):
            root, layer, module, tensor = found.groups()
            # A router of Hugging Face is called mlp.gate too, and is a plain weight.
            if not (root == "model" and module == "mlp.gate" and tensor == "weight"):
                return f"model.layers.{layer}.{NAMES[module]}.{tensor}"
        for start, renamed in OUTSIDE.items():
            if stored.startswith(start):
                return renamed + stored.removeprefix(start)
        return f"model.{stored.removeprefix('transformer.')}" if stored.startswith("transformer.layers.") else stored

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """See the table above."""
        return STYLES[quant.layout].tensors(quant)

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """See :meth:`qplug_int8.styles.Style.decode`."""
        return STYLES[quant.layout].decode(tensors, quant, n, k)

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """See :meth:`qplug_int8.styles.Style.encode`."""
        _check_scheme(weight.scheme)
        if quant.layout == "smooth_quant_col" and weight.scheme != COLUMN:
            raise CannotEncode(
                f"scheme {weight.scheme} was given; smooth_quant_col stores scales by channel, so use smooth_quant_int8"
            )
        return STYLES[quant.layout].encode(weight, quant)

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """By channel the names that RTP-LLM reads for most models, by tensor those of TensorRT-LLM.

        :raises CannotEncode: as :meth:`encode`.
        """
        _check_scheme(weight.scheme)
        return LayerQuant(weight.scheme, "smooth_quant" if weight.scheme == COLUMN else "smooth_quant_trt")

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """What qplug and LMDeploy look at; RTP-LLM also wants an empty file ``smoothquant.ini`` beside the weights.

        :raises CannotEncode: where no layer is quantized.
        """
        return written("smooth_quant", layers, bits=8)

    def _check_files(self, source: Source) -> None:
        if "pertensorquant.ini" in source.files:
            raise ConfigError(
                f"{source.path} holds smoothquant.ini and pertensorquant.ini, which name two formats; remove the one that is not true"
            )
        cut = next((name for name in source.tensors if RANK_CUT.search(name)), None)
        if cut is not None:
            raise ConfigError(
                f"{cut} is the part of one rank; tensors of the whole layer are needed, so convert again with tensor parallelism 1"
            )
        static = next((name for name in source.tensors if name.endswith(".act_scale")), None)
        algo = str((source.config.get("quantization") or {}).get("quant_algo") or "")
        if static is not None or (algo.startswith("W8A8_SQ") and "PER_TOKEN" not in algo):
            raise ConfigError(
                f"{source.path} holds TensorRT-LLM's static SmoothQuant ({static or algo}), whose per_channel_scale is no step of the "
                "weight but is divided by the scale of an engine's int8 output; convert again with --per_token"
            )


def _layers(source: Source, layout: str) -> dict[str, LayerQuant]:
    """The layers that are stored in ``layout`` and in none that is looked for before it."""
    style, found = STYLES[layout], {}
    for module, info in modules(source, style.weight).items():
        scales = source.tensors.get(f"{module}.{style.scales}")
        if scales is None or (layout == "smooth_quant_int8" and f"{module}.weight.int8.col" in source.tensors):
            continue
        whole = all(length == 1 for length in scales.shape) and info.shape[-1] > 1
        opts = (("parts", 3),) if len(info.shape) == 3 else ()
        found[module] = LayerQuant(TENSOR if whole else COLUMN, layout, opts)
    return found


def _inferred(found: Mapping[str, LayerQuant], source: Source) -> list[str]:
    if not found:
        return ["there are no headers yet: planned as smooth_quant by channel (qweight, scales, smoother)"]
    styles = Counter(quant.layout for quant in found.values())
    smoothed = sum(f"{module}.smoother" in source.tensors for module in found)
    return [
        f"the names of the tensors say {', '.join(f'{layout} ({count} layers)' for layout, count in styles.items())}",
        f"{smoothed} of {len(found)} layers store a smoother; the others have theirs in the layer norm before them",
        "activations are quantized per token as the model runs, because that is what every reader of these tensors does",
    ]


def _check_scheme(scheme: QuantScheme) -> None:
    if scheme not in (COLUMN, TENSOR):
        raise CannotEncode(
            f"scheme {scheme} was given; smooth_quant stores W8A8 by channel or tensor with dynamic activations, so choose another format"
        )
