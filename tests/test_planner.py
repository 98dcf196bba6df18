"""Plans: tensor-parallel cuts, fusing, splitting, notes, and the digest."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from qplug_core import LayerSpec, Policy, StoredPart
from qplug_core.config import QuantizationConfig
from qplug_core.decl import FormatDecl
from qplug_core.device import Device
from qplug_core.engine.explain import explain_checkpoint
from qplug_core.errors import ConfigError, CoverError, DecodeError, NoKernel
from qplug_core.method import HubMethod
from qplug_core.planner import Planner, plan, read_config
from qplug_core.registry import Entry, PluginRow, Registry
from qplug_core.source import MemorySource, Source

sys.path.insert(0, str(Path(__file__).parent))
from conftest import DATA

ACT_ORDER = DATA / "qwen2-gptqmodel-w4-g32-sym-descact"
W3 = DATA / "gptqmodel-w3-g128-sym"


def planner(folder, kernels="reference"):
    return Planner(Source.open(folder), Device.cpu(), "float32", Policy(kernels))


def product(folder, layer, x, kernels="reference"):
    made = planner(folder, kernels)
    method = HubMethod(made.plan([layer], complete=False).decisions[0], made.resolver, made.layout, torch.float32)
    method.load(made.source)
    return method.apply(x), method


def spec(folder, name):
    source = Source.open(folder)
    k = source.tensors[f"{name}.g_idx"].shape[0]
    return LayerSpec(name, "linear", source.tensors[f"{name}.scales"].shape[1], k)


@pytest.mark.parametrize("folder", [ACT_ORDER, W3], ids=lambda f: f.name)
@pytest.mark.parametrize("leaf", ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_tensor_parallel_parts_make_the_whole(folder, leaf, world, kernels):
    layer = spec(folder, f"model.layers.0.{leaf}")
    x = torch.randn(5, layer.k, generator=torch.Generator().manual_seed(0))
    whole, _ = product(folder, layer, x)
    rows = [product(folder, layer.sharded("N", r, world), x, kernels)[0] for r in range(world)]
    torch.testing.assert_close(torch.cat(rows, -1), whole, rtol=1e-5, atol=1e-5)
    total = torch.zeros_like(whole)
    for r in range(world):
        part = layer.sharded("K", r, world)
        total += product(folder, part, x[:, slice(*part.columns)], kernels)[0]
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=2e-5)


def fused(folder, parts, block="self_attn"):
    specs = [spec(folder, f"model.layers.0.{block}.{p}") for p in parts]
    stored = (tuple(StoredPart(s.name, s.n) for s in specs),)
    return LayerSpec(f"model.layers.0.{block}.fused", "linear", sum(s.n for s in specs), specs[0].k, stored), specs


def test_parts_of_one_scheme_become_one_weight():
    layer, specs = fused(W3, ["q_proj", "k_proj", "v_proj"])
    x = torch.randn(3, layer.k, generator=torch.Generator().manual_seed(1))
    y, method = product(W3, layer, x)
    assert len(method.kernels) == 1
    torch.testing.assert_close(y, torch.cat([product(W3, s, x)[0] for s in specs], -1), rtol=1e-6, atol=1e-6)


def test_parts_with_their_own_act_order_run_apart():
    layer, specs = fused(ACT_ORDER, ["gate_proj", "up_proj"], "mlp")
    x = torch.randn(3, layer.k, generator=torch.Generator().manual_seed(1))
    source = Source.open(ACT_ORDER)
    same = torch.equal(source.read(f"{specs[0].name}.g_idx"), source.read(f"{specs[1].name}.g_idx"))
    y, method = product(ACT_ORDER, layer, x)
    assert len(method.kernels) == (1 if same else 2)
    torch.testing.assert_close(y, torch.cat([product(ACT_ORDER, s, x)[0] for s in specs], -1), rtol=1e-6, atol=1e-6)


def test_a_config_alone_is_believed():
    config = json.loads((W3 / "config.json").read_text())["quantization_config"]
    layers = [LayerSpec("model.layers.0.mlp.up_proj", "linear", 512, 256), LayerSpec("lm_head", "lm_head", 512, 256)]
    made = plan(config, layers, device="cpu")
    assert str(made["model.layers.0.mlp.up_proj"].segments[0].scheme).startswith("W3A16_g128")
    assert not made["lm_head"].quantized


def test_ranks_agree_and_policies_do_not():
    layer = spec(W3, "model.layers.0.mlp.up_proj")
    digests = {plan(W3, [layer], device="cpu", tp=(r, 2), parallel={"*up_proj": "N"}).digest for r in (0, 1)}
    assert len(digests) == 1
    assert plan(W3, [layer], device="cpu", policy=Policy("reference")).digest not in digests


def test_every_kernel_that_was_not_taken_says_why():
    """On sm_70, which no Triton kernel is for, so that the choice does not depend on whether Triton is installed."""
    decision = plan(W3, [spec(W3, "model.layers.0.mlp.up_proj")], device="sm_70").decisions[0]
    choice = decision.segments[0].choice
    assert choice.kernel == "core.reference_linear"
    assert any(r.code == "device" for t in choice.tried for r in t.refusals if t.kernel == "gptq.cpu_wna16")
    assert any(r.code == "device" for t in choice.tried for r in t.refusals if t.kernel == "gptq.triton_wna16")
    int8 = next(t for t in choice.tried if t.kernel == "int8.cpu_w8a16")
    assert {r.code for r in int8.refusals} == {"device", "scheme"}


def test_a_pin_decides_and_a_pin_that_cannot_run_is_an_error():
    layer = spec(W3, "model.layers.0.mlp.up_proj")
    pinned = plan(W3, [layer], device="cpu", policy=Policy(pin={"*up_proj": "core.reference_linear"}))
    assert pinned.decisions[0].segments[0].choice.kernel == "core.reference_linear"
    with pytest.raises(NoKernel, match=r"int8\.cpu_w8a16"):
        plan(W3, [layer], device="cpu", policy=Policy(pin={"*": "int8.cpu_w8a16"}))


def test_a_stale_rule_is_reported(tmp_path):
    shutil.copytree(W3, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {"-:.*nowhere.*": {}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    made = plan(tmp_path / "m", [spec(W3, "model.layers.0.mlp.up_proj")], device="cpu")
    assert any("nowhere" in note for note in made.notes)


def test_a_tensor_nobody_claims_is_an_error():
    with pytest.raises(CoverError, match="not claimed"):
        plan(W3, [spec(W3, "model.layers.0.mlp.up_proj")], device="cpu", complete=True)


def test_a_wrong_shape_is_an_error():
    layer = replace(spec(W3, "model.layers.0.mlp.up_proj"), n=500)
    with pytest.raises(CoverError, match=r"up_proj\.qweight"):
        plan(W3, [layer], device="cpu")


def test_a_config_of_quantized_layers_over_a_16_bit_checkpoint_is_an_error(tmp_path):
    """A config that was left behind: with one quantized layer the file would be right, with none it is the wrong file."""
    shutil.copytree(files("qplug_core.demo") / "bf16", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="stored at 16 bit"):
        explain_checkpoint(str(tmp_path / "m"), Device.cpu(), 1, "bfloat16", None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_refused(value):
    """They gave NaN logits from a model that loaded without a word."""
    name = "model.layers.0.mlp.up_proj"
    source = Source.open(W3)
    tensors = {n: source.read(n).clone() for n in source.tensors if n.startswith(name)}
    tensors[f"{name}.scales"][1, 2] = value
    held = MemorySource(tensors)
    made = planner(W3)
    method = HubMethod(made.plan([spec(W3, name)], complete=False).decisions[0], made.resolver, made.layout, torch.float32)
    with pytest.raises(DecodeError, match=r"^1 of \d+ scales of model\.layers\.0\.mlp\.up_proj are NaN or infinite; finite"):
        method.load(held)


def test_names_of_tensors_claim_a_checkpoint_without_a_config():
    """HQQ's own files say nothing but what their tensors are called; a config that is there comes first."""

    class Format:
        def parse(self, source):
            return QuantizationConfig("odd", [])

    row = PluginRow("odd", "dist-odd", "1.0", "1.0", "ready")
    decls = [
        FormatDecl(name, impl="odd.code:Format", detects=(name,), suffixes=ends)
        for name, ends in {"odd": (".W_q",), "even": ()}.items()
    ]
    registry = Registry([row], formats=[Entry(decl, row) for decl in decls])
    registry._loaded = {(FormatDecl, decl.name, decl.impl): Format() for decl in decls}

    def method(name, config=None):
        infos = MemorySource({name: torch.zeros(1)}).tensors
        return read_config(Source(Path("memory"), {}, config, "config.json", {}, infos, {}), registry)[0].method

    assert method("model.up_proj.W_q") == "odd"
    assert method("model.up_proj.weight") == ""
    with pytest.raises(ConfigError, match="no quant_method"):
        method("model.up_proj.W_q", {"bits": 4})
