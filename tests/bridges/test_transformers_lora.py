"""LoRA adapters of PEFT on quantized layers: what they add is what they add to a dequantized copy."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers", "5.23")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import qplug_core.bridges.transformers as bridge  # noqa: E402
from qplug_core.bridges.transformers.lora import QuantLoraLinear  # noqa: E402
from qplug_core.engine.modules import QuantLinear  # noqa: E402
from qplug_core.errors import UsageError  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
from bridges import proof  # noqa: E402
from conftest import DATA  # noqa: E402

bridge.register()
GPTQ = DATA / "gptqmodel-w4-g128-sym-descact"
IDS = torch.arange(24)[None] * 7 % 250
TARGETS = ["q_proj", "down_proj"]


def load():
    return AutoModelForCausalLM.from_pretrained(GPTQ, dtype=torch.float32)


def log_probs(model):
    with torch.inference_mode():
        return torch.log_softmax(model(input_ids=IDS).logits, dim=-1)


def distance(one, other):
    return float((one - other).abs().max())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter whose two matrices are random, so that it changes the model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(load(), LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)).save_pretrained(folder)
    return folder


def test_beside_a_quantized_layer_as_beside_its_copy(adapter, capsys, request):
    quantized = PeftModel.from_pretrained(load(), adapter)
    assert isinstance(quantized.base_model.model.model.layers[0].mlp.down_proj, QuantLoraLinear)
    assert isinstance(quantized.base_model.model.model.layers[0].mlp.up_proj, QuantLinear)
    copy = PeftModel.from_pretrained(load().dequantize(), adapter)
    found, contrast = distance(log_probs(quantized), log_probs(copy)), distance(log_probs(load()), log_probs(copy))
    with capsys.disabled():
        print(f"\nLoRA {found:.1e}  without the adapter {contrast:.1e}")
    assert found < 1e-4
    assert contrast > 0.1
    proof.record("transformers", version("transformers"), "gptq", "LoRA of PEFT", request.node.nodeid, found, contrast)


def test_transformers_own_load_adapter(adapter):
    model = load()
    model.load_adapter(str(adapter))
    assert torch.equal(log_probs(model), log_probs(PeftModel.from_pretrained(load(), adapter)))


def test_save_pretrained_with_an_adapter_writes_the_adapter(adapter, tmp_path):
    model = load()
    model.load_adapter(str(adapter))
    before = log_probs(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    again = load()
    again.load_adapter(str(tmp_path))
    assert torch.equal(log_probs(again), before)


def test_merged_is_unmerged_and_comes_apart_again(adapter):
    model = PeftModel.from_pretrained(load(), adapter)
    before = log_probs(model)
    model.merge_adapter()
    assert type(model.base_model.model.model.layers[0].mlp.down_proj.get_base_layer()) is torch.nn.Linear
    assert distance(log_probs(model), before) < 1e-4
    model.unmerge_adapter()
    assert isinstance(model.base_model.model.model.layers[0].mlp.down_proj.get_base_layer(), QuantLinear)
    assert torch.equal(log_probs(model), before)


def test_a_disabled_adapter_is_none(adapter):
    model = PeftModel.from_pretrained(load(), adapter)
    with model.disable_adapter():
        assert torch.equal(log_probs(model), log_probs(load()))


def test_two_adapters(adapter, tmp_path):
    torch.manual_seed(1)
    get_peft_model(load(), LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(load(), adapter, adapter_name="one")
    one = log_probs(model)
    model.load_adapter(str(tmp_path), adapter_name="two")
    model.set_adapter("two")
    assert distance(log_probs(model), one) > 0.1
    model.set_adapter("one")
    assert torch.equal(log_probs(model), one)


def test_a_merged_model_is_not_saved_as_the_checkpoint(adapter, tmp_path):
    model = PeftModel.from_pretrained(load(), adapter)
    unmerged = log_probs(model)
    merged = model.merge_and_unload()
    assert distance(log_probs(merged), unmerged) < 1e-4
    with pytest.raises(UsageError, match="was replaced since the model was loaded"):
        merged.save_pretrained(tmp_path)


@pytest.mark.parametrize("option", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["dora", "pissa"])
def test_what_changes_the_base_weight_is_refused(option):
    with pytest.raises(UsageError, match="base weight"):
        get_peft_model(load(), LoraConfig(r=4, target_modules=TARGETS, **option))


def test_a_config_that_brings_its_own_layers_keeps_them():
    class Own(QuantLoraLinear):
        """Somebody else's layer for the same modules."""

    config = LoraConfig(r=2, target_modules=TARGETS)
    config._register_custom_module({QuantLinear: Own})
    model = get_peft_model(load(), config)
    assert type(model.base_model.model.model.layers[0].mlp.down_proj) is Own
