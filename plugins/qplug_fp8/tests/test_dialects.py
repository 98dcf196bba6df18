"""Every dialect of FP8 on disk gives the logits of a plain float32 model with the weights that the file means."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import qplug_core
from qplug_core.errors import ConfigError, CoverError, DecodeError

sys.path.insert(0, str(Path(__file__).parent))
from fp8_models import IDS, SIZES, block_scales, by_block, by_channel, by_tensor, expand, logits, make, paddle, write

FP8 = {"quant_method": "fp8"}
BLOCK = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}

DIALECTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "vllm-dynamic": (by_tensor(), {**FP8, "activation_scheme": "dynamic"}, "Wfp8Afp8_tensor"),
    "vllm-static": (
        by_tensor(input_scale=0.02), {**FP8, "activation_scheme": "static", "ignored_layers": ["lm_head"]}, "Wfp8Afp8_tensor_static",
    ),
    "vllm-one-element": (by_tensor(shape=(1,), input_scale=0.02), {**FP8, "activation_scheme": "static"}, "Wfp8Afp8_tensor_static"),
    "e5m2": (by_tensor(dtype=torch.float8_e5m2), {**FP8, "fmt": "e5m2"}, "Wfp8e5m2Afp8_tensor"),
    "rtp-llm": (
        by_tensor("weights_scaling_factor", (1,), activation_scaling_factor=0.02), {"quant_method": "FP8", "bits": 8},
        "Wfp8Afp8_tensor_static",
    ),
    "mistral": (by_tensor("qscale_weight", qscale_act=0.02), FP8, "Wfp8Afp8_tensor_static"),
    "transformers-static": (
        by_tensor("weight_scale_inv", activation_scale=0.02),
        {**FP8, "activation_scheme": "static", "weight_block_size": None, "dequantize": False}, "Wfp8Afp8_tensor_static",
    ),
    "channel": (by_channel(), FP8, "Wfp8Afp8"),
    "channel-flat": (by_channel("weight_scale_inv", flat=True), FP8, "Wfp8Afp8"),
    "sglang-w8a8": (by_channel(), {"quant_method": "w8a8_fp8"}, "Wfp8Afp8"),
    "deepseek-v3": (by_block(128, 128), BLOCK, "Wfp8Afp8_b128x128"),
    "block-bf16-scales": (by_block(128, 128, dtype=torch.bfloat16), BLOCK, "Wfp8Afp8_b128x128"),
    "block-64x32": (by_block(64, 32), {**BLOCK, "weight_block_size": [64, 32]}, "Wfp8Afp8_b64x32"),
    "block-not-said": (by_block(64, 64, "weight_scale"), FP8, "Wfp8Afp8_b64x64"),
    "deepseek-v3.1": (by_block(128, 128), {**BLOCK, "scale_fmt": "ue8m0"}, "Wfp8Afp8_b128x128_a:se8m0.rule=ceil"),
    "deepseek-v4": (
        by_block(128, 128, "scale", torch.float8_e8m0fnu), {**BLOCK, "scale_fmt": "ue8m0"},
        "Wfp8Afp8_b128x128_se8m0_a:se8m0.rule=ceil",
    ),
    "e8m0-as-bytes": (by_block(128, 128, dtype=torch.uint8), BLOCK, "Wfp8Afp8_b128x128_se8m0"),
    "dequantize": (by_block(128, 128), {**BLOCK, "dequantize": True}, "Wfp8A16_b128x128"),
    "fbgemm": (by_channel(), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "Wfp8Afp8_a:rule=ub1200"),
    "fastdeploy": (paddle(128, 128), {"quantization": "block_wise_fp8", "is_quantized": True}, "Wfp8Afp8_b128x128"),
    "fastdeploy-64x32": (
        paddle(64, 32), {"quantization": "block_wise_fp8", "weight_block_size": [64, 32]}, "Wfp8Afp8_b64x32",
    ),
}  # fmt: skip


def error(folder: Path, expected: torch.Tensor) -> float:
    found = qplug_core.load(folder, dtype="float32", kernels="reference", activations="16bit").logits(IDS)
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", DIALECTS)
def test_logits_are_those_of_the_weights_that_the_file_means(name: str, tmp_path: Path) -> None:
    quantize, config, scheme = DIALECTS[name]
    expected = make(tmp_path / name, quantize, config)
    assert error(tmp_path / name, expected) < 1e-6
    layer = "model.layers.0.mlp.up_proj"
    found = qplug_core.load(tmp_path / name, dtype="float32", kernels="reference").plan
    decision = next(d for d in found.decisions if d.layer.name == layer)
    assert [str(segment.quant.scheme) for segment in decision.segments if segment.quant] == [scheme]


@pytest.mark.parametrize("name", ["deepseek-v3", "vllm-static", "rtp-llm"])
def test_scale_vs_inverse_scale_inv_is_a_multiplier(name: str, tmp_path: Path) -> None:
    """The trap of the name: dividing by ``weight_scale_inv``, or by a ``weights_scaling_factor``, is garbage."""
    quantize, config, _ = DIALECTS[name]
    expected = make(tmp_path / name, quantize, config)
    tensors = load_file(tmp_path / name / "model.safetensors")
    scale = ("weight_scale_inv", "weight_scale", "weights_scaling_factor")
    save_file({n: 1 / t if n.endswith(scale) else t for n, t in tensors.items()}, tmp_path / name / "model.safetensors")
    assert error(tmp_path / name, expected) > 0.05


def test_vllm_47445_a_layer_left_at_bf16_is_seen_by_its_dtype(tmp_path: Path) -> None:
    """Shapes match, so an engine that looks at shapes alone copies bf16 into FP8 parameters."""
    quantize, config, _ = DIALECTS["deepseek-v3"]
    make(tmp_path / "m", quantize, config)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    scale = tensors.pop(f"{name}.weight_scale_inv")
    tensors[f"{name}.weight"] = (tensors[f"{name}.weight"].float() * expand(scale, 128, 128, 160, 96)).bfloat16()
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    plan = qplug_core.load(tmp_path / "m", dtype="float32", kernels="reference").plan
    decision = next(d for d in plan.decisions if d.layer.name == name)
    assert not decision.quantized
    assert any("the file holds 16 bit" in note for note in decision.notes)


def test_vllm_47241_a_missing_scale_is_refused(tmp_path: Path) -> None:
    quantize, config, _ = DIALECTS["vllm-dynamic"]
    make(tmp_path / "m", quantize, config)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(CoverError, match=r"up_proj\.weight_scale"):
        qplug_core.load(tmp_path / "m", dtype="float32", kernels="reference")


def test_codes_in_a_layer_that_is_ignored_are_refused(tmp_path: Path) -> None:
    quantize, config, _ = DIALECTS["deepseek-v3"]
    make(tmp_path / "m", quantize, {**config, "modules_to_not_convert": ["down_proj"]})
    with pytest.raises(CoverError, match="F8_E4M3 where the config leaves the layer at 16 bit"):
        qplug_core.load(tmp_path / "m", dtype="float32", kernels="reference")


def test_transformers_ragged_shapes_left_at_bf16_with_random_scales_are_refused(tmp_path: Path) -> None:
    """transformers 5.23 on a width that is no multiple of the block: bf16 weights beside scales that were never set."""

    def gave_up(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return {"weight": weight.bfloat16(), "weight_scale_inv": block_scales(weight, 128, 128)}, weight

    make(tmp_path / "m", gave_up, BLOCK)
    with pytest.raises(ConfigError, match=r"\[160, 96\]|\[96, 160\]|multiple of the block"):
        qplug_core.load(tmp_path / "m", dtype="float32", kernels="reference")


def test_scale_that_was_never_filled_is_refused(tmp_path: Path) -> None:
    """vLLM marks a scale that is missing with the lowest float32; a file with it was saved before its scales were loaded."""
    quantize, config, _ = DIALECTS["vllm-dynamic"]
    make(tmp_path / "m", quantize, config)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.tensor(torch.finfo(torch.float32).min)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(DecodeError, match=r"-3\.40282e\+38"):
        qplug_core.load(tmp_path / "m", dtype="float32", kernels="reference")


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    """Models whose experts are one tensor on disk: codes ``[E, N, K]`` and scales ``[E, ceil(N/bn), ceil(K/bk)]``."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **sizes), dtype=torch.float32)
    tensors = {}
    for name, value in model.state_dict().items():
        if ".experts." not in name:
            tensors[name] = value
            continue
        quantized = [by_block(64, 32)(matrix * 3) for matrix in value]
        tensors[name] = torch.stack([stored["weight"].view(torch.uint8) for stored, _ in quantized]).view(
            torch.float8_e4m3fn
        )
        tensors[f"{name}_scale_inv"] = torch.stack([stored["weight_scale_inv"] for stored, _ in quantized])
        value.copy_(torch.stack([meant for _, meant in quantized]))
    config = {
        **BLOCK,
        "weight_block_size": [64, 32],
        "modules_to_not_convert": ["re:.*self_attn", "gate", "lm_head"],
    }
    write(tmp_path / "moe", model.config, tensors, config)
    assert error(tmp_path / "moe", logits(model)) < 1e-6


