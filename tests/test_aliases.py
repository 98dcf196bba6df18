"""Words of other engines for a quantization at load."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import qplug_core
from qplug_core.aliases import BY_OP, NO_SCHEME, SCHEME_WORDS, online_schemes
from qplug_core.engine.explain import explain_checkpoint
from qplug_core.errors import PluginError, SchemeError
from qplug_core.layer import LayerSpec
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source

sys.path.insert(0, str(Path(__file__).parent))
from conftest import make_model


@pytest.mark.parametrize("word", SCHEME_WORDS)
def test_a_word_is_a_scheme_and_says_which(word):
    schemes, meaning = online_schemes(word.upper())
    assert schemes["linear"] == schemes["experts"] == QuantScheme.parse(SCHEME_WORDS[word])
    assert str(schemes["linear"]) in meaning


def test_a_scheme_name_needs_no_explanation():
    assert online_schemes("W8A16")[1] == ""
    assert online_schemes("weight-only int4")[1] == "'weight-only int4' means W4A16_channel"
    assert online_schemes(None) == ({}, "")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("W8A8C8", ("int8", "int8", "int8")), ("W8A8C16", ("int8", "int8", None)), ("W4A16C16", ("int4", None, None)),
        ("WInt4", ("int4", None, None)), ("weight-only int4", ("int4", None, None)), ("WNF4A8C8", ("nf4", "int8", "int8")),
        ("Wfp8Afp8", ("fp8_e4m3", "fp8_e4m3", None)), ("W4Afp8", ("int4", "fp8_e4m3", None)),
    ],
)  # fmt: skip
def test_the_terms_of_fastdeploy(name, parts):
    scheme = online_schemes(name)[0]["linear"]
    assert tuple(None if p is None else p.dtype for p in (scheme.weight, scheme.act, scheme.kv)) == parts


@pytest.mark.parametrize("word", BY_OP)
def test_methods_that_treat_experts_otherwise(word):
    schemes, meaning = online_schemes(word)
    assert BY_OP[word] == meaning.partition(" means ")[2]
    assert "experts" in schemes


@pytest.mark.parametrize("word", NO_SCHEME)
def test_a_word_that_is_no_scheme_is_refused_with_what_to_write(word):
    with pytest.raises(SchemeError) as refused:
        online_schemes(word.upper())
    said = str(refused.value)
    assert ". " not in said
    written = re.search(r"(?:such as|write --kv-cache|write(?! a )) (\w+)", said)[1]
    assert online_schemes(written)[0]["linear"].weight is not None


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("wint88", "wint8"), ("fp8_per_blok", "fp8_per_block"), ("mixquant", "mix_quant"), ("gptqq", "gptq"), ("nvfp44", "nvfp4")],
)  # fmt: skip
def test_a_wrong_word_names_the_nearest(wrong, near):
    with pytest.raises(SchemeError, match=f"did you mean '{near}'"):
        online_schemes(wrong)


def test_a_word_that_is_none_is_refused():
    with pytest.raises(SchemeError, match="W4A16_g128"):
        online_schemes("int5ish")
    with pytest.raises(SchemeError, match="linear or experts"):
        online_schemes("embedding=W8A16")


def test_experts_and_linear_layers_of_a_model(tmp_path):
    folder = make_model(tmp_path / "m", "mixtral", num_local_experts=4)
    plan = qplug_core.load(folder, quantize="mix_quant").plan
    found = {d.layer.op: str(d.segments[0].scheme) for d in plan.decisions}
    assert found == {"embedding": "None", "linear": "W8A16", "experts": "W4A16_channel", "lm_head": "None"}
    assert any("'mix_quant' means" in note for note in plan.all_notes())


@pytest.mark.parametrize("word", SCHEME_WORDS)
def test_every_word_is_made_at_load(word):
    """The plan asks for a quantizer: a word that only files can have is no word for a load."""
    layers = [LayerSpec("a.q_proj", "linear", 256, 256)]
    source = MemorySource({"a.q_proj.weight": torch.zeros(256, 256, dtype=torch.bfloat16)})
    found = qplug_core.plan(Source(Path("m"), {}, None, "", {}, source.tensors, {}), layers, quantize=word)
    assert found.decisions[0].quantized


def test_a_scheme_that_no_load_makes_is_refused_by_the_plan(tmp_path):
    folder = make_model(tmp_path / "m")
    for scheme in ("Wccq2A16", "Wfp8Afp8_tensor_static"):
        with pytest.raises(PluginError, match="no installed quantizer"):
            explain_checkpoint(str(folder), None, 1, "bfloat16", scheme)


def test_a_cache_in_the_name_is_a_cache(tmp_path):
    engine = qplug_core.load(make_model(tmp_path / "m"), quantize="W8A8C8")
    assert {str(d.segments[0].scheme) for d in engine.plan.decisions if d.layer.op == "linear"} == {"W8A8"}
    assert engine.plan.caches[0].scheme.dtype == "int8"
    assert qplug_core.load(tmp_path / "m", quantize="W16A16C8").plan.caches
