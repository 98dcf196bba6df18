"""SmoothQuant: every style of tensors, against a producer of its own in float64, and what must be refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_int8.smoothquant import STYLES, SmoothQuantFormat
from safetensors.torch import load_file, save_file
from torch import Tensor

import qplug_core
from qplug_core.config import LayerQuant, ModuleName
from qplug_core.errors import CannotEncode, CheckpointError, ConfigError, CoverError, DecodeError
from qplug_core.layer import LayerSpec, PlainSlot, StoredPart
from qplug_core.method import decode_part
from qplug_core.planner import Planner, plan
from qplug_core.reference.linear import ReferenceLinear
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source
from qplug_core.testing import random_weight
from qplug_core.weight import QuantWeight

FORMAT = SmoothQuantFormat()
W8A8 = QuantScheme.parse("W8A8")
N, K = 48, 40
IDS = torch.arange(40).view(2, 20)
QUANTIZATION = 0.02
"""Relative error of a right W8A8 layer with these inputs; each of the wrong ones below is more than ten times as far off."""


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def inputs(seed: int = 0, k: int = K) -> Tensor:
    """Activations ``[32, K]`` float64 in which every eighth channel is an outlier."""
    x = torch.randn(32, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, ::8] *= 40
    return x


def linear(seed: int = 1, n: int = N, k: int = K) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.05


def smoother_of(x: Tensor, weight: Tensor, alpha: float = 0.5) -> Tensor:
    """arXiv:2211.10438, equation 4, as float32."""
    return (x.abs().amax(0) ** alpha / weight.abs().amax(0) ** (1 - alpha)).clamp(min=1e-5).float()


def by_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[N, K]`` in [-127, 127] and float32 scales ``[N]``."""
    scales = (weight.abs().amax(1) / 127).float()
    return torch.round(weight / scales.double()[:, None]).clamp(-127, 127).to(torch.int8), scales


