"""Reading a quantization config: what is refused, and in which words."""

from __future__ import annotations

import pytest

from qplug_core.errors import ConfigError
from qplug_core.keys import check_agreement, check_keys, check_values, list_of_names, resolve_aliases, take


def test_an_unknown_key_is_refused_unless_it_says_nothing():
    check_keys({"bits": 4, "rotation": None, "adapter": {}, "note": "", "lists": []}, ("bits",), "the X config", "qplug-x")
    with pytest.raises(ConfigError, match=r"^the X config has the key 'rotation' \('qr'\), .*newer qplug-x$"):
        check_keys({"bits": 4, "rotation": "qr"}, ("bits",), "the X config", "qplug-x")


def test_false_and_zero_say_something():
    for value in (False, 0):
        with pytest.raises(ConfigError, match="not known"):
            check_keys({"rotation": value}, (), "the X config", "qplug-x")


@pytest.mark.parametrize(("value", "allowed"), [(True, (1,)), (1, (True,)), ("int", ("fp",)), (8, ())])
def test_a_value_has_to_be_the_same_and_of_the_same_type(value, allowed):
    with pytest.raises(ConfigError, match="is understood"):
        check_values({"key": value}, {"key": allowed}, "the X config")


def test_take_fills_in_defaults():
    assert take({"bits": 8, "made_by": "me"}, {"bits": 4, "group": 128}, ("made_by",), "the X config", "qplug-x") == {
        "bits": 8,
        "group": 128,
    }


def test_names_of_one_key_must_agree():
    aliases = {"bits": ("w_bit",), "version": ("format",)}
    said = {"bits": None, "w_bit": 4, "version": "GEMM", "format": "gemm"}
    assert resolve_aliases(said, aliases, "the X config", lambda key, value: str(value).lower())["version"] == "gemm"
    assert resolve_aliases({"w_bit": 4}, aliases, "the X config") == {"bits": 4}
    with pytest.raises(ConfigError, match="version: 'GEMM' and format: 'gemm', which contradict"):
        resolve_aliases(said, aliases, "the X config")


def test_two_files_must_agree():
    check_agreement({"bits": 4, "sym": True}, {"bits": 4}, "quantize_config.json")
    with pytest.raises(ConfigError, match=r"config.json says bits: 4 and quantize_config.json says 8"):
        check_agreement({"bits": 4}, {"bits": 8}, "quantize_config.json")


def test_a_list_of_names():
    assert list_of_names(None, "the X config says ignore") == []
    assert list_of_names(["a", "b", "a"], "the X config says ignore") == ["a", "b"]
    for value in ("lm_head", ["a", 1], ["a", ""], {"a": 1}):
        with pytest.raises(ConfigError, match=r"the X config says ignore: .*a list of names was needed"):
            list_of_names(value, "the X config says ignore")
