"""What qplug-fp4 offers. Torch-free: code is named here and imported when it is needed."""

from __future__ import annotations

from qplug_core.decl import OPTIMIZED, FormatDecl, KernelDecl, QuantizerDecl
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
def qplug_kernels() -> list[KernelDecl]:
    """FP4 and MXFP8 weights times 16-bit activations, or those that the formats quantize."""
    return [
        KernelDecl(
            "fp4.cpu_wfp4a16",
            impl="qplug_fp4.kernels.cpu_wfp4a16:CpuWFP4A16",
            ops=OPS,
            schemes=("Wnvfp4A16 g16|g32", "Wmxfp4A16 g32", "Wfp4A16 g*", "Wmxfp8A16 g32"),
            devices=("avx2",),
            rank=OPTIMIZED,
            summary="x86 vector units, codes looked up in registers",
        ),
        KernelDecl(
            "fp4.cpu_wfp4afp4",
            impl="qplug_fp4.kernels.cpu_wfp4afp4:CpuWFP4AFP4",
            ops=OPS,
            schemes=(
                "Wnvfp4Anvfp4 g16 a:g16.local",
                "W{nvfp4,mxfp4}Afp8 g16|g32 a:token|tensor.static",
                "Wmxfp4A{mxfp4,mxfp8} g32 a:g32 rules=ct|floor|ceil|even|up",
                "Wmxfp8Amxfp8 g32 a:g32 rules=ct|floor|ceil|even|up",
            ),
            devices=("avx2",),
            rank=OPTIMIZED,
            mode="emulated",
            summary="x86 vector units, FP4 and FP8 codes multiplied as bfloat16 or float32",
        ),
        KernelDecl(
            "fp4.triton_wfp4a16",
            impl="qplug_fp4.kernels.triton_wfp4a16:TritonWFP4A16",
            ops=OPS,
            schemes=("Wnvfp4A16 g16|g32", "Wmxfp4A16 g32", "Wfp4A16 g*", "Wmxfp8A16 g32"),
            devices=("sm_80+", "gfx90a+", "gfx11*", "gfx12*"),
            rank=OPTIMIZED,
            dtypes=("bfloat16", "float16"),
            requires=("triton>=3.6",),
            summary="GPU matrix units, FP4 and FP8 codes decoded from their bits",
        ),
        KernelDecl(
            "fp4.triton_weight_only",
            impl="qplug_fp4.kernels.triton_weight_only:TritonFP4WeightOnly",
            ops=OPS,
            schemes=(
                "Wnvfp4Anvfp4 g16 a:g16.local",
                "W{nvfp4,mxfp4}Afp8 g16|g32 a:token|tensor.static",
                "Wmxfp4A{mxfp4,mxfp8} g32 a:g32 rules=ct|floor|ceil|even|up",
                "Wmxfp8Amxfp8 g32 a:g32 rules=ct|floor|ceil|even|up",
            ),
            devices=("sm_80+", "gfx90a+", "gfx11*", "gfx12*"),
            rank=OPTIMIZED,
            dtypes=("bfloat16", "float16"),
            mode="weight-only",
            requires=("triton>=3.6",),
            summary="as fp4.triton_wfp4a16, activations left at 16 bit",
        ),
        KernelDecl(
            "fp4.triton_wfp4afp8",
            impl="qplug_fp4.kernels.triton_wfp4afp8:TritonWFP4AFP8",
            ops=OPS,
            schemes=("Wmxfp4Afp8 g32 a:token|tensor|tensor.static", "Wnvfp4Afp8 g32 a:token|tensor|tensor.static"),
            devices=("sm_89+", "gfx942", "gfx950", "gfx12*"),
            # Before the weight-only kernel, which takes the same schemes on more devices.
            rank=OPTIMIZED + 1,
            dtypes=("bfloat16", "float16"),
            requires=("triton>=3.6",),
            summary="FP8 matrix units, FP4 codes widened in registers",
        ),
        KernelDecl(
            "fp4.triton_wnvfp4anvfp4",
            impl="qplug_fp4.kernels.triton_wnvfp4anvfp4:TritonWNVFP4ANVFP4",
            ops=OPS,
            schemes=("Wnvfp4Anvfp4 g16 a:g16.local",),
            devices=("sm_100+",),
            rank=OPTIMIZED + 1,
            dtypes=("bfloat16", "float16"),
            requires=("triton>=3.6",),
            summary="FP4 matrix units with block scales",
        ),
        KernelDecl(
            "fp4.triton_wmxamx",
            impl="qplug_fp4.kernels.triton_wmxamx:TritonWMXAMX",
            ops=OPS,
            schemes=(
                "Wmxfp4A{mxfp4,mxfp8} g32 a:g32 rules=ct|floor|ceil|even|up",
                "Wmxfp8Amxfp8 g32 a:g32 rules=ct|floor|ceil|even|up",
            ),
            devices=("sm_100+", "gfx950"),
            rank=OPTIMIZED + 1,
            dtypes=("bfloat16", "float16"),
            requires=("triton>=3.6",),
            summary="FP4 and FP8 matrix units with block scales",
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
