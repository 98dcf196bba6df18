"""Static W8A8 encoders of RTP-LLM: scales of weights and inputs, the input scale that three layers share, and a whole BERT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_int8.pertensor import PerTensorFormat
from safetensors.torch import load_file, save_file
from torch import Tensor

from qplug_core.config import LayerQuant, ModuleName
from qplug_core.errors import ConfigError, CoverError, DecodeError
from qplug_core.layer import LayerSpec
from qplug_core.planner import plan
from qplug_core.reference.linear import ReferenceLinear
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source

FORMAT = PerTensorFormat()
STATIC = QuantScheme.parse("W8A8_tensor_static")
QUANT = LayerQuant(STATIC, "pertensor_quant")
N, K = 24, 16


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def source(tensors: dict[str, Tensor], config: dict[str, Any] | None = None, files: tuple[str, ...] = ()) -> Source:
    infos = MemorySource(tensors).tensors
    return Source(
        Path("memory"), {}, config, "config.json", {name: {} for name in ("pertensorquant.ini", *files)}, infos, {}
    )


def layer(weight: Tensor, x: Tensor) -> dict[str, Tensor]:
    """One scale for the weight, one for the input (amax / 127): the exporter's side, in float64."""
    scale, step = (weight.abs().max() / 127).float(), (x.abs().max() / 127).float()
    codes = torch.round(weight / scale.double()).to(torch.int8)
    return {"qweight": codes.t().contiguous(), "scales": scale, "{module}_input_scale": step}


def case() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, K, generator=generator, dtype=torch.float64)
    weight = torch.randn(N, K, generator=generator, dtype=torch.float64) * 0.1
    return x, weight, layer(weight, x)


def run(stored: dict[str, Tensor], x: Tensor) -> Tensor:
    kernel = ReferenceLinear()
    return kernel.apply(x, kernel.pack(FORMAT.decode(stored, QUANT, N, K)))


def test_layer_is_the_engine_formula() -> None:
    x, weight, stored = case()
    step = stored["{module}_input_scale"].double()
    codes = torch.round(x * 2 / step).clamp(-128, 127)
    expected = (codes @ stored["qweight"].double()) * step * stored["scales"].double()
    # Twice the calibrated range: codes saturate, at -128 below.
    assert codes.min() == -128
    assert relative(run(stored, x * 2), expected) < 1e-6
    assert relative(run(stored, x), x @ weight.t()) < 0.03


def test_input_scale_is_a_step_and_no_multiplier() -> None:
    """RTP-LLM hands the kernel ``1 / input_scale``; a file that held that would be off by orders of magnitude."""
    x, weight, stored = case()
    inverted = {**stored, "{module}_input_scale": stored["{module}_input_scale"].reciprocal()}
    assert relative(run(inverted, x), x @ weight.t()) > 0.3


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_input_scale_that_is_none_is_refused(bad: float) -> None:
    x, _, stored = case()
    with pytest.raises(DecodeError, match="input scale holds"):
        run({**stored, "{module}_input_scale": torch.tensor(bad)}, x)


AT = "encoder.layer.0.attention.self"


def attention() -> dict[str, Tensor]:
    x, weight, _ = case()
    tensors: dict[str, Tensor] = {f"{AT}.qkv_input_scale": torch.tensor([0.5])}
    for name in ("query", "key", "value"):
        stored = layer(weight, x)
        tensors |= {f"{AT}.{name}.{part}": stored[part] for part in ("qweight", "scales")}
    return tensors


LAYERS = [LayerSpec(f"{AT}.{name}", "linear", N, K) for name in ("query", "key", "value")]


def test_query_key_and_value_share_an_input_scale() -> None:
    tensors = attention()
    config = FORMAT.parse(source(tensors))
    shared = LayerQuant(STATIC, "pertensor_quant", (("shared", True),))
    assert config.quant_for(ModuleName((f"{AT}.key",))) == shared
    assert "3 of 3 layers share" in config.inferred[0]
    planned = plan(source(tensors), LAYERS, complete=True)
    assert [d.segments[0].quant for d in planned.decisions] == [shared] * 3


