"""docs/embedding.md runs as it is written, on nothing but the public API."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qplug_core
from qplug_core.errors import CoverError

sys.path.insert(0, str(Path(__file__).parent))
from conftest import DATA, make_model

PAGE = Path(__file__).parents[1] / "docs" / "embedding.md"
CODE = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[1] if PAGE.exists() else ""

pytestmark = pytest.mark.skipif(not CODE, reason="docs are not beside the tests")


@pytest.fixture(scope="module")
def Llama():
    namespace = {}
    exec(compile(CODE, str(PAGE), "exec"), namespace)
    return namespace["Llama"]


def test_it_is_short_and_public():
    lines = [line for line in CODE.splitlines() if line.strip()]
    assert len(lines) < 60
    assert not re.search(r"\b_\w+\(|\._\w", re.sub(r"__init__", "", CODE))
    modules = {node.module for node in ast.walk(ast.parse(CODE)) if isinstance(node, ast.ImportFrom)}
    assert modules == {"torch.nn.functional", "qplug_core", "qplug_core.planner", "qplug_core.source"}


@pytest.mark.parametrize("name", ["gptqmodel-w4-g128-sym-descact", "gptqmodel-w3-g128-sym"])
def test_a_checkpoint_is_its_dequantized_copy(Llama, name):
    engine = Llama(DATA / name, kv_cache="16bit")
    ref = load_file(DATA / name / "ref.safetensors")
    dense, original = (torch.log_softmax(ref[f"logits_{n}_fp32"], dim=-1) for n in ("dequant", "unquantized"))
    found = torch.log_softmax(engine.logits(ref["input_ids"]), dim=-1)
    assert float((found - dense).abs().max()) < 1e-4
    assert float((original - dense).abs().max()) > 0.1
    assert sum(d.quantized for d in engine.plan.decisions) == 8


def test_quantized_while_it_is_read(Llama, tmp_path):
    folder = make_model(tmp_path / "llama")
    ids = torch.arange(20)[None]
    online = Llama(folder, quantize="W4A16_g32").logits(ids)
    reference = qplug_core.load(folder, dtype="float32", quantize="W4A16_g32").logits(ids)
    assert float((online - reference).abs().max()) < 1e-4
    assert float((Llama(folder).logits(ids) - online).abs().max()) > 1e-2


def test_a_missing_tensor_is_refused(Llama, tmp_path):
    folder = make_model(tmp_path / "llama")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(CoverError, match=r"model\.layers\.2\."):
        Llama(folder)
