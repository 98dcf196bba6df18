"""The storage variants of plain FP8: the same numbers under the tensor names of different tools."""

from __future__ import annotations

from dataclasses import dataclass

BLOCKS = ("block", "group")
ALL = ("tensor", "channel", *BLOCKS)


@dataclass(frozen=True)
class Layout:
    """Names of the tensors of one layer, behind its own name and a dot.

    ``scale`` multiplies, whatever its name says; ``act`` is the static activation scale, a multiplier too. ``granularities``:
    of the weight scales that are seen under these names. ``experts``: all experts of a layer in one tensor ``[E, N, K]``.
    """

    name: str
    scale: str
    act: str = ""
    granularities: tuple[str, ...] = ALL
    weight: str = "weight"
    experts: bool = False

    @property
    def scale_name(self) -> str:
        """Name of the scale tensor, as :class:`qplug_core.axes.StoredTensor` writes it."""
        return f"{{module}}_{self.scale}" if self.experts else self.scale

    @property
    def weight_name(self) -> str:
        """Name of the tensor of codes."""
        return "{module}" if self.experts else self.weight


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("fp8", "weight_scale", "input_scale"),
        Layout("fp8_block", "weight_scale_inv", "activation_scale", BLOCKS),
        Layout("fp8_inv", "weight_scale_inv", "activation_scale", ("tensor", "channel")),
        Layout("fp8_scale", "scale", "", BLOCKS),
        Layout("mistral_fp8", "qscale_weight", "qscale_act"),
        Layout("trt_fp8", "weights_scaling_factor", "activation_scaling_factor", ("tensor",)),
        Layout("fp8_experts", "scale_inv", "", ("tensor", *BLOCKS), experts=True),
        Layout("fbgemm_fp8", "weight_scale", "", ("channel",)),
        Layout("fastdeploy_fp8", "weight_scale", "", BLOCKS, weight="quant_weight"),
    )
}
"""``fp8``: vLLM, AutoFP8, SGLang. ``fp8_block``: DeepSeek-V3, transformers. ``fp8_inv``: transformers without blocks.
``fp8_scale``: DeepSeek-V4. ``mistral_fp8``: Mistral's own files. ``trt_fp8``: TensorRT-LLM, RTP-LLM. ``fp8_experts``: models
whose experts are one tensor on disk."""

PLAIN = tuple(LAYOUTS[name] for name in ("fp8", "fp8_block", "fp8_inv", "fp8_scale", "mistral_fp8", "trt_fp8"))
"""Layouts that one config (``quant_method: fp8``) stands for, told apart by the tensors of the file."""