def test_shared_scale_is_claimed_only_where_it_is_shared() -> None:
    tensors = attention()
    stray = {
        **tensors,
        "encoder.layer.0.output.qkv_input_scale": torch.ones(1),
        "encoder.layer.0.output.bias": torch.ones(1),
    }
    with pytest.raises(CoverError, match=r"encoder\.layer\.0\.output\.qkv_input_scale"):
        plan(source(stray), LAYERS, complete=True)
    del tensors[f"{AT}.qkv_input_scale"]
    with pytest.raises(CoverError, match="key_input_scale"):
        plan(source(tensors), LAYERS, complete=True)


def test_input_scale_after_the_last_layer_is_reported() -> None:
    tensors = {**attention(), "encoder.layer.1.attention.self.qkv_input_scale": torch.ones(1)}
    planned = plan(source(tensors), LAYERS, complete=True)
    assert any("after the last" in note for note in planned.notes)


def test_scales_by_channel() -> None:
    _, weight, stored = case()
    scales = (weight.abs().amax(1) / 127).float()
    tensors = {
        "l.qweight": torch.round(weight / scales.double()[:, None]).to(torch.int8).t().contiguous(),
        "l.scales": scales,
    }
    tensors["l_input_scale"] = stored["{module}_input_scale"]
    quant = FORMAT.parse(source(tensors)).quant_for(ModuleName(("l",)))
    assert quant is not None
    assert str(quant.scheme) == "W8A8_static"


def test_without_headers() -> None:
    config = FORMAT.parse(source({}))
    shared = config.quant_for(ModuleName((f"{AT}.value",)))
    assert shared is not None
    assert shared.opt("shared")
    assert config.quant_for(ModuleName(("encoder.layer.0.output.dense",))) == QUANT


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="none of its 1 tensors is an int8 weight"):
        FORMAT.parse(source({"l.weight": torch.zeros(2, 2)}))
    with pytest.raises(ConfigError, match="two formats"):
        FORMAT.parse(source(attention(), files=("smoothquant.ini",)))
    with pytest.raises(ConfigError, match="group_size: 64"):
        FORMAT.parse(source({}, {"quant_method": "pertensor_quant", "group_size": 64}))


IDS = torch.arange(24).view(2, 12)


def test_engine_runs_the_checkpoint_of_a_bert(tmp_path: Path) -> None:
    import qplug_core

    original = bert(tmp_path)
    exact = qplug_core.load(tmp_path, dtype="float32", kernels="reference", activations="16bit")
    found = exact.forward(input_ids=IDS).last_hidden_state
    assert relative(found, unpacked(tmp_path)) < 1e-5
    assert relative(found, original) < 0.03
    static = qplug_core.load(tmp_path, dtype="float32").forward(input_ids=IDS).last_hidden_state
    assert 1e-4 < relative(static, original) < 0.06


def bert(folder: Path) -> Tensor:
    """A one-layer BERT with the names that RTP-LLM reads; returns its output before."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, max_position_embeddings=16,
        hidden_act="gelu",
    )  # fmt: skip
    model = BertModel(config).eval()
    ranges: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "pooler" not in name:
            module.weight.data *= 5
            module.register_forward_hook(lambda _, x, __, name=name: ranges.__setitem__(name, x[0].double()))
    with torch.inference_mode():
        original: Tensor = model(input_ids=IDS).last_hidden_state
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    for name, x in ranges.items():
        stored = layer(state.pop(f"{name}.weight").double(), x)
        state |= {f"{name}.{part}": stored[part] for part in ("qweight", "scales")}
        parent, _, leaf = name.rpartition(".")
        place = f"{parent}.qkv_input_scale" if leaf in ("query", "key", "value") else f"{name}_input_scale"
        state[place] = stored["{module}_input_scale"]
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["BertModel"]}))
    (folder / "pertensorquant.ini").touch()
    return original


def unpacked(folder: Path) -> Tensor:
    from transformers import BertConfig, BertModel

    state = {name: t for name, t in load_file(folder / "model.safetensors").items() if not name.endswith("_input_scale")}
    for name in [name for name in state if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        state[f"{module}.weight"] = state.pop(name).t().float() * state.pop(f"{module}.scales")
    model = BertModel(BertConfig.from_pretrained(folder)).eval()
    model.load_state_dict(state)
    with torch.inference_mode():
        out: Tensor = model(input_ids=IDS).last_hidden_state
    return out