def fused_scales(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A mixtral with codes for each expert and the scales of all of them in one tensor, as transformers 5 saves it."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **{**SIZES, **sizes}), dtype=torch.float32)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if "self_attn" in name and value.ndim == 2:
            stored, meant = by_block(64, 32)(value * 3)
            tensors |= {f"{name.removesuffix('.weight')}.{key}": tensor for key, tensor in stored.items()}
            value.copy_(meant)
        elif ".experts." not in name:
            tensors[name] = value
        else:
            scales = []
            for e, matrix in enumerate(value):
                halves = matrix.chunk(2) if "gate_up" in name else (matrix,)
                for half, part in zip(
                    halves, ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",), strict=True
                ):
                    stored, meant = by_block(64, 32)(half * 3)
                    tensors[f"{name.rpartition('.')[0]}.{e}.{part}.weight"] = stored["weight"]
                    scales.append(stored["weight_scale_inv"])
                    half.copy_(meant)
            tensors[f"{name}_scale_inv"] = torch.cat(scales).view(len(value), -1, scales[0].shape[1])
    config = {**BLOCK, "weight_block_size": [64, 32], "modules_to_not_convert": ["gate", "lm_head"]}
    write(tmp_path / "moe", model.config, tensors, config)
    return tmp_path / "moe", logits(model)


def test_transformers_5_fused_scales_of_single_experts(tmp_path: Path) -> None:
    folder, expected = fused_scales(tmp_path)
    assert error(folder, expected) < 1e-6
    tensors = load_file(folder / "model.safetensors")
    swapped = {n: t.flip(0) if n.endswith("gate_up_proj_scale_inv") else t for n, t in tensors.items()}
    save_file({n: t.contiguous() for n, t in swapped.items()}, folder / "model.safetensors")
    assert error(folder, expected) > 1e-3


def test_transformers_5_fused_scales_of_fewer_experts_are_refused(tmp_path: Path) -> None:
    folder, _ = fused_scales(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    short = {n: t[:3].contiguous() if n.endswith("down_proj_scale_inv") else t for n, t in tensors.items()}
    save_file(short, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"experts\.3\.down_proj\.weight is stored"):
        qplug_core.load(folder, dtype="float32", kernels="reference")


@pytest.mark.parametrize(
    "names",
    [
        ("k_scale", "v_scale"),
        ("kv_scale",),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
    ],
)
def test_vllm_25047_kv_scales_are_claimed_under_every_name(names: tuple[str, ...], tmp_path: Path) -> None:
    """Names that are not known were dropped without a word, and the cache ran with scales of 1."""
    quantize, config, _ = DIALECTS["vllm-static"]
    make(tmp_path / "m", quantize, config)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    stored = {f"model.layers.0.self_attn.{name}": torch.tensor(0.03) for name in names}
    save_file({**tensors, **stored}, tmp_path / "m" / "model.safetensors")
    plan = qplug_core.load(tmp_path / "m", dtype="float32", kernels="reference").plan
    assert [set(cache.scales.values()) for cache in plan.caches] == [set(stored)]
    assert {"k_scale", "v_scale"} <= set(plan.caches[0].scales)


def test_kv_scale_of_an_unknown_name_is_refused(tmp_path: Path) -> None:
    quantize, config, _ = DIALECTS["vllm-static"]
    make(tmp_path / "m", quantize, config)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    save_file({**tensors, "model.layers.0.self_attn.key_scale": torch.tensor(0.03)}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(CoverError, match="key_scale"):
        qplug_core.load(tmp_path / "m", dtype="float32", kernels="reference")
