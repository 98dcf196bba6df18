"""What qplug-compressed-tensors offers. Torch-free: code is named here and imported when it is needed."""

from __future__ import annotations

from qplug_core.decl import FormatDecl
from qplug_core.hookspecs import hookimpl
from qplug_core.layer import Op

API = "1.0"

OPS: tuple[Op, ...] = ("linear", "experts", "embedding", "lm_head")

SCHEMES = (
    "W{2,3,4,5,6,7,8}A16 channel|g* sym|asym actorder",
    "W8A16 tensor",
    "W{2,3,4,5,6,7,8}A8 g* rule=127.5",
    "W8A8 tensor|channel sym|asym a:token|tensor rule=127.5",
    "W8A8 channel a:token.asym|tensor.static|tensor.static.asym",
    "W{2,3,4}A4 channel|g* rule=127.5",
    "W{4,8}Afp8 channel|g* a:token|tensor.static",
    "Wfp8A16 tensor|channel|g*|b*",
    "Wfp8Afp8 tensor|channel a:token|tensor|tensor.static",
    "Wfp8Afp8 b* a:g*",
    "Wnvfp4A16 g16",
    "Wnvfp4Anvfp4 g16 a:g16.local",
    "Wmxfp4A16 g32",
    "Wmxfp4Amxfp4 g32 a:g32 rule=ct",
    "Wmxfp8A16 g32",
    "Wmxfp8Amxfp8 g32 a:g32 rule=ct",
)
SPARSE = (
    "W16A16 2:4",
    "W8A8 tensor|channel a:token|tensor|tensor.static rule=127.5 2:4",
    "Wfp8Afp8 tensor|channel a:token|tensor|tensor.static 2:4",
)


@hookimpl
def qplug_formats() -> list[FormatDecl]:
    """The format in the layouts that are still written, and 2:4 sparse weights, which are only read."""
    return [
        FormatDecl(
            "compressed_tensors",
            impl="qplug_compressed_tensors.loader:CompressedTensorsFormat",
            detects=("compressed-tensors", "compressed_tensors"),
            layouts=(
                "pack-quantized",
                "int-quantized",
                "float-quantized",
                "naive-quantized",
                "nvfp4-pack-quantized",
                "mxfp4-pack-quantized",
                "mxfp8-quantized",
                "dense",
            ),
            schemes=SCHEMES,
            ops=OPS,
            summary="checkpoints of llm-compressor: integers of 2 to 8 bits, FP8, NVFP4, MXFP4, MXFP8",
        ),
        FormatDecl(
            "compressed_tensors.sparse24",
            impl="qplug_compressed_tensors.sparse24:Sparse24Format",
            layouts=("sparse-24-bitmask",),
            schemes=SPARSE,
            ops=OPS,
            writes=False,
            summary="2:4 sparse weights of llm-compressor up to 0.8: 16 bit, INT8 or FP8 values and a bit mask",
        ),
    ]
