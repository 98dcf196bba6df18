"""What core itself declares: the reference kernels, which take everything, and round to nearest."""

from __future__ import annotations

from .decl import API as API
from .decl import OPTIMIZED, REFERENCE, KernelDecl, QuantizerDecl
from .hookspecs import hookimpl


@hookimpl
def qplug_kernels() -> list[KernelDecl]:
    """The floor: one kernel for each operation, on any device; and rows of embeddings on CPUs."""

    def reference(name: str, impl: str, *ops: str) -> KernelDecl:
        return KernelDecl(
            f"core.{name}",
            impl=f"qplug_core.reference.{impl}",
            ops=ops,  # type: ignore[arg-type]
            schemes=("*",),
            devices=("any",),
            rank=REFERENCE,
            mode="reference",
            summary="dequantizes, then multiplies: the definition of correct",
        )

    return [
        reference("reference_linear", "linear:ReferenceLinear", "linear", "lm_head"),
        reference("reference_experts", "linear:ReferenceExperts", "experts"),
        reference("reference_embedding", "embedding:ReferenceEmbedding", "embedding"),
        reference("reference_kv_cache", "kv_cache:ReferenceKVCache", "kv_cache"),
        KernelDecl(
            "core.cpu_embedding",
            impl="qplug_core.kernels.cpu_embedding:CpuEmbedding",
            ops=("embedding",),
            schemes=("*",),
            devices=("avx2",),
            rank=OPTIMIZED,
            summary="x86, only the rows that are asked for are decoded",
        ),
    ]


@hookimpl
def qplug_quantizers() -> list[QuantizerDecl]:
    """Round to nearest makes every scheme whose scales can be computed from the weight alone."""
    integers = "tensor|channel|g*|b* sym|asym"
    floats = "tensor|channel|g*|b*"
    return [
        QuantizerDecl(
            "rtn",
            impl="qplug_core.quantizer:RoundToNearest",
            schemes=(
                f"W{{2,3,4,5,6,7,8}}A{{16,8,fp8}} {integers} a:token|g*|token.asym|tensor rules=127|127.5",
                f"W{{2,3,4,5,6,7,8}}A4 {integers} a:token|g*|token.asym rules=127.5",
                f"W{{fp8,fp8e5m2}}A{{16,fp8,8}} {floats} a:token|g*|tensor",
                "W{nf4,fp4bnb,fp4}A{16,8,fp8} channel|g* a:token|g*",
                "Wmxfp4A{16,fp8,mxfp4,mxfp8} g32 a:token|g*",
                "Wmxfp8A{16,mxfp8} g32 a:g*",
                "Wnvfp4A{16,fp8} g16 a:token|g*",
            ),
            summary="round to nearest",
        )
    ]
