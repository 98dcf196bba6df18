"""What qplug-hqq offers. Torch-free: code is named here and imported when it is needed."""

from __future__ import annotations

from qplug_core.decl import FormatDecl
from qplug_core.hookspecs import hookimpl

API = "1.0"


@hookimpl
def qplug_formats() -> list[FormatDecl]:
    """HQQ's own files, which have no config, and those of transformers."""
    return [
        FormatDecl(
            "hqq",
            impl="qplug_hqq.loader:HQQFormat",
            detects=("hqq",),
            suffixes=(".W_q",),
            layouts=("hqq",),
            schemes=("W{2,3,4,5,6,8}A16 channel|g* asym",),
            ops=("linear", "experts", "lm_head"),
            summary="HQQ checkpoints with and without a config, 2 to 8 bits, groups along either axis",
        )
    ]
