"""``qplug list-methods --engines``: what test runs wrote, and nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from qplug_core import engines
from qplug_core.cli import main
from qplug_core.engines import EngineMatrix
from qplug_core.registry import get_registry

sys.path.insert(0, str(Path(__file__).parent))
from bridges import proof


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Two proofs and a refusal, written as tests write them."""
    monkeypatch.setenv("QPLUG_PROVE", "1")
    monkeypatch.setattr(proof, "TARGET", tmp_path / "proof.json")
    monkeypatch.setattr(engines, "PROOF", tmp_path / "proof.json")
    proof.record("vllm", "0.32.0", "gptq", "checkpoint a", "tests/x.py::test_a", 1.23456e-7, 0.5)
    proof.record("vllm", "0.32.0", "gptq", "2 ranks", "tests/x.py::test_b", 2e-7, 0.5)
    proof.record_refusal(
        "sglang", "0.5.23", "mxfp4", "experts", "tests/y.py::test_c", "experts have biases, which it has not"
    )
    proof.record_limits("sglang", "0.5.23", "a CPU", ["GPUs"])
    return tmp_path / "proof.json"


def cell(matrix: EngineMatrix, method: str, key: str) -> tuple[str, str]:
    engine = next(e for e in matrix.engines if e.key == key)
    return matrix.status(method, engine), matrix.reason(method, engine)


def test_proven_refused_and_not_run(recorded):
    matrix = EngineMatrix.of(get_registry(), recorded)
    assert cell(matrix, "gptq", "vllm") == ("proven", "")
    assert cell(matrix, "mxfp4", "sglang") == ("refused", "experts have biases, which it has not")
    assert cell(matrix, "gptq", "sglang") == ("not run", "no test that was run has loaded it in SGLang 0.5.23")
    assert cell(matrix, "gptq", "transformers") == ("not run", "no test that was run has loaded it in transformers")


def test_json_names_the_test_of_each_claim(recorded):
    matrix = EngineMatrix.of(get_registry(), recorded).to_json()
    assert matrix["schema"] == 1
    gptq = next(m for m in matrix["methods"] if m["name"] == "gptq")["engines"]["vllm"]
    assert gptq["proofs"][1] == {"feature": "checkpoint a", "test": "tests/x.py::test_a", "error": 1.2e-07, "contrast": 0.5}
    sglang = next(e for e in matrix["engines"] if e["key"] == "sglang")
    assert sglang["not_run"] == ["GPUs"]
    assert sglang["takes"].startswith(">=")


def test_another_version_of_an_engine_starts_with_nothing(recorded):
    proof.record("vllm", "0.33.0", "awq", "checkpoint b", "tests/x.py::test_d", 1e-7, 0.5)
    matrix = EngineMatrix.of(get_registry(), recorded)
    assert cell(matrix, "gptq", "vllm")[0] == "not run"
    assert cell(matrix, "awq", "vllm")[0] == "proven"


def test_nothing_is_written_unless_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("QPLUG_PROVE", raising=False)
    monkeypatch.setattr(proof, "TARGET", tmp_path / "proof.json")
    proof.record("vllm", "0.32.0", "gptq", "checkpoint a", "tests/x.py::test_a", 1e-7, 0.5)
    assert not proof.TARGET.exists()


@pytest.mark.parametrize("option", [[], ["--markdown"], ["--json"]])
def test_every_form_of_the_report_names_tests_and_what_was_not_run(recorded, option):
    done = CliRunner().invoke(main, ["list-methods", "--engines", *option], catch_exceptions=False)
    assert done.exit_code == 0
    said = " ".join(done.output.split())
    assert "tests/x.py::test_a" in said
    assert "experts have biases, which it has not" in said
    assert "0.5.23" in said
    assert option == ["--markdown"] or "GPUs" in said


def test_what_the_repository_claims_was_written_by_tests_that_are_there():
    root = Path(__file__).parents[1]
    body = json.loads(engines.PROOF.read_text()) if engines.PROOF.exists() else {"engines": {}}
    for engine in body["engines"].values():
        for features in engine.get("methods", {}).values():
            for entry in features.values():
                file, _, name = entry["test"].partition("::")
                assert f"def {name.partition('[')[0]}(" in (root / file).read_text()


def test_the_report_imports_no_torch():
    import subprocess

    code = (
        "import sys; from qplug_core.engines import EngineMatrix; from qplug_core.registry import get_registry;"
        "EngineMatrix.of(get_registry()); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
