"""Who serves a checkpoint in vLLM. Needs no vLLM, but for the last tests."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path

import pytest

from qplug_core.bridges import vllm as bridge
from qplug_core.bridges.vllm import policy
from qplug_core.bridges.vllm.policy import SERVED, Claim, decide
from qplug_core.cover import Cover
from qplug_core.decl import SchemePattern
from qplug_core.device import Device, check_pattern
from qplug_core.errors import ConfigError, UsageError
from qplug_core.layer import LayerSpec
from qplug_core.planner import Planner
from qplug_core.registry import get_registry
from qplug_core.source import Source, TensorInfo

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


@pytest.mark.parametrize(
    ("config", "device", "qplug"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, "sm_100", False),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, "avx512_bf16", True),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "sm_80", False),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "sm_70", True),
        ({"quant_method": "fbgemm_fp8"}, "sm_90", False),
    ],
)
def test_what_vllm_serves_on_other_devices_stays_its_own(config, device, qplug):
    assert claim(config, device).qplug is qplug


def test_int8_of_llm_compressor_stays_vllms_own():
    """Its rule for activation scales is not the common one, which once made qplug take what vLLM serves."""
    args = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**args, "strategy": "channel", "dynamic": False},
        "input_activations": {**args, "strategy": "token", "dynamic": True},
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": [],
    }
    assert not claim(config, "avx512_bf16").qplug
    assert not claim(config, "sm_80").qplug


def test_a_method_that_needs_another_package_is_vllms_where_it_is_installed(monkeypatch):
    config = {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}},
    }
    monkeypatch.setattr(policy, "find_spec", lambda name: None)
    assert "serves torchao only with torchao, which is not installed" in claim(config).reason
    monkeypatch.setattr(policy, "find_spec", lambda name: name)
    assert not claim(config).qplug


def test_fastdeploy_is_named_by_its_own_key():
    assert "has no wint8" in claim({"quantization": "wint8", "is_quantized": True, "weight_layout": "sm80"}).reason


def test_planning_layer_by_layer_is_linear(monkeypatch):
    """vLLM asks for one layer after the other, and each question once walked over all tensors and all claims before it."""
    names = [f"model.layers.{i}.proj" for i in range(40)]
    tensors = {f"{n}.weight": TensorInfo(f"{n}.weight", "BF16", (32, 32), Path("x"), 0, 0) for n in names}
    planner = Planner(Source(Path("x"), {}, None, "", {}, tensors, {}), Device.cpu())
    checked = []
    monkeypatch.setattr(Cover, "_check_overlap", lambda self, name, claims: checked.append(name))
    for name in names:
        planner.plan([LayerSpec(name, "linear", 32, 32)], complete=False)
    assert checked == list(tensors)


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


CLAIMED = {**GPTQ, "bits": 3}
CHANGES = [
    ("vllm.model_executor.layers.fused_moe", "RoutedExperts", "cannot import name 'RoutedExperts'"),
    ("vllm.forward_context", "get_forward_context", "cannot import name 'get_forward_context'"),
    ("vllm.model_executor.layers.quantization.kv_cache", "BaseKVCacheMethod", "cannot import name 'BaseKVCacheMethod'"),
]


@pytest.mark.parametrize(("module", "name", "says"), CHANGES, ids=[name for _, name, _ in CHANGES])
def test_a_class_that_is_gone_is_one_sentence_before_anything_is_loaded(monkeypatch, module, name, says):
    config = real(monkeypatch)
    monkeypatch.delattr(f"{module}.{name}")
    with pytest.raises(ValueError, match="is not as qplug-core") as caught:
        config.QplugConfig.override_quantization_method(CLAIMED, None)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_attribute_that_is_gone_is_one_sentence_and_no_method(monkeypatch):
    """A layer without the sizes that the bridge reads: never vLLM's own 16-bit method in its place."""
    config = real(monkeypatch)
    from vllm.model_executor.layers.linear import LinearBase

    made = config.QplugConfig(CLAIMED)
    made.model = "no such folder"
    layer = object.__new__(type("Changed", (LinearBase,), {"__getattr__": lambda self, name: missing(name)}))
    with pytest.raises(ValueError, match=r"is not as qplug-core .* \(AttributeError: ") as caught:
        made.get_quant_method(layer, "model.layers.0.self_attn.o_proj")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["get_config", "get_all_weights", "register_quantization_config"])
def test_a_function_that_is_gone_leaves_vllm_as_it_was(monkeypatch, caplog, name):
    """Nothing is registered and nothing wrapped: a half of the bridge would claim checkpoints that the other half cannot load."""
    real(monkeypatch)
    import vllm.config.model as models
    import vllm.model_executor.layers.quantization as methods
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    holders = {"get_config": models, "get_all_weights": DefaultModelLoader, "register_quantization_config": methods}
    for key, owner in list(holders.items()):
        found = getattr(owner, key)
        monkeypatch.setattr(owner, key, getattr(found, "__wrapped__", found))
    monkeypatch.setattr(methods, "QUANTIZATION_METHODS", [n for n in methods.QUANTIZATION_METHODS if n != "qplug"])
    before = {key: getattr(owner, key) for key, owner in holders.items() if key != name}
    monkeypatch.delattr(holders.pop(name), name)
    caplog.set_level(logging.WARNING, "vllm.qplug")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    bridge.register()
    assert [f"no attribute '{name}'" in r.getMessage() for r in caplog.records] == [True]
    assert {key: getattr(owner, key) for key, owner in holders.items()} == before
    assert "qplug" not in methods.QUANTIZATION_METHODS


def test_cuda_graphs_of_experts_are_refused(monkeypatch):
    real(monkeypatch)
    from qplug_core.bridges.vllm.experts import check_graphs

    check_graphs("experts", "cpu", False)
    check_graphs("experts", "nvidia", True)
    with pytest.raises(UsageError, match="start vLLM with --enforce-eager"):
        check_graphs("experts", "nvidia", False)


def missing(name: str):
    raise AttributeError(f"the layer has no attribute {name!r}")


def real(monkeypatch):
    """The bridge into the installed vLLM, imported anew by what the test does."""
    pytest.importorskip("vllm", reason="tox run -e vllm")
    import qplug_core.bridges.vllm.config as config

    for name in ("experts", "kv_cache", "linear", "methods", "layers"):
        monkeypatch.delitem(sys.modules, f"qplug_core.bridges.vllm.{name}", raising=False)
        monkeypatch.delattr(bridge, name, raising=False)
    return config
