"""The compile matrix: what it judges, and that every claim in a proof file is about the sources that are here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from qplug_core.kernels.triton_launch import CompileCase
from qplug_core.kernels.triton_tables import splits_of, tile_for, tiles
from qplug_core.registry import get_registry
from qplug_core.testing import compile_matrix
from qplug_core.testing.compile_cells import TARGETS, Cell, problem_of
from qplug_core.testing.compile_matrix import Claim

CASE = CompileCase("product", "module:function", {}, {}, {}, "f16", spill=16)
WGMMA = "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16"
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        (Cell("product", "sm_90", matrix=[WGMMA]), ""),
        (Cell("product", "sm_80", matrix=[MMA]), ""),
        (Cell("product", "sm_90", matrix=[MMA]), "has no wgmma"),
        (Cell("product", "sm_80", matrix=[]), "found none"),
        (Cell("product", "sm_80", matrix=[MMA.replace("f16", "bf16")]), "has no matrix instruction for f16"),
        (Cell("product", "sm_89", matrix=[MMA], shared=101377), "shared memory"),
        (Cell("product", "sm_80", matrix=[MMA], spill=17), "spills 17 bytes"),
        (Cell("product", "sm_80", failed="does not compile"), "does not compile"),
        (Cell("product", "sm_80", matrix=[MMA, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"]), "tf32"),
        (Cell("product", "gfx90a", matrix=["v_mfma_f32_32x32x8f16"]), ""),
        (Cell("product", "gfx942", matrix=["v_mfma_f32_16x16x16_f16"]), ""),
        (Cell("product", "gfx942", matrix=["v_mfma_f32_16x16x16_bf16"]), "has no matrix instruction"),
    ],
)
def test_judgement_of_a_cell(cell: Cell, found: str) -> None:
    problem = problem_of(cell, CASE)
    assert found in problem
    assert bool(problem) == bool(found)


@pytest.mark.parametrize(
    ("matrix", "target", "name"),
    [
        ("bf16", "gfx90a", "v_mfma_f32_16x16x16bf16_1k"),
        ("i8", "sm_80", "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"),
        ("i8", "gfx1100", "v_wmma_i32_16x16x16_iu8"),
        ("i8", "gfx942", "v_mfma_i32_32x32x16_i8"),
        ("fp8", "gfx942", "v_mfma_f32_32x32x16_fp8_fp8"),
        ("fp8", "sm_90", "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3"),
        ("nvf4", "sm_100", "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16"),
        (
            "nvf4",
            "sm_120",
            "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3",
        ),
        ("mxf4", "sm_100", "tcgen05.mma.cta_group::1.kind::mxf4.block_scale.block32"),
        (
            "mxf4",
            "sm_120",
            "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0",
        ),
        ("mxf4", "gfx950", "v_mfma_scale_f32_16x16x128_f8f6f4"),
        (
            "mxf8",
            "sm_120",
            "mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3.f32.ue8m0",
        ),
    ],
)
def test_names_of_matrix_instructions(matrix: str, target: str, name: str) -> None:
    case = CompileCase("product", "module:function", {}, {}, {}, matrix)
    assert problem_of(Cell("product", target, matrix=[name]), case) == ""
    other = CompileCase("product", "module:function", {}, {}, {}, "f16" if matrix != "f16" else "i8")
    assert problem_of(Cell("product", target, matrix=[name]), other)


def test_every_target_has_tiles_up_to_any_number_of_tokens() -> None:
    for target in TARGETS:
        for bits in (2, 3, 4, 8):
            assert tile_for("weight_only", target, bits, 1, 4096, 4096) in tiles("weight_only", target, bits)
            assert tile_for("weight_only", target, bits, 4096, 4096, 4096) is None
        for tokens in (1, 17, 100, 100_000):
            assert tile_for("scaled", target, 8, tokens, 4096, 4096) in tiles("scaled", target, 8)


def test_splits_fill_the_processors_and_leave_two_units_each() -> None:
    assert splits_of(units=32, tiles_of_output=64, processors=132) == 4
    assert splits_of(units=2, tiles_of_output=1, processors=132) == 1
    assert splits_of(units=1000, tiles_of_output=1, processors=132) == 16
    assert splits_of(units=1000, tiles_of_output=1000, processors=132) == 1


def test_the_key_of_a_case_does_not_depend_on_the_process() -> None:
    case = CompileCase("c", "qplug_core.kernels.triton_weight_only:x", {"a": "*fp16"}, {"B": 1}, {}, unaligned=("m", "n"))
    assert "frozenset" not in repr(case)
    assert compile_matrix.case_digest(case) == compile_matrix.case_digest(case)


def test_the_digest_covers_every_file_that_a_kernel_takes_functions_from() -> None:
    """A plugin's kernel calls core's, which call the device functions: a change in any of them is another kernel."""
    core = Path(compile_matrix.__file__).parent.parent / "kernels"
    spec = importlib.util.find_spec("qplug_int8")
    texts = compile_matrix._sources(Path(spec.origin).parent / "kernels" / "triton_wint2_kernels.py")
    for name in ("triton_experts_kernels", "triton_weight_only_kernels", "triton_mixed_kernels", "triton_parts"):
        assert (core / f"{name}.py").read_bytes() in texts


def _claims() -> list[tuple[str, str, str]]:
    found = []
    for entry in get_registry().kernels:
        module = entry.plugin.module
        if not any(text.startswith("triton") for text in entry.decl.requires) or not module:
            continue
        spec = importlib.util.find_spec(module.partition(".")[0])
        path = Path(spec.origin).parent / "proof.json"
        proofs = json.loads(path.read_text())["kernels"].get(entry.decl.name, {}) if path.exists() else {}
        found += [(entry.decl.name, target, proof["sources"]) for target, proof in proofs.items() if "sources" in proof]
    return found


def test_proofs_are_about_these_sources() -> None:
    """A kernel or a tile that changed after the matrix ran has no proof."""
    pytest.importorskip("triton", reason="triton is not installed; `tox run -e kernels` installs it")
    proofs = _claims()
    assert proofs, "no plugin has a proof of a compiled Triton kernel; run python -m qplug_core.testing.compile_matrix"
    claims = compile_matrix.claims(get_registry(), TARGETS, "all")
    now = {(c.name, c.target): compile_matrix.cases_digest(c.cases) for c in claims}
    stale = [f"{name} on {target}" for name, target, sources in proofs if now.get((name, target)) != sources]
    assert not stale, f"compiled from other sources: {', '.join(stale)}; run {compile_matrix.COMMAND}"


def test_another_version_of_triton_adds_to_a_proof_and_takes_nothing_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = next(e for e in get_registry().kernels if e.decl.name == "gptq.triton_wna16")
    stock = importlib.metadata.version
    in_use = ["3.9.0"]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: in_use[0] if name == "triton" else stock(name))
    case = CompileCase("c", "qplug_core.kernels.triton_weight_only:x", {}, {}, {})
    good, bad = (Claim(entry, "sm_80", [case], [Cell("c", "sm_80", problem=text)]) for text in ("", "spills"))
    proofs: dict[str, Any] = {}
    compile_matrix._record(good, proofs)
    assert proofs["sm_80"]["versions"]["triton"] == "3.9.0"
    in_use[0] = "3.6.0"
    compile_matrix._record(good, proofs)
    assert (proofs["sm_80"]["versions"]["triton"], proofs["sm_80"]["also"]) == ("3.9.0", ["3.6.0"])
    compile_matrix._record(bad, proofs)
    assert "also" not in proofs["sm_80"]
    compile_matrix._record(good, proofs)
    in_use[0] = "3.9.0"
    compile_matrix._record(good, proofs)
    assert proofs["sm_80"]["also"] == ["3.6.0"]
    compile_matrix._record(bad, proofs)
    assert proofs == {}


def test_a_failed_cell_takes_the_claim_away() -> None:
    entry = get_registry().kernels[0]
    claim = Claim(entry, "sm_80", [CASE, CASE], [Cell("product", "sm_80"), Cell("product", "sm_80")])
    assert claim.holds
    claim.cells[1].problem = "spills"
    assert not claim.holds
    claim.cells.pop()
    assert not claim.holds
