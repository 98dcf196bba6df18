"""What qplug-torchao offers. Torch-free: code is named here and imported when it is needed."""

from __future__ import annotations

from qplug_core.decl import FormatDecl
from qplug_core.hookspecs import hookimpl

API = "1.0"

INTEGERS = "channel|g* sym|asym"
SCHEMES = (
    f"W{{2,3,4,5,6,7,8}}A16 {INTEGERS}",
    "W8A16 tensor",
    # Core has no other word for the rule of torchao's symmetric activations, amax / 127.5.
    f"W{{2,3,4,5,6,7,8}}A8 {INTEGERS} a:token rule=127.5",
    "W8A8 tensor a:token|tensor rule=127.5",
    f"W{{2,3,4,5,6,7,8}}A8 {INTEGERS} a:token.asym",
    "W{fp8,fp8e5m2}A16 tensor|channel|g*",
    "W{fp8,fp8e5m2}Afp8 tensor|channel a:token|tensor",
)


@hookimpl
def qplug_formats() -> list[FormatDecl]:
    """One format with one layout."""
    return [
        FormatDecl(
            "torchao",
            impl="qplug_torchao.loader:TorchAOFormat",
            detects=("torchao",),
            layouts=("torchao",),
            schemes=SCHEMES,
            ops=("linear", "experts", "embedding", "lm_head"),
            summary="torchao checkpoints in safetensors: INT8, FP8, and 2 to 8 bits in bytes",
        )
    ]
