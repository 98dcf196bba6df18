"""The capability matrix follows from declarations and proof files, and claims no more."""

from __future__ import annotations

import json

from qplug_core import matrix
from qplug_core.builtin import qplug_kernels
from qplug_core.decl import Declarations, FormatDecl, KernelDecl, QuantizerDecl
from qplug_core.device import Device
from qplug_core.matrix import CapabilityMatrix
from qplug_core.registry import Entry, PluginRow, Registry


def registry(*kernels, formats=(), quantizers=()):
    row = PluginRow("p", "dist-p", "1", "1.0", "ready", module="qplug_no_such_package.plugin", declarations=Declarations())
    return Registry(
        [row],
        formats=[Entry(f, row) for f in formats],
        kernels=[Entry(k, row) for k in (*qplug_kernels(), *kernels)],
        quantizers=[Entry(q, row) for q in quantizers],
    )


FORMAT = FormatDecl("f", impl="x:Y", detects=("f",), schemes=("W4A16 g*",), ops=("linear", "lm_head"))
FAST = KernelDecl("p.fast", impl="x:Y", ops=("linear",), schemes=("W4A16 g*",), devices=("sm_80+",))
COLUMNS = [(name, Device.from_name(name)) for name in ("sm_75", "sm_90")]


def test_a_kernel_makes_a_cell_native_where_it_is_declared():
    row = CapabilityMatrix.of(registry(FAST, formats=[FORMAT]), COLUMNS).methods[0]
    assert row.cell("sm_90").status == "native"
    assert row.cell("sm_90").kernel == "p.fast"
    assert row.cell("sm_75").status == "reference"
    assert "sm_80+" in row.cell("sm_75").reason


def test_an_operation_that_the_format_does_not_store_is_no():
    row = CapabilityMatrix.of(registry(FAST, formats=[FORMAT]), COLUMNS).methods[0]
    assert row.cell("sm_90", "embedding").status == "no"
    assert row.cell("sm_90", "lm_head").status == "reference"


def test_modes_are_kept_apart():
    weight_only = KernelDecl(
        "p.wo", impl="x:Y", ops=("linear",), schemes=("Wfp8Afp8 channel",), devices=("sm_80+",), mode="weight-only"
    )
    fmt = FormatDecl("g", impl="x:Y", schemes=("Wfp8Afp8 channel",))
    assert (
        CapabilityMatrix.of(registry(weight_only, formats=[fmt]), COLUMNS).methods[0].cell("sm_90").status == "weight-only"
    )


def test_load_modes_follow_from_quantizers():
    rtn = QuantizerDecl("rtn", impl="x:Y", schemes=("W4A16 g*",))
    calibrated = QuantizerDecl("gptq", impl="x:Y", schemes=("W4A16 g*",), calibrated=True)
    assert CapabilityMatrix.of(registry(formats=[FORMAT], quantizers=[rtn]), COLUMNS).methods[0].load["online"]
    row = CapabilityMatrix.of(registry(formats=[FORMAT], quantizers=[calibrated]), COLUMNS).methods[0]
    assert row.load == {"prequantized": True, "online": False, "offline": True}


def test_nothing_is_proven_without_a_proof_file(tmp_path, monkeypatch):
    package = tmp_path / "qplug_no_such_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert CapabilityMatrix.of(registry(FAST, formats=[FORMAT]), COLUMNS).methods[0].cell("sm_90").proof == "declared"
    (package / "proof.json").write_text(json.dumps({"schema": 1, "kernels": {"p.fast": {"sm_90": {"status": "compiled"}}}}))
    monkeypatch.syspath_prepend(str(tmp_path))
    matrix._proofs.cache_clear()
    assert CapabilityMatrix.of(registry(FAST, formats=[FORMAT]), COLUMNS).methods[0].cell("sm_90").proof == "compiled"
    matrix._proofs.cache_clear()
