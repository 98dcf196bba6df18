"""FastDeploy's names of quantization types, as quantizations of a layer. Fixed strings: it has no grammar of its own."""

from __future__ import annotations

from qplug_core.config import LayerQuant
from qplug_core.errors import ConfigError
from qplug_core.scheme import QuantScheme, TensorQuant

TYPES: dict[str, tuple[str, str]] = {
    "wint8": ("W8A16", "wint8"),
    "wint4": ("W4A16_channel", "wint4"),
    "weight_only_int8": ("W8A16", "wint8"),
    "weight_only_int4": ("W4A16_channel", "wint4"),
    "wint2": ("Wccq2A16", "ccq2"),
    "wint2.5": ("W3A16_g64", "ccq2.5"),
    "weight_only_int2.5": ("W3A16_g64", "ccq2.5"),
    "w4a8": ("W4A8_channel_static", "w4a8"),
    "block_wise_fp8": ("Wfp8Afp8_b128x128", "fastdeploy_fp8"),
}
"""Scheme and layout by type. The FP8 layout is qplug-fp8's; core finds it by name."""

REFUSED = {
    "w4afp8": "its codes lie in the order of FastDeploy's Hopper kernel and its down_proj is rotated, which no file describes",
    "w8a8": "FastDeploy itself never loads it",
    "wfp8afp8": "FastDeploy quantizes to it at load and stores no such weights",
    "tensor_wise_fp8": "its weights were rotated by a Hadamard matrix, which every activation needs too",
}
"""Types that stay unread, with the reason."""

EXPERTS_ONLY = ("wint2", "wint2.5", "weight_only_int2.5", "w4a8")

ORDERS = {"sm80": "", "sm70": "_sm70", "nk": "_nk", "kn": "_kn"}
"""Values of ``weight_layout``, with the ending of the layout."""

CACHES = {
    # Rows -1 are heads. INT8 has one scale for each channel of each head, whatever is_channel_wise says.
    "int8": TensorQuant("int8", (-1, 1), rule="amax"),
    "float8_e4m3fn": TensorQuant("fp8_e4m3", (-1, 0), rule="amax"),
    "block_wise_fp8": TensorQuant("fp8_e4m3", (1, 0), dynamic=True),
}
"""KV-cache schemes by type. Rule ``amax``: what is stored is the largest magnitude, and the step is that / 127 (fp8: / 448)."""


def layer_quant(kind: str, where: str, experts: bool, order: str = "", permuted: bool = True) -> LayerQuant:
    """The quantization that type ``kind`` of the key ``where`` means.

    ``order``: ending of the weight-only layouts. ``permuted``: W4A8 as FastDeploy's kernel reads it.

    :raises ConfigError: for a type that is unknown, that stays unread, or that only experts have.
    """
    if kind in REFUSED:
        raise ConfigError(
            f"the config says {where}: {kind!r}; {REFUSED[kind]}, so quantize the 16-bit checkpoint to another type, such as wint4"
        )
    if kind not in TYPES or (kind in EXPERTS_ONLY and not experts):
        known = [name for name in TYPES if experts or name not in EXPERTS_ONLY]
        what = "only experts have it" if kind in TYPES else "FastDeploy has no such type"
        raise ConfigError(f"the config says {where}: {kind!r}; {what}; one of {', '.join(known)} was needed, so correct it")
    scheme, layout = TYPES[kind]
    if layout.startswith("wint"):
        layout += order
    elif layout == "w4a8" and not permuted:
        layout += "_kn"
    return LayerQuant(QuantScheme.parse(scheme), layout)


def cache(kind: str) -> TensorQuant:
    """The KV-cache scheme of a type.

    :raises ConfigError: for one that is unknown, or that has zero points.
    """
    if kind in CACHES:
        return CACHES[kind]
    what = "caches with zero points have no reader" if kind.endswith("_zp") else "FastDeploy has no such type"
    raise ConfigError(
        f"the config says kv_cache_quant_type: {kind!r}; {what}; one of {', '.join(CACHES)} was needed, so correct it or remove the key"
    )
