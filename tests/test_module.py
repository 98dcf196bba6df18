"""quantize_module: one linear layer, no checkpoint and no engine."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import qplug_core
from qplug_core.errors import CheckpointError, NoKernel, QplugError, SchemeError, UsageError
from qplug_core.quantizer import RoundToNearest
from qplug_core.scheme import QuantScheme


def linear(k: int = 256, n: int = 128, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n, bias=bias).to(dtype)


def rounded(layer: nn.Linear, scheme: str) -> torch.Tensor:
    return RoundToNearest().quantize(layer.weight.detach(), QuantScheme.parse(scheme)).dequantize()


@pytest.mark.parametrize("scheme", ["W4A16_g128", "W8A16", "Wfp8A16", "Wnvfp4A16", "wnf4"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_rounded_weight(scheme, bias):
    layer = linear(bias=bias, dtype=torch.float32)
    x = torch.randn(3, 5, 256)
    exact = nn.functional.linear(x, rounded(layer, scheme), layer.bias)
    y = qplug_core.quantize_module(layer, scheme)(x)
    assert y.shape == (3, 5, 128)
    assert (y - exact).norm() / exact.norm() < 1e-5
    assert (y - layer(x)).norm() / exact.norm() > 1e-3


def test_dtype_device_and_mode_are_those_of_the_layer_which_is_left_alone():
    layer = linear().eval()
    before = layer.weight.clone()
    module = qplug_core.quantize_module(layer, "W4A16_g128")
    assert module(torch.ones(1, 256, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert not module.training
    assert torch.equal(layer.weight, before)
    assert layer.weight.requires_grad
    assert module.bias is not layer.bias
    assert (module.in_features, module.out_features) == (256, 128)
    assert module.method.nbytes < layer.weight.nbytes / 3


def test_words_of_engines_mean_what_they_mean_at_load():
    module = qplug_core.quantize_module(linear(), "int8")
    assert str(module.decision.segments[0].scheme).startswith("W8A16")


def test_the_fast_kernel_is_taken_and_each_other_one_has_a_reason():
    module = qplug_core.quantize_module(linear(), "W4A16_g128")
    floor = qplug_core.quantize_module(linear(), "W4A16_g128", kernels="reference")
    assert floor.method.kernels == ("core.reference_linear",)
    assert all(tried.refusals for tried in module.decision.segments[0].choice.tried)
    pinned = qplug_core.quantize_module(linear(), "W4A16_g128", pin="core.reference_linear")
    assert pinned.method.kernels == ("core.reference_linear",)


def test_torch_compile_gives_one_graph():
    module = qplug_core.quantize_module(linear(), "W4A16_g128")
    torch.compiler.reset()
    x = torch.randn(4, 256, dtype=torch.bfloat16)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))


def test_state_fills_the_weight_in_use():
    x = torch.randn(2, 256, dtype=torch.bfloat16)
    first = qplug_core.quantize_module(linear(), "W4A16_g128")
    torch.manual_seed(1)
    second = qplug_core.quantize_module(nn.Linear(256, 128).to(torch.bfloat16), "W4A16_g128")
    assert not torch.equal(first(x), second(x))
    addresses = [t.data_ptr() for t in second.method.tensors().values()]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(first(x), second(x))
    assert addresses == [t.data_ptr() for t in second.method.tensors().values()]


def test_a_state_of_another_kernel_is_refused_before_it_is_loaded():
    module = qplug_core.quantize_module(linear(), "W4A16_g128", kernels="reference")
    other = qplug_core.quantize_module(linear(), "W4A16_g32", kernels="reference")
    before = {name: t.clone() for name, t in module.method.tensors().items()}
    with pytest.raises(
        CheckpointError, match=r"holds W4A16_g32 packed for core\.reference_linear and this module is W4A16_g128"
    ):
        module.load_state_dict(other.state_dict())
    with pytest.raises(CheckpointError, match="holds 16 bit packed for no kernel"):
        module.load_state_dict(linear().state_dict())
    with pytest.raises(CheckpointError, match="leave assign out"):
        module.load_state_dict(module.state_dict(), assign=True)
    assert all(torch.equal(before[name], t) for name, t in module.method.tensors().items())


def test_a_copy_has_its_own_weight():
    x = torch.randn(2, 256, dtype=torch.bfloat16)
    module = qplug_core.quantize_module(linear(), "W4A16_g128")
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), module(x))
    for buffer in twin.buffers():
        buffer.zero_()
    assert not torch.equal(twin(x), module(x))


def test_inside_a_model():
    model = nn.Sequential(linear(), nn.SiLU(), linear(128, 256))
    model[0] = qplug_core.quantize_module(model[0], "W4A16_g128")
    assert model(torch.ones(1, 256, dtype=torch.bfloat16)).shape == (1, 256)
    assert any(name.startswith("0.packed_") for name in model.state_dict())
    with pytest.raises(UsageError, match=r"is packed for torch\.bfloat16"):
        model.float()


class Sparse(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.relu())


@pytest.mark.parametrize(
    ("layer", "scheme", "options", "error", "said"),
    [
        (nn.Conv1d(4, 4, 1), "W4A16", {}, UsageError, "a Conv1d was given"),
        (Sparse(64, 64), "W4A16", {}, UsageError, "a Sparse was given"),
        (nn.Linear(64, 64, device="meta"), "W4A16", {}, UsageError, "has no values"),
        (nn.Linear(64, 64).double(), "W4A16", {}, UsageError, "the layer is torch.float64"),
        (nn.Linear(64, 64), "W4A16C8", {}, UsageError, "a linear layer has none of"),
        (nn.Linear(64, 64), "W16A16", {}, QplugError, "16"),
        (nn.Linear(64, 64), "experts=W4A16", {}, UsageError, "says nothing of a linear layer"),
        (nn.Linear(64, 64), "W99", {}, SchemeError, "W99"),
        (nn.Linear(64, 64), "W4A16", {"pin": "no.such"}, UsageError, "'no.such' is pinned"),
        (nn.Linear(64, 64), "W4A16", {"forbid": ["*"]}, NoKernel, "no kernel takes linear"),
        (nn.Linear(64, 64), "W4A16", {"kernels": "fast"}, UsageError, "kernels='fast' was given"),
    ],
)
def test_what_it_does_not_take_is_one_sentence(layer, scheme, options, error, said):
    with pytest.raises(error, match=said) as raised:
        qplug_core.quantize_module(layer, scheme, **options)
    assert "\n" not in str(raised.value)
