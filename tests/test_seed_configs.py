"""Configurations as engines' documentation writes them, minimal as they are: each parses, and says what it took for granted."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import qplug_core
from qplug_core.engine.explain import explain_checkpoint
from qplug_core.layer import LayerSpec

sys.path.insert(0, str(Path(__file__).parent))
from conftest import DATA

LAYERS = [
    LayerSpec("model.layers.0.self_attn.q_proj", "linear", 256, 256),
    LayerSpec("model.layers.0.mlp.down_proj", "linear", 256, 512),
    LayerSpec("lm_head", "lm_head", 512, 256),
]
CONFIGS = [
    ({"bits": 4, "group_size": 128, "quant_method": "gptq"}, "W4A16_g128_asym"),
    ({"bits": 4, "group_size": 128, "quant_method": "awq"}, "W4A16_g128_asym"),
    ({"w_bit": 4, "q_group_size": 64, "quant_method": "awq", "zero_point": True}, "W4A16_g64_asym"),
    ({"bits": 8, "quant_method": "omni_quant"}, "W8A8"),
    (
        {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
        "Wfp8Afp8_b128x128",
    ),
    ({"quant_method": "FP8", "bits": 8}, "Wfp8Afp8_tensor"),
    ({"quant_method": "fp8", "activation_scheme": "static"}, "Wfp8Afp8_tensor_static"),
]


@pytest.mark.parametrize(("config", "scheme"), CONFIGS, ids=lambda value: json.dumps(value)[:60])
def test_a_minimal_config_is_understood(config, scheme):
    plan = qplug_core.plan(dict(config), LAYERS)
    found = {str(d.segments[0].scheme) for d in plan.decisions if d.layer.op == "linear"}
    assert found == {scheme}
    assert plan["lm_head"].segments[0].scheme is None


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"dynamic": {"-:.*down_proj": {}}}, {"q_proj": "W4A16_g128", "down_proj": "None", "lm_head": "None"}),
        (
            {"dynamic": {"+:.*down_proj": {"bits": 8}}},
            {"q_proj": "W4A16_g128", "down_proj": "W8A16_g128", "lm_head": "None"},
        ),
        ({"lm_head": True}, {"q_proj": "W4A16_g128", "down_proj": "W4A16_g128", "lm_head": "W4A16_g128"}),
        ({"modules_to_not_convert": ["down_proj"]}, {"q_proj": "W4A16_g128", "down_proj": "None", "lm_head": "None"}),
    ],
)
def test_vllm_keys_of_gptq(more, expected):
    config = {"bits": 4, "group_size": 128, "quant_method": "gptq", "sym": True, "desc_act": False, **more}
    plan = qplug_core.plan(config, LAYERS)
    assert {d.layer.name.rsplit(".", 1)[-1]: str(d.segments[0].scheme) for d in plan.decisions} == expected


def test_vllm_modules_to_not_convert_of_awq():
    config = {
        "bits": 4,
        "group_size": 128,
        "quant_method": "awq",
        "zero_point": True,
        "modules_to_not_convert": ["down_proj"],
    }
    plan = qplug_core.plan(config, LAYERS)
    assert plan["model.layers.0.mlp.down_proj"].segments[0].scheme is None
    assert plan["model.layers.0.self_attn.q_proj"].segments[0].scheme is not None


def without_config(folder: Path, out: Path) -> tuple[Path, dict]:
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    quant = config.pop("quantization_config")
    (out / "config.json").write_text(json.dumps(config))
    return out, quant


def distance(folder: Path) -> float:
    ref = load_file(folder / "ref.safetensors")
    logits = qplug_core.load(folder, dtype="float32", kernels="reference").logits(ref["input_ids"])
    return float((logits - ref["logits_dequant_fp32"]).norm() / ref["logits_dequant_fp32"].norm())


def test_quantize_config_json_alone(tmp_path):
    folder, quant = without_config(DATA / "gptqmodel-w4-g128-sym-descact", tmp_path / "m")
    (folder / "quantize_config.json").write_text(json.dumps({k: v for k, v in quant.items() if k != "quant_method"}))
    assert distance(folder) < 1e-6


def test_a_minimal_config_over_a_real_checkpoint_gives_its_logits_and_says_what_was_inferred(tmp_path):
    folder, _ = without_config(DATA / "gptqmodel-w4-g128-sym-descact", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"bits": 4, "group_size": 128, "quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    assert distance(folder) < 1e-6
    notes = " ".join(explain_checkpoint(str(folder), None, 1, "bfloat16", None).all_notes())
    assert "sym is not said" in notes
    assert "desc_act is not said" in notes
