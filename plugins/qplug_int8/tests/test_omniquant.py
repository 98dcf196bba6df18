"""OmniQuant: smoother, shift and folded bias against the paper's transformation in float64, and a whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_int8.omniquant import OmniQuantFormat
from safetensors.torch import load_file, save_file
from torch import Tensor

from qplug_core.config import LayerQuant, ModuleName
from qplug_core.errors import CannotEncode, ConfigError, DecodeError
from qplug_core.layer import LayerSpec, StoredPart
from qplug_core.method import decode_part
from qplug_core.reference.linear import ReferenceLinear
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source
from qplug_core.testing import random_weight
from qplug_core.weight import QuantWeight

FORMAT = OmniQuantFormat()
QUANT = LayerQuant(QuantScheme.parse("W8A8"), "omni_quant")
N, K = 48, 40
QUANTIZATION = 0.02
"""Relative error of a right W8A8 layer with these inputs; each of the wrong ones below is more than ten times as far off."""


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def inputs() -> Tensor:
    """``[32, K]`` float64: channels with outliers, and channels far from zero."""
    x = torch.randn(32, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, ::8] *= 20
    x[:, 1::4] += 15
    return x


def transform(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's s and d (arXiv:2308.13137, equation 3) of a layer: d centres each channel, s balances it against the weight."""
    d = (x.amax(0) + x.amin(0)) / 2
    s = ((x - d).abs().amax(0) / weight.abs().amax(0)).sqrt()
    return s.float(), d.float()