def by_tensor(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = (weight.abs().max() / 127).float()
    return torch.round(weight / scale.double()).clamp(-127, 127).to(torch.int8), scale


def layer(style: str, weight: Tensor, smoother: Tensor | None) -> dict[str, Tensor]:
    """What the exporter of ``style`` writes for a layer, whose weight is smoothed here."""
    smoothed = weight if smoother is None else weight * smoother.double()
    codes, scales = by_channel(smoothed)
    whole, scale = by_tensor(smoothed)
    other = {"scale_x_orig_quant": torch.tensor(12.7), "scale_y_quant_orig": torch.tensor(0.03)}
    match style:
        case "smooth_quant":
            tensors = {"qweight": codes.t(), "scales": scales}
        case "smooth_quant_col":
            tensors = {"weight.int8.col": codes.t(), "scale_w_quant_orig.col": scales, "scale_w_quant_orig": scale, **other}
        case "smooth_quant_int8":
            tensors = {"weight.int8": whole.t(), "scale_w_quant_orig": scale, **other}
        case "smooth_quant_trt":
            tensors = {"weight": codes, "per_channel_scale": scales[None]}
        case _:
            tensors = {"weight": codes, "scale": scales[:, None]}
    if smoother is not None:
        tensors["smoother"] = smoother if style != "smooth_quant_trt" else smoother[None]
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def named(tensors: dict[str, Tensor], module: str = "layer") -> dict[str, Tensor]:
    return {f"{module}.{name}": tensor for name, tensor in tensors.items()}


def memory(tensors: dict[str, Tensor], config: dict[str, Any] | None = None, **more: Any) -> Source:
    infos = MemorySource(tensors).tensors
    files = {"smoothquant.ini": {}, **more.pop("files", {})}
    return Source(Path("memory"), more.pop("config_json", {}), config, "config.json", files, infos, {})


def read(tensors: dict[str, Tensor], module: str = "layer", n: int = N, k: int = K) -> QuantWeight:
    """Through the format: parse of the headers, then decode."""
    quant = FORMAT.parse(memory(tensors)).quant_for(ModuleName((module,)))
    assert quant is not None
    weight = decode_part(MemorySource(tensors), FORMAT, quant, LayerSpec(module, "linear", n, k), StoredPart(module, n))
    assert isinstance(weight, QuantWeight)
    return weight


def run(weight: QuantWeight, x: Tensor) -> Tensor:
    kernel = ReferenceLinear()
    return kernel.apply(x, kernel.pack(weight))


def engine(x: Tensor, codes: Tensor, scales: Tensor, smoother: Tensor | None) -> Tensor:
    """The engines' formula in float64: x / smoother, codes by token, integer product, two scales."""
    if smoother is not None:
        x = x / smoother.double()
    step = x.abs().amax(1, keepdim=True) / 127
    return (torch.round(x / step) @ codes.double().t()) * step * scales.double().reshape(1, -1)


STYLED = ["smooth_quant", "smooth_quant_col", "smooth_quant_int8", "smooth_quant_trt"]


@pytest.mark.parametrize("style", STYLED)
def test_layer_is_the_engine_formula(style: str) -> None:
    x, weight = inputs(), linear()
    smoother = smoother_of(x, weight)
    smoothed = weight * smoother.double()
    codes, scales = by_tensor(smoothed) if style == "smooth_quant_int8" else by_channel(smoothed)
    expected = engine(x, codes, scales, smoother)
    assert relative(run(read(named(layer(style, weight, smoother))), x), expected) < 1e-6
    assert relative(expected, x @ weight.t()) < QUANTIZATION * (2 if style == "smooth_quant_int8" else 1)


@pytest.mark.parametrize("style", list(STYLES))
def test_layer_without_smoother(style: str) -> None:
    x, weight = inputs(), linear()
    smoother = smoother_of(x, weight)
    tensors = named(layer(style, weight * smoother.double(), None))
    # The fold is in the norm before the layer, so the layer sees x / smoother.
    bound = QUANTIZATION * (2 if style == "smooth_quant_int8" else 1)
    assert relative(run(read(tensors), x / smoother.double()), x @ weight.t()) < bound


WRONG = {
    "scale ignored": lambda w: replace(w, scales=torch.ones_like(w.scales)),
    "scales in the order of another layer": lambda w: replace(w, scales=w.scales.flip(0)),
    "smoother ignored": lambda w: replace(w, pre_scale=None),
    "smoother inverted": lambda w: replace(w, pre_scale=w.pre_scale.reciprocal()),
    "weight not transposed": lambda w: replace(w, codes=w.codes.reshape(w.k, w.n).t()),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_reading_is_seen(name: str) -> None:
    x, weight = inputs(), linear()
    weight[::3] *= 4
    right = read(named(layer("smooth_quant", weight, smoother_of(x, weight))))
    exact = x @ weight.t()
    assert relative(run(right, x), exact) < QUANTIZATION
    assert relative(run(WRONG[name](right), x), exact) > 10 * QUANTIZATION


def test_smoothing_is_what_makes_the_layer_accurate() -> None:
    """Outliers set the step of a whole token, so without smoothing what the other channels say is lost."""
    x, weight = inputs(), linear()
    outliers = x[:, ::8] @ weight[:, ::8].t()
    others = x @ weight.t() - outliers
    plain, smoothed = (
        relative(run(read(named(layer("smooth_quant", weight, s))), x) - outliers, others)
        for s in (None, smoother_of(x, weight))
    )
    assert smoothed < plain / 2


@pytest.mark.parametrize("shape", ["[3, N/3]", "[3, 1]", "[N]"])
def test_fused_qkv_keeps_its_axis_in_the_file(shape: str) -> None:
    x, weight = inputs(), linear(n=N)
    codes, scales = by_channel(weight)
    match shape:
        case "[3, N/3]":
            stored = scales.reshape(3, N // 3)
        case "[3, 1]":
            parts = (weight.reshape(3, -1).abs().amax(1) / 127).float()
            scales, stored = parts.repeat_interleave(N // 3), parts[:, None]
            codes = torch.round(weight / scales.double()[:, None]).to(torch.int8)
        case _:
            stored = scales
    layout = {"weight.int8.col": codes.t().reshape(K, 3, N // 3), "scale_w_quant_orig.col": stored}
    tensors = named({name: t.contiguous() for name, t in layout.items()})
    whole = read(tensors)
    assert torch.equal(whole.codes, codes)
    assert relative(run(whole, x), engine(x, codes, scales, None)) < 1e-6
    quant = FORMAT.parse(memory(tensors)).quant_for(ModuleName(("layer",)))
    assert quant is not None
    written = FORMAT.encode(whole, quant)
    assert torch.equal(written["weight.int8.col"], tensors["layer.weight.int8.col"])
    assert FORMAT.decode(written, quant, N, K).equal(whole)
    key = StoredPart("layer", 10, rows=(20, 30), stored_n=N)
    cut = decode_part(MemorySource(tensors), FORMAT, quant, LayerSpec("k", "linear", 10, K, columns=(3, 17)), key)
    assert torch.equal(cut.dequantize(), whole.dequantize()[20:30, 3:17])


@pytest.mark.parametrize("style", STYLED)
def test_file_comes_back(style: str) -> None:
    x, weight = inputs(), linear()
    decoded = read(named(layer(style, weight, smoother_of(x, weight))))
    quant = LayerQuant(decoded.scheme, style)
    again = FORMAT.decode(FORMAT.encode(decoded, quant), quant, N, K)
    assert again.equal(decoded)


def test_pre_scale_that_no_smoother_gives_is_refused() -> None:
    weight = replace(random_weight(W8A8, 8, 4096), pre_scale=torch.linspace(1.5, 1.99, 4096))
    with pytest.raises(CannotEncode, match=r"column \d+ has pre_scale 1\.\d+"):
        FORMAT.encode(weight, LayerQuant(W8A8, "smooth_quant"))
    with pytest.raises(CannotEncode, match=r"pre_scale is torch\.bfloat16"):
        FORMAT.encode(replace(weight, pre_scale=weight.pre_scale.bfloat16()), LayerQuant(W8A8, "smooth_quant"))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_smoother_that_nobody_divides_by_is_refused(bad: float) -> None:
    tensors = layer("smooth_quant", linear(), torch.ones(K))
    tensors["smoother"][3] = bad
    with pytest.raises(DecodeError, match="smoother holds"):
        read(named(tensors))


def test_scale_that_is_not_finite_is_refused() -> None:
    tensors = layer("smooth_quant", linear(), None)
    tensors["scales"][0] = float("nan")
    with pytest.raises(DecodeError, match="scales holds nan"):
        read(named(tensors))


def test_sglang_28806_unquantized_checkpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match="none of its 1 tensors is an int8 weight"):
        FORMAT.parse(memory({"layer.weight": torch.zeros(4, 4)}))


def test_gptq_8_bit_qweight_is_not_taken_for_smooth_quant() -> None:
    with pytest.raises(ConfigError, match="none of its 2 tensors"):
        FORMAT.parse(memory({"l.qweight": torch.zeros(4, 4, dtype=torch.int32), "l.scales": torch.ones(1, 4)}))


def test_fastertransformer_files_of_ranks_are_refused() -> None:
    tensors = {"l.weight.int8.col.0": torch.zeros(4, 4, dtype=torch.int8), "l.scale_w_quant_orig.col.0": torch.ones(4)}
    with pytest.raises(ConfigError, match=r"part of one rank.*tensor parallelism 1"):
        FORMAT.parse(memory(tensors))


def test_bin_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "smoothquant.ini").write_text("[llama]\n")
    (tmp_path / "model.layers.0.attention.dense.weight.int8.col.0.bin").write_bytes(b"\0" * 16)
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        Source.open(tmp_path)


def test_rank_files_of_tensorrt_llm_are_refused(tmp_path: Path) -> None:
    for rank in range(2):
        save_file({"l.weight": torch.zeros(4, 4, dtype=torch.int8)}, tmp_path / f"rank{rank}.safetensors")
    with pytest.raises(CheckpointError, match=r"rank0\.safetensors and rank1\.safetensors"):
        Source.open(tmp_path)


def test_tensorrt_llm_845_static_scales_belong_to_an_int8_output() -> None:
    """per_channel_scale of a static engine is scale_y_accum_quant: read as a step of the weight it is off by amax_y / 127."""
    tensors = named(layer("smooth_quant_trt", linear(), None))
    with pytest.raises(ConfigError, match=r"act_scale.*--per_token"):
        FORMAT.parse(memory({**tensors, "layer.act_scale": torch.ones(1, 1)}))
    static = {"quantization": {"quant_algo": "W8A8_SQ_PER_CHANNEL_PLUGIN"}}
    with pytest.raises(ConfigError, match="W8A8_SQ_PER_CHANNEL_PLUGIN"):
        FORMAT.parse(memory(tensors, config_json=static))
    dynamic = {"quantization": {"quant_algo": "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"}}
    assert FORMAT.parse(memory(tensors, config_json=dynamic)).ignorable.keys() == {"scale_to_int"}


def test_tensorrt_llm_per_tensor_weights() -> None:
    x, weight = inputs(), linear()
    codes, scale = by_tensor(weight)
    found = read(named({"weight": codes, "per_channel_scale": scale.reshape(1, 1)}))
    assert str(found.scheme) == "W8A8_tensor"
    assert relative(run(found, x), engine(x, codes, scale, None)) < 1e-6


def test_two_flags_are_refused() -> None:
    with pytest.raises(ConfigError, match="two formats"):
        FORMAT.parse(memory(named(layer("smooth_quant", linear(), None)), files={"pertensorquant.ini": {}}))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_dtype": "float8_e4m3fn"}, "quant_dtype: 'float8_e4m3fn'; 'int8'"),
        ({"bits": 4}, "bits: 4; 8"),
        ({"bits": True}, "bits: True"),
        ({"group_size": 128}, "group_size: 128"),
        ({"no_such_numerics": 3}, "no_such_numerics"),
        ({"ignore": "lm_head"}, "ignore: 'lm_head'"),
    ],
)
def test_config_that_is_not_understood_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FORMAT.parse(memory({}, {"quant_method": "smooth_quant", **config}))


def test_config_without_headers_is_by_channel() -> None:
    config = FORMAT.parse(memory({}, {"quant_method": "smooth_quant", "quant_dtype": "int8", "ignore": ["b", "re:c.*"]}))
    found = {name: config.quant_for(ModuleName((name,))) for name in ("a", "b", "c.d", "lm_head")}
    assert found == {"a": LayerQuant(W8A8, "smooth_quant"), "b": None, "c.d": None, "lm_head": None}
    assert config.inferred


@pytest.mark.parametrize("name", ["W8A16", "W8A8_static", "W8A8_asym", "W8A8_g32", "W4A16_g32", "W8A8_a:rule=127.5"])
def test_foreign_weight_is_refused(name: str) -> None:
    weight = random_weight(QuantScheme.parse(name), 32, 64)
    with pytest.raises(CannotEncode, match="choose another format"):
        FORMAT.quant_for_scheme(weight)


HIDDEN, INNER = 32, 64


def rtp_llama() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One layer as RTP-LLM's converter for Llama writes it, and its weights by the names of the model (smoothed, dequantized)."""
    shapes = {
        "q": (32, 32),
        "k": (16, 32),
        "v": (16, 32),
        "o_proj": (32, 32),
        "gate": (64, 32),
        "up": (64, 32),
        "down": (32, 64),
    }
    weights = {name: linear(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    qkv = torch.cat([weights.pop(name) for name in "qkv"])
    at = "model.layers.0"
    stored = {
        **named(layer("smooth_quant_col", qkv, None), f"{at}.attention.query_key_value"),
        **named(layer("smooth_quant_col", weights["o_proj"], torch.linspace(0.5, 2, 32)), f"{at}.attention.dense"),
        **named(layer("smooth_quant_col", weights["gate"], None), f"{at}.mlp.fc"),
        **named(layer("smooth_quant_col", weights["up"], None), f"{at}.mlp.gate"),
        **named(layer("smooth_quant_col", weights["down"], torch.linspace(0.5, 2, 64)), f"{at}.mlp.proj"),
        f"{at}.input_layernorm.weight": torch.ones(32),
        f"{at}.post_layernorm.weight": torch.ones(32),
    }
    return stored, {"qkv": qkv, **weights}


def rtp_layers() -> list[LayerSpec]:
    """Llama's layers as an engine that knows these names describes them: ``fc`` is gate, ``gate`` is up."""
    at = "model.layers.0"
    place = f"{at}.attention.query_key_value"
    fused = [
        LayerSpec(f"{at}.self_attn.{name}_proj", "linear", n, HIDDEN, ((StoredPart(place, n, (start, start + n), 64),),))
        for name, n, start in (("q", 32, 0), ("k", 16, 32), ("v", 16, 48))
    ]
    names = {"self_attn.o_proj": ("attention.dense", 32, 32), "mlp.gate_proj": ("mlp.fc", 64, 32)}
    names |= {"mlp.up_proj": ("mlp.gate", 64, 32), "mlp.down_proj": ("mlp.proj", 32, 64)}
    rest = [
        LayerSpec(f"{at}.{own}", "linear", n, k, ((StoredPart(f"{at}.{name}", n),),)) for own, (name, n, k) in names.items()
    ]
    return fused + rest


SLOTS = [
    PlainSlot(f"model.layers.0.{name}", (f"model.layers.0.{stored}",), (32,))
    for name, stored in (
        ("input_layernorm.weight", "input_layernorm.weight"),
        ("post_attention_layernorm.weight", "post_layernorm.weight"),
    )
]


def test_llama_of_rtp_llm_is_covered_exactly() -> None:
    stored, weights = rtp_llama()
    planner = Planner(memory(stored))
    planned = planner.plan(rtp_layers(), SLOTS)
    source = MemorySource(stored)
    rows = {"q": slice(0, 32), "k": slice(32, 48), "v": slice(48, 64)}
    for decision in planned.decisions:
        (segment,) = decision.segments
        assert segment.quant == LayerQuant(W8A8, "smooth_quant_col")
        part = decode_part(source, FORMAT, segment.quant, decision.layer, segment.parts[0])
        name = decision.layer.name.rsplit(".", 1)[-1].removesuffix("_proj")
        exact = weights["qkv"][rows[name]] if name in rows else weights["o_proj" if name == "o" else name]
        factor = 1.0 if part.pre_scale is None else part.pre_scale.double()
        assert relative(part.dequantize().double() * factor, exact) < 0.01, name
    assert any("smooth_quant_col (5 layers)" in note for note in planned.notes)


def test_gate_and_up_are_not_exchanged() -> None:
    """In these names ``fc`` is the gate projection and ``gate`` is the up projection: the other way round is seen."""
    stored, weights = rtp_llama()
    fc = read(stored, "model.layers.0.mlp.fc", INNER, HIDDEN).dequantize()
    assert relative(fc, weights["gate"]) < 0.01
    assert relative(fc, weights["up"]) > 1


def test_tensor_that_no_layer_takes_is_refused() -> None:
    stored, _ = rtp_llama()
    with pytest.raises(CoverError, match=r"mlp\.proj\.shift"):
        plan(memory({**stored, "model.layers.0.mlp.proj.shift": torch.zeros(64)}), rtp_layers(), SLOTS)


def test_smoother_is_cut_with_the_columns() -> None:
    x, weight = inputs(), linear()
    tensors = named(layer("smooth_quant", weight, smoother_of(x, weight)))
    whole = read(tensors)
    spec, part = LayerSpec("layer", "linear", N, K, columns=(8, 24)), StoredPart("layer", N)
    cut = decode_part(MemorySource(tensors), FORMAT, LayerQuant(W8A8, "smooth_quant"), spec, part)
    assert cut.equal(whole.narrow(k=(8, 24)))


def test_explain_needs_no_quantization_config(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "qplug_core", "explain", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 3), done.stderr
    text = " ".join(done.stdout.split())
    assert "smooth_quant" in text
    assert "2 of 7 layers store a smoother" in text


def test_engine_runs_the_checkpoint_of_a_llama(tmp_path: Path) -> None:
    """Float32 logits are those of a plain model with ``codes * scales / smoother``; the model that was smoothed is near."""
    import qplug_core

    folder = llama_folder(tmp_path)
    exact = qplug_core.load(folder, dtype="float32", kernels="reference", activations="16bit").logits(IDS)
    assert relative(exact, plain_logits(folder, lambda w, s: w / s)) < 1e-5
    assert relative(exact, plain_logits(folder, lambda w, s: w * s)) > 0.2
    original = torch.load(folder / "original.pt")
    assert relative(exact, original) < 0.05
    assert relative(qplug_core.load(folder, dtype="float32").logits(IDS), original) < 0.1


def plain_logits(folder: Path, smooth: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A stock model on weights that were unpacked here."""
    from transformers import AutoConfig, AutoModelForCausalLM

    state = dict(load_file(folder / "model.safetensors"))
    for name in [name for name in state if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        weight = state.pop(name).t().float() * state.pop(f"{module}.scales")[:, None]
        smoother = state.pop(f"{module}.smoother", None)
        state[f"{module}.weight"] = weight if smoother is None else smooth(weight, smoother)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    model.load_state_dict(state)
    with torch.inference_mode():
        logits: Tensor = model(IDS).logits
    return logits


def llama_folder(folder: Path) -> Path:
    """A one-layer Llama as RTP-LLM's converters smooth and store it, by the names of Hugging Face."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 5
    with torch.inference_mode():
        torch.save(model(IDS).logits, folder / "original.pt")
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    at = "model.layers.0"
    factor = torch.linspace(0.3, 3, HIDDEN)
    groups = {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
              "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}  # fmt: skip
    for norm, names in groups.items():
        state[f"{at}.{norm}.weight"] /= factor
        for name in names:
            weight = state.pop(f"{at}.{name}.weight").double() * factor.double()
            state |= named(layer("smooth_quant", weight, None), f"{at}.{name}")
    for name, width in (("self_attn.o_proj", HIDDEN), ("mlp.down_proj", INNER)):
        weight = state.pop(f"{at}.{name}.weight").double()
        state |= named(layer("smooth_quant", weight, torch.linspace(0.2, 5, width)), f"{at}.{name}")
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "smoothquant.ini").write_text("[llama]\nsmoothquant = 0.5\n")
    return folder


RTP_NAMES = {
    "self_attn.o_proj": "attention.dense", "mlp.gate_proj": "mlp.fc", "mlp.up_proj": "mlp.gate", "mlp.down_proj": "mlp.proj",
}  # fmt: skip


@pytest.mark.parametrize(("root", "style"), [("model", "smooth_quant_col"), ("transformer", "smooth_quant_trt")])
def test_a_llama_of_other_names_loads(tmp_path: Path, root: str, style: str) -> None:
    """A whole folder as RTP-LLM's converter for Llama and TensorRT-LLM name it: merged qkv, fc for gate, gate for up."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False)
    model = LlamaForCausalLM(config).eval()
    stored: dict[str, Tensor] = {}
    state = model.state_dict()
    for i in range(2):
        at, theirs = f"model.layers.{i}", f"{root}.layers.{i}"
        qkv = torch.cat([state.pop(f"{at}.self_attn.{p}_proj.weight") for p in "qkv"])
        stored |= named(layer(style, qkv, None), f"{theirs}.attention.{'query_key_value' if root == 'model' else 'qkv'}")
        for ours, name in RTP_NAMES.items():
            weight = state.pop(f"{at}.{ours}.weight")
            smoother = torch.linspace(0.5, 2, weight.shape[1]) if ours.endswith(("o_proj", "down_proj")) else None
            stored |= named(layer(style, weight, smoother), f"{theirs}.{name}")
        stored[f"{theirs}.post_layernorm.weight"] = state.pop(f"{at}.post_attention_layernorm.weight")
        stored[f"{theirs}.input_layernorm.weight"] = state.pop(f"{at}.input_layernorm.weight")
    if root == "transformer":
        stored["transformer.vocab_embedding.weight"] = state.pop("model.embed_tokens.weight")
        stored["transformer.ln_f.weight"] = state.pop("model.norm.weight")
    config.save_pretrained(tmp_path)
    save_file({n: t.contiguous() for n, t in {**stored, **state}.items()}, tmp_path / "model.safetensors")
    (tmp_path / "smoothquant.ini").write_text("[llama]\n")
    ids = torch.arange(3, 19)[None]
    expected = model(input_ids=ids).logits.detach()
    engine = qplug_core.load(tmp_path, dtype="float32", kernels="reference", activations="16bit")
    assert relative(engine.logits(ids), expected) < 0.02
    assert all(d.quantized for d in engine.plan.decisions if d.layer.op == "linear")
