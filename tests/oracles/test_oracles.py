"""Checkpoints of real tools against the tools' own numbers: one row for each, nothing skipped.

weights   float32, activations and KV cache at 16 bit, against the logits of an independent unpacker's float32 model. A producer
          that dequantizes in 16 bit is compared after our weights are rounded once to that dtype.
layer     the worst distance of a layer's weight in what that one rounding changes: 0 where the producer does not round.
native    bfloat16, everything quantized, reference kernels, against the tool's own logits: bit-equal, or the cause is given.
contrast  what a wrong implementation shows: for weights the unquantized model, for native 16-bit activations and cache.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qplug_core
from qplug_core.errors import ConfigError, DecodeError
from qplug_core.weight import OpaqueWeight, QuantWeight

sys.path.insert(0, str(Path(__file__).parents[1]))
from bridges import proof
from conftest import DATA, oracles

SPOILED = {"qwen2-transformers-fp8block-ragged-garbage": "gave up on quantizing"}
"""Files that their producer spoiled, which have to be refused, and what the refusal says."""

ROUNDING = {
    "llmcompressor": torch.bfloat16, "bitsandbytes": torch.bfloat16, "torchao": torch.bfloat16, "autoawq": torch.float16,
}  # fmt: skip
"""Dtypes in which producers round a dequantized weight on the way to their reference; not all of their files were made so."""

CAUSES = {
    "gptqmodel": "its forward dequantizes in fp16",
    "autoawq": "its forward is fp16",
    "modelopt": "the exporter smooths and quantizes again, after the forward that gave these logits",
    "transformers": "its forward left activations at 16 bit",
    "gemma3-llmcompressor": "its forward left activations of ragged blocks at 16 bit",
    "gptoss": "its forward is float32",
    "bitsandbytes": "its CPU kernels order operations otherwise",
    "torchao": "its CPU kernels order operations otherwise",
    "gguf": "llama.cpp quantizes activations to Q8",
}
"""Producers whose own logits are not ours in bfloat16, and why."""

PER_EXPERT_SCALE = ("qwen3moe-llmcompressor-fp8-dynamic",)
"""compressed-tensors reduces the two-dimensional input of an expert over both of its axes, so its own forward has one scale for
all tokens of an expert where the scheme says one for each. With that, these are bit-equal."""


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def load(folder: Path, dtype: str, quantized: bool, kernels: str = "reference"):
    more = {} if quantized else {"activations": "16bit", "kv_cache": "16bit"}
    return qplug_core.load(folder, dtype=dtype, kernels=kernels, **more)


def output(engine, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        if engine.model.can_generate():
            return engine.logits(ids)
        return engine.forward(input_ids=ids).last_hidden_state.float()


def weights(engine) -> list[tuple[object, QuantWeight | OpaqueWeight]]:
    return [(m, p.meta["weight"]) for m in engine.methods.values() for p in m.packed if "weight" in p.meta]


def round_weights(engine, dtype: torch.dtype) -> float:
    """Replace every product by one with a weight that was rounded once to ``dtype``; the largest change of a weight."""
    worst = 0.0
    for method in engine.methods.values():
        exact = [p.meta["weight"].dequantize() if "weight" in p.meta else p.tensors["weight"] for p in method.packed]
        rounded = torch.cat([w.to(dtype).float() for w in exact])
        worst = max(worst, distance(rounded, torch.cat(exact)))
        if method.decision.layer.op == "embedding":
            method.apply = lambda ids, w=rounded: w[ids]
        else:
            method.apply = lambda x, bias=None, w=rounded: nn.functional.linear(x, w, bias)
    return worst


def one_scale_for_each_expert(engine) -> None:
    for method, weight in weights(engine):
        if method.decision.layer.op == "experts":
            weight.scheme = replace(weight.scheme, act=replace(weight.scheme.act, block=(0, 0)))


def reference(folder: Path) -> dict[str, Tensor]:
    stored = load_file(folder / "ref.safetensors")
    return {name.removeprefix("logits_").removeprefix("last_hidden_state_"): value for name, value in stored.items()}


def by_name(table: dict, name: str):
    return next((value for key, value in table.items() if key in name), None)


def weight_error(folder: Path, ref: dict[str, Tensor]) -> tuple[float, float]:
    """The error of the output, and the rounding of a weight that it took to get there."""
    engine = load(folder, "float32", quantized=False)
    exact = distance(output(engine, ref["input_ids"]), ref["dequant_fp32"])
    dtype = by_name(ROUNDING, folder.name)
    if exact < 1e-6 or dtype is None:
        return exact, 0.0
    rounding = round_weights(engine, dtype)
    return distance(output(engine, ref["input_ids"]), ref["dequant_fp32"]), rounding


def native_error(folder: Path, ref: dict[str, Tensor], quantized: bool) -> float:
    engine = load(folder, "bfloat16", quantized)
    if folder.name in PER_EXPERT_SCALE and quantized:
        one_scale_for_each_expert(engine)
    return distance(output(engine, ref["input_ids"]), ref["tool"])


@pytest.mark.parametrize("folder", oracles(), ids=lambda f: f.name)
def test_oracle(folder, capsys, request):
    if folder.name in SPOILED:
        with pytest.raises(ConfigError, match=SPOILED[folder.name]):
            qplug_core.load(folder)
        row(capsys, folder.name, "refused, as it has to be")
        return
    ref = reference(folder)
    error, rounding = weight_error(folder, ref)
    fast = distance(output(load(folder, "float32", False, "auto"), ref["input_ids"]), ref["dequant_fp32"])
    contrast = distance(ref["unquantized_fp32"], ref["dequant_fp32"])
    cells = [f"weights {error:.1e}", f"layer {rounding:.1e}", f"kernels {fast:.1e}", f"contrast {contrast:.1e}"]
    engine = load(folder, "float32", quantized=True)
    quantizes = any(w.scheme.act is not None for _, w in weights(engine)) or bool(engine.coders)
    cause = by_name(CAUSES, folder.name)
    if "tool" in ref:
        native = native_error(folder, ref, quantized=True)
        without = native_error(folder, ref, quantized=False)
        cells += [f"native {native:.1e}", f"without {without:.1e}", cause or ""]
        if cause is None:
            assert native == 0
            assert without > 1e-2 or not quantizes
    row(capsys, folder.name, "  ".join(cells))
    assert error < 1e-6
    assert rounding < 2.0**-8
    # Fast kernels do not round weights: they are as far from a producer that does as that rounding takes them.
    assert fast < (1e-5 if rounding == 0 else 1e-2)
    assert contrast > 1e-2 or not any(d.quantized for d in engine.plan.decisions)
    proof.record(
        "reference", version("qplug-core"), proof.method_of(folder), folder.name, request.node.nodeid, error, contrast
    )


def row(capsys, name: str, text: str) -> None:
    with capsys.disabled():
        print(f"\n{name:50} {text}", end="")


def spoilt(folder: Path, out: Path, suffixes: tuple[str, ...], change) -> Path:
    """A copy of a checkpoint with some tensors changed."""
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(folder, out)
    for file in out.glob("model*.safetensors"):
        changed = {n: change(t) if n.endswith(suffixes) else t for n, t in load_file(file).items()}
        save_file({n: t.contiguous() for n, t in changed.items()}, file, metadata={"format": "pt"})
    return out


SWAP = {
    "qweight": lambda t: ((t & 0x0F0F0F0F) << 4) | ((t >> 4) & 0x0F0F0F0F),
    "weight_packed": lambda t: (
        ((t & 15) << 4) | (t >> 4) if t.dtype == torch.uint8 else ((t & 0x0F0F0F0F) << 4) | ((t >> 4) & 0x0F0F0F0F)
    ),
    "_blocks": lambda t: ((t & 15) << 4) | (t >> 4),
}
"""The other nibble order, by the tensor that holds 4-bit codes."""


def four_bit() -> list:
    found = []
    for folder in oracles():
        text = json.dumps(json.loads((folder / "config.json").read_text()).get("quantization_config") or {})
        packed = next((name for name in SWAP if any(folder.name.startswith(p) for p in FOUR_BIT.get(name, ()))), None)
        if packed and text:
            found.append(pytest.param(folder, packed, id=folder.name))
    return found


FOUR_BIT = {
    "qweight": ("gptqmodel-w4", "autoawq", "autoround-w4-g128-sym-autogptq", "qwen2-gptqmodel", "mixtral-autoawq"),
    "weight_packed": ("llmcompressor-nvfp4", "llmcompressor-w4a16", "llmcompressor-mxfp4a16"),
    "_blocks": ("gptoss",),
}


@pytest.mark.parametrize(("folder", "packed"), four_bit())
def test_the_other_nibble_order_fails(folder, packed, tmp_path):
    ref = reference(folder)
    wrong = spoilt(folder, tmp_path / "wrong", (packed,), SWAP[packed])
    assert weight_error(wrong, ref)[0] > 0.05


@pytest.mark.parametrize("folder", [f for f in oracles() if "w8a8-int8-dyn" in f.name], ids=lambda f: f.name)
def test_another_divisor_fails(folder):
    """amax / 127 where compressed-tensors divides by 127.5: a tenth of the codes, and no plainly visible error."""
    ref = reference(folder)
    engine = load(folder, "bfloat16", quantized=True)
    for _, weight in weights(engine):
        weight.scheme = replace(weight.scheme, act=replace(weight.scheme.act, rule="127"))
    assert distance(output(engine, ref["input_ids"]), ref["tool"]) > 5e-3


@pytest.mark.parametrize("folder", [f for f in oracles() if f.name.startswith("llmcompressor-nvfp4")], ids=lambda f: f.name)
def test_multiplying_by_the_global_activation_scale_fails(folder):
    ref = reference(folder)
    engine = load(folder, "bfloat16", quantized=True)
    for _, weight in weights(engine):
        weight.act_scale, weight.act_div = weight.act_scale.reciprocal(), not weight.act_div
    assert distance(output(engine, ref["input_ids"]), ref["tool"]) > 5e-3


ACT_ORDER = DATA / "gptqmodel-w4-g128-sym-descact"


def test_an_ignored_act_order_fails(tmp_path):
    wrong = spoilt(ACT_ORDER, tmp_path / "wrong", (".g_idx",), lambda t: (torch.arange(len(t)) // 128).int())
    assert weight_error(wrong, reference(ACT_ORDER))[0] > 0.05


def test_vllm_26343_a_zero_point_off_by_one_is_refused(tmp_path):
    """Also vLLM 14126: v2 zero points that are called v1 gave "!!!!"."""
    wrong = spoilt(ACT_ORDER, tmp_path / "wrong", (".qzeros",), lambda t: t + 0x11111111)
    with pytest.raises(DecodeError, match="gptq_v2"):
        qplug_core.load(wrong, dtype="float32")


def test_one_scale_for_each_token_is_not_what_that_producer_ran():
    """The cause that PER_EXPERT_SCALE states is one: without it, those logits are not the tool's."""
    for folder in (f for f in oracles() if f.name in PER_EXPERT_SCALE):
        ref = reference(folder)
        assert distance(output(load(folder, "bfloat16", True), ref["input_ids"]), ref["tool"]) > 1e-2