def layer(weight: Tensor, bias: Tensor, s: Tensor, d: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The file's tensors, and the bias that W d is folded into."""
    smoothed = weight * s.double()
    scales = (smoothed.abs().amax(1) / 127).float()
    codes = torch.round(smoothed / scales.double()[:, None]).clamp(-127, 127).to(torch.int8)
    stored = {"qweight": codes.t().contiguous(), "scales": scales, "smoother": s, "shift": -d / s}
    return stored, bias + weight @ d.double()


def case() -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = inputs()
    weight = torch.randn(N, K, generator=generator, dtype=torch.float64) * 0.05
    bias = torch.randn(N, generator=generator, dtype=torch.float64) * 0.1
    stored, folded = layer(weight, bias, *transform(x, weight))
    return x, weight, bias, stored, folded


def run(weight: QuantWeight, x: Tensor, bias: Tensor) -> Tensor:
    kernel = ReferenceLinear()
    return kernel.apply(x, kernel.pack(weight), bias)


def source(tensors: dict[str, Tensor], config: dict[str, Any] | None = None, files: dict[str, Any] | None = None) -> Source:
    infos = MemorySource(tensors).tensors
    config = {"bits": 8, "quant_method": "omni_quant"} if config is None else config
    return Source(Path("memory"), {}, config, "config.json", files or {}, infos, {})


def test_layer_is_the_transformation() -> None:
    x, weight, bias, stored, folded = case()
    y = run(FORMAT.decode(stored, QUANT, N, K), x, folded)
    assert relative(y, x @ weight.t() + bias) < QUANTIZATION


def test_layer_is_the_engine_formula() -> None:
    """RTP-LLM's quantizer: divide by the smoother, then add the shift, then round by token."""
    x, _, _, stored, folded = case()
    z = x / stored["smoother"].double() + stored["shift"].double()
    step = z.abs().amax(1, keepdim=True) / 127
    expected = (torch.round(z / step) @ stored["qweight"].double()) * step * stored["scales"].double() + folded
    assert relative(run(FORMAT.decode(stored, QUANT, N, K), x, folded), expected) < 1e-6


WRONG: dict[str, Callable[[QuantWeight], QuantWeight]] = {
    "shift ignored": lambda w: replace(w, act_shift=None),
    "shift with the other sign": lambda w: replace(w, act_shift=-w.act_shift),
    "shift added before the smoother": lambda w: replace(w, act_shift=w.act_shift * w.pre_scale),
    "smoother ignored": lambda w: replace(w, pre_scale=None),
    "smoother inverted": lambda w: replace(w, pre_scale=w.pre_scale.reciprocal()),
    "scale ignored": lambda w: replace(w, scales=torch.ones_like(w.scales)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_reading_is_seen(name: str) -> None:
    x, weight, bias, stored, folded = case()
    wrong = WRONG[name](FORMAT.decode(stored, QUANT, N, K))
    assert relative(run(wrong, x, folded), x @ weight.t() + bias) > 10 * QUANTIZATION


def test_bias_is_the_folded_one() -> None:
    """The unfolded bias, and RTP-LLM's own slip (it fills the bias of q, k and v from ``scales``), are both seen."""
    x, weight, bias, stored, _ = case()
    found = FORMAT.decode(stored, QUANT, N, K)
    for wrong in (bias, stored["scales"].double()):
        assert relative(run(found, x, wrong), x @ weight.t() + bias) > 10 * QUANTIZATION


def test_layer_whose_shift_is_in_the_norm() -> None:
    x, weight, bias, stored, folded = case()
    inside = {name: stored[name] for name in ("qweight", "scales")}
    z = x / stored["smoother"].double() + stored["shift"].double()
    assert relative(run(FORMAT.decode(inside, QUANT, N, K), z, folded), x @ weight.t() + bias) < QUANTIZATION


def test_shift_without_smoother() -> None:
    _, _, _, stored, _ = case()
    found = FORMAT.decode({name: t for name, t in stored.items() if name != "smoother"}, QUANT, N, K)
    assert found.pre_scale is None
    assert torch.equal(found.act_shift, -stored["shift"])


def test_file_comes_back() -> None:
    _, _, _, stored, _ = case()
    decoded = FORMAT.decode(stored, QUANT, N, K)
    written = FORMAT.encode(decoded, QUANT)
    assert written.keys() == stored.keys()
    assert FORMAT.decode(written, QUANT, N, K).equal(decoded)
    assert torch.equal(written["qweight"], stored["qweight"])


def test_cut_of_columns_cuts_smoother_and_shift() -> None:
    _, _, _, stored, _ = case()
    tensors = {f"l.{name}": t for name, t in stored.items()}
    whole = FORMAT.decode(stored, QUANT, N, K)
    spec = LayerSpec("l", "linear", N, K, columns=(8, 24))
    assert decode_part(MemorySource(tensors), FORMAT, QUANT, spec, StoredPart("l", N)).equal(whole.narrow(k=(8, 24)))


def test_zero_smoother_is_refused() -> None:
    _, _, _, stored, _ = case()
    stored["smoother"][0] = 0
    with pytest.raises(DecodeError, match=r"smoother holds 0\.0"):
        FORMAT.decode(stored, QUANT, N, K)


def test_smoothquant_ini_beside_it_is_refused() -> None:
    """RTP-LLM obeys the flag before the config, and would look for other tensors."""
    tensors = {"l.qweight": torch.zeros(4, 4, dtype=torch.int8), "l.scales": torch.ones(4)}
    assert FORMAT.parse(source(tensors)).quant_for(ModuleName(("l",))) == QUANT
    with pytest.raises(ConfigError, match=r"smoothquant\.ini, which RTP-LLM obeys"):
        FORMAT.parse(source(tensors, files={"smoothquant.ini": {}}))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "omni_quant", "bits": 4}, "bits: 4; 8"),
        ({"quant_method": "omni_quant", "bits": 8, "group_size": 128}, "group_size: 128"),
        ({"quant_method": "omni_quant", "bits": 8, "wbits": 8}, "'wbits'"),
    ],
)
def test_config_that_is_not_understood_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FORMAT.parse(source({}, config))


