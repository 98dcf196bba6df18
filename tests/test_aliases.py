"""Words of other engines for a quantization at load."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import qplug_core
from qplug_core.aliases import BY_OP, SCHEME_WORDS, online_schemes
from qplug_core.errors import SchemeError
from qplug_core.scheme import QuantScheme

sys.path.insert(0, str(Path(__file__).parent))
from conftest import make_model


@pytest.mark.parametrize("word", SCHEME_WORDS)
def test_a_word_is_a_scheme_and_says_which(word):
    schemes, meaning = online_schemes(word.upper())
    assert schemes["linear"] == schemes["experts"] == QuantScheme.parse(SCHEME_WORDS[word])
    assert str(schemes["linear"]) in meaning


def test_a_scheme_name_needs_no_explanation():
    assert online_schemes("W8A16")[1] == ""
    assert online_schemes("weight-only int4")[1] == "'weight-only int4' means W4A16_g128"
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


def test_a_cache_in_the_name_is_a_cache(tmp_path):
    engine = qplug_core.load(make_model(tmp_path / "m"), quantize="W8A8C8")
    assert {str(d.segments[0].scheme) for d in engine.plan.decisions if d.layer.op == "linear"} == {"W8A8"}
    assert engine.plan.caches[0].scheme.dtype == "int8"
    assert qplug_core.load(tmp_path / "m", quantize="W16A16C8").plan.caches
