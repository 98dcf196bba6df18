"""What qplug-fp4 offers. Torch-free: code is named here and imported when it is needed."""

from __future__ import annotations

from qplug_core.decl import FormatDecl, QuantizerDecl
from qplug_core.hookspecs import hookimpl
from qplug_core.layer import Op

API = "1.0"

MX_RULES = "a:g32 rules=ct|floor|ceil"
NVFP4 = ("Wnvfp4A16 g16|g32", "Wnvfp4Anvfp4 g16 a:g16.local", "Wnvfp4Afp8 g16|g32 a:token|tensor.static")
MXFP4 = ("Wmxfp4A16 g32", f"Wmxfp4A{{mxfp4,mxfp8}} g32 {MX_RULES}", "Wmxfp4Afp8 g32 a:token|tensor.static")
MXFP8 = ("Wmxfp8A16 g32", f"Wmxfp8Amxfp8 g32 {MX_RULES}")
OPS: tuple[Op, ...] = ("linear", "experts", "lm_head")


@hookimpl
def qplug_formats() -> list[FormatDecl]:
    """One format for each number type; MXFP4 has the layout of gpt-oss beside the plain one."""
    return [
        FormatDecl(
            "nvfp4",
            impl="qplug_fp4.loader:NVFP4Format",
            detects=("nvfp4",),
            layouts=("nvfp4",),
            schemes=NVFP4,
            ops=OPS,
            summary="two FP4 codes to a byte, e4m3 block scales, one float32 scale",
        ),
        FormatDecl(
            "mxfp4",
            impl="qplug_fp4.loader:MXFP4Format",
            detects=("mxfp4", "gpt_oss_mxfp4"),
            layouts=("mxfp4", "mxfp4_blocks"),
            schemes=MXFP4,
            ops=OPS,
            summary="two FP4 codes to a byte, power-of-two block scales; gpt-oss",
        ),
        FormatDecl(
            "mxfp8",
            impl="qplug_fp4.loader:MXFP8Format",
            detects=("mxfp8",),
            layouts=("mxfp8",),
            schemes=MXFP8,
            ops=OPS,
            summary="e4m3 codes, power-of-two block scales",
        ),
    ]


@hookimpl
def qplug_quantizers() -> list[QuantizerDecl]:
    """Round to nearest by the scale rules of four producers; ``rtn`` of core has the rule ``ceil`` with ties to even."""
    mx = ("Wmxfp4A{16,fp8} g32 a:token", f"Wmxfp4A{{mxfp4,mxfp8}} g32 {MX_RULES}", f"Wmxfp8A{{16,mxfp8}} g32 {MX_RULES}")
    nv = ("Wnvfp4A{16,fp8} g16|g32 a:token",)
    return [
        _rule("mx_floor", "MXFloor", mx, "exponent floor(log2 amax) - emax, as OCP MX 1.0 and gpt-oss"),
        _rule("mx_ct", "MXQuarter", mx, "floor after a quarter is added, as compressed-tensors"),
        _rule("mx_even", "MXEven", mx, "floor after half a step of the code is added, as Quark"),
        _rule("mx_modelopt", "MXModelOpt", mx, "exponent ceil(log2(amax / largest)), FP4 ties towards zero, as ModelOpt"),
        _rule("nvfp4_modelopt", "NVFP4ModelOpt", nv, "global scale amax / 2688, a multiplier, as ModelOpt"),
        _rule(
            "nvfp4_unit_input",
            "NVFP4UnitInput",
            ("Wnvfp4Anvfp4 g16 a:g16.local",),
            "as nvfp4_modelopt, inputs under scale 1, as RTP-LLM",
        ),
        _rule("nvfp4_ct", "NVFP4Divisor", nv, "global scale 2688 / amax, a divisor, as compressed-tensors"),
    ]


def _rule(name: str, cls: str, schemes: tuple[str, ...], summary: str) -> QuantizerDecl:
    return QuantizerDecl(f"fp4.{name}", impl=f"qplug_fp4.quantizer:{cls}", schemes=schemes, summary=summary)
