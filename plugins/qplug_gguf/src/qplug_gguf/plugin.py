"""What qplug-gguf offers. Torch-free: code is named here and imported when it is needed."""

from __future__ import annotations

from qplug_core.decl import FormatDecl
from qplug_core.hookspecs import hookimpl
from qplug_core.layer import Op

API = "1.0"

OPS: tuple[Op, ...] = ("linear", "lm_head", "embedding")


@hookimpl
def qplug_formats() -> list[FormatDecl]:
    """Block types with one stored scale for each block are read and written; those with super-blocks are read."""
    return [
        FormatDecl(
            "gguf",
            impl="qplug_gguf.loader:GGUFFormat",
            detects=("gguf",),
            opens=(".gguf",),
            layouts=("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"),
            schemes=("W{4,5}A16 g32 sym|asym", "W8A16 g32 sym", "Wiq4nlA16 g32"),
            reference=("W{4,5}A16 g32 asym",),
            ops=OPS,
            summary="GGUF files of Llama, Qwen2 and Qwen3 models",
        ),
        FormatDecl(
            "gguf-k",
            impl="qplug_gguf.loader:SuperBlockFormat",
            layouts=("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"),
            schemes=("W2A16 g16 asym", "W{3,6}A16 g16 sym", "W{4,5}A16 g32 asym", "Wiq4nlA16 g32"),
            reference=("W{2,4,5}A16 g* asym",),
            ops=OPS,
            writes=False,
            summary="the super-blocks of GGUF files: K-quants and IQ4_XS",
        ),
        FormatDecl(
            "gguf-grid",
            impl="qplug_gguf.grids:GridFormat",
            layouts=("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "tq1_0", "tq2_0"),
            schemes=("W{2,3}A16 g256 sym",),
            reference=("W{2,3}A16 g256 sym",),
            ops=OPS,
            writes=False,
            summary="GGUF types whose codes are vectors of a grid, and the ternary ones: kept as bytes",
        ),
    ]
