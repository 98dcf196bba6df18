"""What qplug-quanto offers. Torch-free: code is named here and imported when it is needed."""

from __future__ import annotations

from qplug_core.decl import FormatDecl
from qplug_core.hookspecs import hookimpl

API = "1.0"


@hookimpl
def qplug_formats() -> list[FormatDecl]:
    """What is written, too; other group sizes and static activations are read."""
    return [
        FormatDecl(
            "quanto",
            impl="qplug_quanto.loader:QuantoFormat",
            detects=("quanto",),
            files=("quanto_qmap.json",),
            suffixes=(".weight._scale",),
            layouts=("quanto",),
            schemes=("W{8,fp8,fp8e5m2}A16 channel", "W{2,4}A16 g128 asym"),
            ops=("linear", "experts", "lm_head"),
            summary="optimum-quanto checkpoints: int8, FP8, int4 and int2 weights, also with static int8 or FP8 activations",
        )
    ]
