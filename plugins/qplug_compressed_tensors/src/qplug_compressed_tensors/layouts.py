"""Layouts: which numbers each storage variant holds, and which one a scheme is written in."""

from __future__ import annotations

from qplug_core.errors import CannotEncode
from qplug_core.scheme import NUMBER_TYPES, QuantScheme, TensorQuant

LAYOUTS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "dense",
)
MICROSCALING = ("mxfp4-pack-quantized", "mxfp8-quantized")
PACKED = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
SPARSE = "sparse-24-bitmask"

GONE = {
    "marlin-24": "its weights are permuted for one GPU kernel and nothing undoes that; quantize the 16-bit model again, as "
    "W4A16 or, to keep the pruning, as dense FP8",
    "sparse-bitmask": "its rows have different lengths and cannot be cut; decompress it with compressed-tensors 0.14 and save "
    "the pruned weights dense",
}
"""Layouts of old files that are not read, with what to do."""


def holds(layout: str, part: TensorQuant) -> bool:
    """True where ``layout`` stores weights that are quantized as ``part``."""
    integer, eight = NUMBER_TYPES[part.dtype].kind == "int", part.dtype == "fp8_e4m3"
    plain = part.scale_dtype == "float"
    match layout:
        case "pack-quantized":
            return integer and plain and part.block[0] == 1
        case "int-quantized":
            return integer and plain
        case "naive-quantized" | "dense":
            return (integer or eight) and plain
        case "float-quantized":
            return eight and part.scale_dtype in ("float", "e8m0")
        case "nvfp4-pack-quantized":
            return part.dtype == "fp4_e2m1" and part.scale_dtype == "e4m3"
        case "mxfp4-pack-quantized":
            return part.dtype == "fp4_e2m1" and part.scale_dtype == "e8m0"
        case "mxfp8-quantized":
            return eight and part.scale_dtype == "e8m0"
    return False


def default_layout(scheme: QuantScheme) -> str:
    """The layout in which llm-compressor writes ``scheme``.

    :raises CannotEncode: where there is none.
    """
    part = scheme.weight
    if part is None or scheme.sparsity:
        raise CannotEncode(
            f"scheme {scheme} was given, and sparse layouts are not written any more, because engines have dropped them; store "
            "the pruned weights dense, for example in FP8 (Wfp8Afp8)"
            if scheme.sparsity
            else f"scheme {scheme} was given, which leaves weights at 16 bit; leave the layer out"
        )
    integer = NUMBER_TYPES[part.dtype].kind == "int"
    if integer and scheme.act is None:
        wanted = "pack-quantized" if part.block[0] == 1 else "naive-quantized"
    elif integer:
        wanted = "int-quantized"
    elif part.dtype == "fp4_e2m1":
        wanted = {"e4m3": "nvfp4-pack-quantized"}.get(part.scale_dtype, "mxfp4-pack-quantized")
    elif part.scale_dtype == "e8m0":
        wanted = "mxfp8-quantized"
    else:
        wanted = "naive-quantized" if scheme.act is None else "float-quantized"
    if not holds(wanted, part):
        raise CannotEncode(
            f"scheme {scheme} was given; compressed-tensors stores integers of 2 to 8 bits, FP8 e4m3, NVFP4, MXFP4 and MXFP8, so "
            "choose another format"
        )
    return wanted
