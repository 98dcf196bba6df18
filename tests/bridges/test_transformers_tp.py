"""Two ranks with gloo hold half of every quantized layer each, and compute what one rank does."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers", "5.23")
pytest.importorskip("accelerate")  # transformers asks for it where a model is distributed.

import qplug_core
from qplug_core.bridges.transformers import parallel
from qplug_core.errors import UsageError
from qplug_core.layer import LayerSpec, StoredPart

sys.path.insert(0, str(Path(__file__).parents[1]))
from bridges import proof
from conftest import DATA

SERVED = [
    "gptqmodel-w4-g128-sym-descact",
    "mixtral-gptqmodel-w4-g32-sym",
    "deepseekv3-transformers-fp8block-perexpert",
]
WHOLE = "gptoss-handwritten-mxfp4"
"""transformers has no plan for its experts, which alone are quantized: every rank holds all of them."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("tp") / "found.pt"
    script = Path(__file__).with_name("transformers_tp.py")
    folders = [str(DATA / name) for name in [*SERVED, WHOLE]]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(script), str(out), *folders], capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.mark.parametrize("name", [*SERVED, WHOLE])
def test_two_ranks(ranks, name, capsys, request):
    ref = load_file(DATA / name / "ref.safetensors")
    dense, original = (torch.log_softmax(ref[f"logits_{n}_fp32"].float(), dim=-1) for n in ("dequant", "unquantized"))
    found, held = ranks[name]
    error, contrast = float((found - dense).abs().max()), float((original - dense).abs().max())
    with capsys.disabled():
        print(f"\n{name:45} 2 ranks {error:.1e}  unquantized model {contrast:.1e}")
    assert error < 1e-4
    assert contrast > 0.1
    plan = qplug_core.load(DATA / name, dtype="float32").plan
    whole = sum(d.layer.n * d.layer.k for d in plan.decisions if d.quantized)
    assert held == whole if name == WHOLE else held < 0.8 * whole
    proof.record(
        "transformers", version("transformers"), proof.method_of(DATA / name), f"2 ranks {name}", request.node.nodeid, error, contrast
    )  # fmt: skip


def test_what_it_does_not_cut_is_refused():
    odd = LayerSpec("up_proj", "linear", 97, 64)
    with pytest.raises(UsageError, match="up_proj has 97 rows, which 2 ranks do not divide"):
        parallel._cut(odd, "colwise", 0, 2)
    assert parallel._cut(odd, "rowwise", 1, 2).columns == (32, 64)
    with pytest.raises(UsageError, match="cuts it 'packed_colwise', which qplug does not"):
        parallel.check_style({"up_proj": "packed_colwise"}, odd)
    parallel.check_style({"up_proj": "colwise"}, odd)


def test_other_parallelism_is_refused():
    def model(**sizes):
        return SimpleNamespace(config=SimpleNamespace(distributed_config=SimpleNamespace(**sizes)))

    assert parallel.world_of(SimpleNamespace(config=SimpleNamespace())) == parallel.world_of(model(tp_size=1)) == (0, 1)
    with pytest.raises(UsageError, match="ep_size=4 was asked for"):
        parallel.world_of(model(tp_size=2, ep_size=4))


def test_experts_stored_as_one_are_cut_half_by_half():
    whole = LayerSpec("e.0.gate_up_proj", "experts", 8, 16, ((StoredPart("e.gate_up_proj", 8, expert=0),),))
    module = SimpleNamespace(gate_up_proj=None)
    cut = parallel._expert(module, "e", whole, "gate_up_proj", {"e": "moe_tp_experts"}, 1, 2)
    assert [part.rows for part in cut.alternatives[0]] == [(2, 4), (6, 8)]
    with pytest.raises(UsageError, match="interleaves its halves or has biases"):
        parallel._expert(SimpleNamespace(is_concatenated=False), "e", whole, "gate_up_proj", {"e": "moe_tp_experts"}, 1, 2)
