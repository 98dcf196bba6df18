"""Every family of the engines' model tables, with every scheme that they tick for it: quantized online, saved, reloaded, compared."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from families import FAMILIES, TICKS
from matrix import image_features, linear_layers, load, logits, quantized_layers, reason_against, relative, run

from qplug_core.errors import UsageError
from qplug_core.kv import kv_scheme
from qplug_core.reference.kv_cache import CacheCoder

CELLS = [(name, column) for name, family in FAMILIES.items() for column in (*family.ticks, *family.more)]
DONE = [(name, column) for name, column in CELLS if not reason_against(name, column)]
DOCS = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model of a family on disk, made once."""
    made: dict[str, Path] = {}

    def get(name):
        if name not in made:
            made[name] = FAMILIES[name].build(tmp_path_factory.mktemp("model"))
        return made[name]

    return get


@pytest.mark.parametrize(("name", "column"), DONE, ids=[f"{n}-{c}".replace(" ", "") for n, c in DONE])
def test_quantized_online_saved_and_reloaded(name, column, folder, tmp_path):
    cell = run(name, column, folder(name), tmp_path / "out")
    assert cell.saved == 0.0
    # Logits that have nothing to do with each other are at 1.4.
    assert 1e-4 < cell.distance < TICKS[column].bound
    assert cell.layers > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_linear_layer_of_the_language_part_is_quantized_and_no_other(name, folder):
    family = FAMILIES[name]
    found = {layer for layer in quantized_layers(load(folder(name), quantize="W8A16")) if ".experts." not in layer}
    expected = {layer for layer in linear_layers(folder(name)) if layer.startswith(family.language)}
    assert found == expected


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.vision])
def test_the_vision_part_is_left_alone(name, folder):
    family = FAMILIES[name]
    plain, quantized = load(folder(name)), load(folder(name), quantize="W4A16_g128")
    assert len(linear_layers(folder(name))) > len(quantized_layers(quantized)) > 0
    assert torch.equal(image_features(quantized, family), image_features(plain, family))
    assert relative(logits(quantized, family), logits(plain, family)) > 1e-2
    left = [note for note in quantized.plan.all_notes() if "language model" in note]
    assert left, "the plan does not say what was left out"


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if "FP8 KV" in f.ticks and not reason_against(n, "FP8 KV")])
def test_a_cache_without_loss_changes_nothing(name, folder):
    """Every key and value goes through the coders once, and nothing else does: not what a decoder sees of its encoder."""
    engine = load(folder(name), kv_cache="fp8")
    calls = []

    class Lossless(CacheCoder):
        """Bytes of float32, in a scheme that no kernel reads."""

        def width(self, depth):
            return 4 * depth

        def encode(self, x):
            calls.append(x)
            return x.float().contiguous().view(torch.uint8)

        def decode(self, data, depth, dtype):
            return data.contiguous().view(torch.float32).to(dtype)

    expected = logits(load(folder(name)), FAMILIES[name])
    engine.coders = dict.fromkeys(engine.coders, (Lossless(kv_scheme("nvfp4")), Lossless(kv_scheme("nvfp4"))))
    assert relative(logits(engine, FAMILIES[name]), expected) < 1e-6
    assert len(calls) == 2 * len(engine.coders) == 4


def test_an_encoder_has_no_cache_to_quantize(folder):
    with pytest.raises(UsageError, match="keeps no keys and values"):
        load(folder("BERT"), kv_cache="fp8")


def test_a_scheme_that_no_layer_takes_is_refused(folder):
    """A dense model has no experts: what was asked for is no load at 16 bit."""
    with pytest.raises(UsageError, match="no layer that takes it"):
        load(folder("LLaMA"), quantize="experts=W8A16")


def test_the_page_has_every_cell():
    """Numbers are of one machine; which cells there are, and what they say is missing, is not."""
    text = DOCS.read_text(encoding="utf-8")
    for name, family in FAMILIES.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        cells = dict(zip(TICKS, [c.strip() for c in row.split("|")[3:-1]], strict=False))
        shown = {column for column, cell in cells.items() if cell}
        assert shown == {c for c in (*family.ticks, *family.more) if c in TICKS}
    for name, column in CELLS:
        assert reason_against(name, column) in text
