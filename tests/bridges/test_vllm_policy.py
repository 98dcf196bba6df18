"""Who serves a checkpoint in vLLM. Needs no vLLM, but for the last tests."""

from __future__ import annotations

import logging
import sys
import types

import pytest

from qplug_core.bridges import vllm as bridge
from qplug_core.bridges.vllm.policy import SERVED, Claim, decide
from qplug_core.decl import SchemePattern
from qplug_core.device import Device, check_pattern
from qplug_core.errors import ConfigError, UsageError
from qplug_core.registry import get_registry

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def claim(config, device="sm_90", asked=None, moe=False, **environ) -> Claim:
    found = decide(config, asked, Device.from_name(device), get_registry(), environ, moe)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"desc_act": True}, "W4A16_g128_actorder stored as gptq"),
        ({"bits": 3}, "W3A16_g128 stored as gptq"),
        ({"bits": 2}, "W2A16_g128 stored as gptq"),
        ({"sym": False}, "W4A16_g128_asym stored as gptq"),
        ({"checkpoint_format": "gptq_v2"}, "stored as gptq_v2"),
        ({"group_size": 256}, "W4A16_g256 stored as gptq"),
    ],
)
def test_vllm_45051_gptq_that_vllm_dropped_is_claimed(changes, says):
    found = claim({**GPTQ, **changes})
    assert found.qplug
    assert says in found.reason


def test_awq_gemv_is_claimed_and_gemm_is_not():
    assert claim({**AWQ, "version": "gemv"}).qplug
    assert not claim(AWQ).qplug


@pytest.mark.parametrize("method", ["int8", "ptpc_fp8", "awq", "gptq"])
def test_what_vllm_has_not_on_this_device_is_claimed(method):
    config = {"int8": {"quant_method": "int8", "scheme": "W8A16"}, "gptq": GPTQ, "awq": AWQ}.get(
        method, {"quant_method": method}
    )
    assert claim(config, "sm_70").qplug


def test_policy_of_the_user():
    assert not claim(GPTQ).qplug
    assert "QPLUG_VLLM=all" in claim(GPTQ).reason
    assert claim(GPTQ, QPLUG_VLLM="all").qplug
    assert claim(GPTQ, QPLUG_VLLM="gptq,awq").qplug
    assert not claim(GPTQ, QPLUG_VLLM="awq").qplug
    assert claim({**GPTQ, "bits": 3}, QPLUG_VLLM="awq").qplug
    with pytest.raises(UsageError, match="QPLUG_VLLM names 'gptk'"):
        claim(GPTQ, QPLUG_VLLM="gptk")


def test_the_flag_decides():
    assert claim(GPTQ, asked="qplug").qplug
    assert not claim({**GPTQ, "bits": 3}, asked="gptq").qplug


def test_nobody_elses_checkpoints():
    assert decide({"quant_method": "nobody"}, None, Device.cpu(), get_registry(), {}) is None


def test_a_config_that_only_qplug_could_read_is_an_error():
    with pytest.raises(ConfigError):
        claim({"quant_method": "int8", "no_such_key": 1})


def test_the_table_is_well_formed():
    for entry in SERVED:
        for text in entry.schemes:
            SchemePattern(text).parts()
        for device in entry.devices:
            check_pattern(device)


def test_experts_on_a_cpu_are_claimed():
    config = {**GPTQ, "group_size": 32}
    assert claim(config, "avx512_bf16", moe=True).qplug
    assert not claim(config, "sm_90", moe=True).qplug


@pytest.fixture
def other_vllm(monkeypatch, caplog):
    """A module in the place of vLLM, of another version or with another inside."""

    def install(version: str) -> None:
        fake = types.ModuleType("vllm")
        fake.__version__ = version
        for name in [n for n in sys.modules if n == "vllm" or n.startswith("vllm.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delitem(sys.modules, "qplug_core.bridges.vllm.config", raising=False)
        monkeypatch.setitem(sys.modules, "vllm", fake)

    caplog.set_level(logging.WARNING, "vllm.qplug")
    monkeypatch.setattr(logging.getLogger("vllm.qplug"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return install


def test_another_version_gets_one_sentence_and_nothing_is_registered(other_vllm, caplog):
    other_vllm("0.33.1")
    bridge.register()
    assert [r.getMessage() for r in caplog.records] == [
        f"qplug stays out of this vLLM: it is version 0.33.1 and qplug-core {bridge.installed('qplug-core')} is tested with >=0.32,<0.33; "
        "install one of those"
    ]


def test_an_engine_that_changed_gets_one_sentence(other_vllm, caplog):
    other_vllm("0.32.9")
    bridge.register()
    (record,) = caplog.records
    assert "vLLM 0.32.9 is not as qplug-core" in record.getMessage()
    assert record.exc_info is None