def test_weight_only_omniquant_is_not_this_format() -> None:
    """OmniQuant W4A16 is folded into plain weights: its tools write GPTQ's tensors, in int32."""
    with pytest.raises(ConfigError, match="none of its 1 tensors is an int8 weight called qweight"):
        FORMAT.parse(source({"l.qweight": torch.zeros(4, 4, dtype=torch.int32)}))


@pytest.mark.parametrize("name", ["W4A16_g32", "W8A8_static", "W8A8_tensor", "W8A16"])
def test_foreign_weight_is_refused(name: str) -> None:
    with pytest.raises(CannotEncode, match="choose another format"):
        FORMAT.quant_for_scheme(random_weight(QuantScheme.parse(name), 32, 64))


IDS = torch.arange(36).view(2, 18)


def test_engine_runs_the_checkpoint_of_a_starcoder(tmp_path: Path) -> None:
    """Norms and output projection shifted: float32 logits are those of a plain model that was unpacked here."""
    import qplug_core

    original = starcoder(tmp_path)
    exact = qplug_core.load(tmp_path, dtype="float32", kernels="reference", activations="16bit").logits(IDS)
    assert relative(exact, unpacked_logits(tmp_path, 1.0)) < 1e-5
    assert relative(exact, unpacked_logits(tmp_path, -1.0)) > 0.05
    assert relative(exact, original) < 0.05
    # The best kernel of this machine, with quantized activations.
    assert 1e-4 < relative(qplug_core.load(tmp_path, dtype="float32").logits(IDS), original) < 0.1


def starcoder(folder: Path) -> Tensor:
    """A one-layer GPTBigCode, transformed and stored as RTP-LLM reads it; returns its logits before."""
    from transformers import AutoModelForCausalLM, GPTBigCodeConfig

    torch.manual_seed(0)
    config = GPTBigCodeConfig(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4, n_inner=64, tie_word_embeddings=False
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    with torch.inference_mode():
        original: Tensor = model(IDS).logits
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    block = "transformer.h.0"
    folds = {"attn.c_attn": "ln_1", "attn.c_proj": None, "mlp.c_fc": "ln_2", "mlp.c_proj": None}
    for name, norm in folds.items():
        weight, bias = (state.pop(f"{block}.{name}.{part}").double() for part in ("weight", "bias"))
        k = weight.shape[1]
        s = torch.linspace(0.3, 3, k) if name != "mlp.c_proj" else torch.ones(k)
        d = torch.linspace(-1, 1, k) if name != "mlp.c_proj" else torch.zeros(k)
        stored, folded = layer(weight, bias, s, d)
        if norm is not None:
            state[f"{block}.{norm}.weight"] /= s
            state[f"{block}.{norm}.bias"] = (state[f"{block}.{norm}.bias"] - d) / s
        kept = ("qweight", "scales", "smoother", "shift") if name == "attn.c_proj" else ("qweight", "scales")
        state |= {f"{block}.{name}.{part}": stored[part] for part in kept}
        state[f"{block}.{name}.bias"] = folded.float()
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors")
    written = {**config.to_dict(), "quantization_config": {"bits": 8, "quant_method": "omni_quant"}}
    (folder / "config.json").write_text(json.dumps(written))
    return original


def unpacked_logits(folder: Path, sign: float) -> Tensor:
    """A stock model: ``codes * scales / smoother``, and ``codes * scales * shift`` (with ``sign``) in the bias."""
    from transformers import AutoConfig, AutoModelForCausalLM

    state = dict(load_file(folder / "model.safetensors"))
    for name in [name for name in state if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        weight = state.pop(name).t().float() * state.pop(f"{module}.scales")[:, None]
        if f"{module}.shift" in state:
            state[f"{module}.bias"] += sign * (weight @ state.pop(f"{module}.shift"))
            weight = weight / state.pop(f"{module}.smoother")
        state[f"{module}.weight"] = weight
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(state)
    with torch.inference_mode():
        logits: Tensor = model(IDS).logits
    return logits
