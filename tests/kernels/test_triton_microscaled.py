"""NVFP4 and MX products on units with block scales: codes and scales against the float32 quantizer, then products on given codes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qplug_core.device import Device
from qplug_core.errors import DecodeError
from qplug_core.kernel import PackedWeight, problem_of
from qplug_core.kernels import triton_microscaled
from qplug_core.kernels.triton_microscaled import TritonMicroscaled, quantized
from qplug_core.reference.activation import quantize_activation
from qplug_core.scheme import QuantScheme
from qplug_core.testing.interpreter import need_interpreter
from qplug_core.testing.weights import random_weight
from qplug_core.weight import QuantWeight, decode_scales

sys.path.insert(0, str(Path(__file__).parent))
from definition import distance, exact

need_interpreter()

NV = "Wnvfp4Anvfp4"
RULES = tuple(f"_a:rule={rule}" for rule in ("ct", "floor", "ceil", "even", "up"))
MX = ("Wmxfp4Amxfp4", "Wmxfp4Amxfp8", "Wmxfp8Amxfp8")


class NVFP4(TritonMicroscaled):
    name = "test.triton_nvfp4"
    scale = "e4m3"


class Microscaled(TritonMicroscaled):
    name = "test.triton_mx"
    scale = "e8m0"


def kernel_of(text: str) -> TritonMicroscaled:
    return NVFP4() if text.startswith(NV) else Microscaled()


def make(text: str, n: int, k: int, divide: bool = False) -> QuantWeight:
    weight = random_weight(QuantScheme.parse(text), n, k, torch.Generator().manual_seed(n + k))
    if weight.act_scale is None:
        return weight
    return replace(weight, act_scale=torch.tensor(300.0 if divide else 0.004), act_div=divide)


def fp4(codes: Tensor) -> Tensor:
    """Codes of packed bytes, in order of columns."""
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)


def spread(m: int, k: int, seed: int) -> Tensor:
    """Tokens of many magnitudes, one of them zero, with every tie of FP4 under a scale of 1 among them."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-4, 3, m)[:, None]
    x[0] = 0
    ties = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x[1] = torch.cat([ties, -ties]).repeat(-(-k // 16))[:k]
    return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("text", "divide"), [(NV, False), (NV, True), *((t + r, False) for t in MX[:2] for r in ("", *RULES))]
)
def test_codes_and_scales_are_those_of_the_float32_quantizer(text: str, divide: bool, dtype: torch.dtype) -> None:
    k = 328
    weight = make(text, 8, k, divide)
    act = weight.scheme.act
    assert act is not None
    x = spread(9, k, 5).to(dtype)
    packed = kernel_of(text).pack(weight)
    codes, scales = quantized(x, packed, packed.tensors.get("act_scale"))
    expected = quantize_activation(x.float(), act, weight.act_scale, None, divide)
    groups = -(-k // packed.meta["group"])
    found = decode_scales(scales[:, :groups], act.scale_dtype).float()
    wanted = decode_scales(expected.scales, act.scale_dtype).float()
    assert float((found != wanted).float().mean()) <= weight.scheme.tolerance.code_share
    if packed.meta["act"] == "e2m1":
        assert not fp4(codes)[:, k:].any()
        mine, theirs = fp4(codes)[:, :k].long(), expected.codes.long()
        step = ((mine & 7) - (theirs & 7)).abs()
    else:
        assert not codes[:, k:].float().any()
        mine, theirs = codes[:, :k].view(torch.uint8).long(), expected.codes.view(torch.uint8).long()
        step = (mine - theirs).abs()
    assert float((mine != theirs).float().mean()) <= weight.scheme.tolerance.code_share
    assert int(step.max()) <= weight.scheme.tolerance.code_step


@pytest.mark.parametrize("text", [NV, *MX, MX[0] + RULES[2]])
def test_product_of_ragged_shapes(text: str) -> None:
    kernel = kernel_of(text)
    for i, (n, k) in enumerate(((60, 16), (33, 100), (70, 513))):
        weight, dtype = make(text, n, k, divide=bool(i % 2)), (torch.bfloat16, torch.float16)[i % 2]
        x = torch.randn((2, 5, 18)[i], k, generator=torch.Generator().manual_seed(i)).to(dtype)
        bias = torch.linspace(-1, 1, n).to(dtype) if i else None
        y = kernel.apply(x, kernel.pack(weight), bias)
        expected = exact(x, weight) + (0 if bias is None else bias.double())
        assert y.dtype == dtype
        assert distance(y, expected) < (2.5e-3 if dtype == torch.bfloat16 else 5e-4)


def test_weights_of_4_bits_times_activations_of_8_without_widening(monkeypatch: pytest.MonkeyPatch) -> None:
    """As sm_100 and gfx950 do; the interpreter otherwise does what sm_120 does."""
    weight = make(MX[1], 40, 300)
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).half()
    packed = Microscaled().pack(weight)
    wide = Microscaled().apply(x, packed)
    monkeypatch.setattr(triton_microscaled, "widened", lambda *_: False)
    assert torch.equal(Microscaled().apply(x, packed), wide)
    assert distance(wide, exact(x, weight)) < 5e-4


def test_split_k_gives_what_one_program_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make(NV, 40, 1100)
    x = torch.randn(3, 1100, generator=torch.Generator().manual_seed(1)).half()
    results = []
    for splits in (1, 3):
        monkeypatch.setattr(triton_microscaled, "splits_of", lambda *_, s=splits: s)
        results.append(NVFP4().apply(x, NVFP4().pack(weight), torch.ones(40)))
    assert distance(results[1], results[0].double()) < 2e-4


def test_negative_block_scales_which_units_do_not_read() -> None:
    weight = make(NV, 24, 96)
    weight = replace(
        weight, scales=(weight.scales.float() * torch.tensor([1.0, -1.0]).repeat(24, 3)).to(torch.float8_e4m3fn)
    )
    packed = NVFP4().pack(weight)
    assert not (packed.tensors["scales"].view(torch.uint8) & 0x80).any()
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(2)).half()
    assert distance(NVFP4().apply(x, packed), exact(x, weight)) < 5e-4


def test_block_scales_that_are_no_fp8_are_refused_in_one_sentence() -> None:
    weight = make(NV, 8, 32)
    with pytest.raises(DecodeError, match="no FP8 e4m3"):
        NVFP4().pack(replace(weight, scales=weight.scales.float() * 1.01))


def test_nan_and_inf_make_their_tokens_so_and_no_other() -> None:
    for text in MX:
        x = torch.ones(3, 64, dtype=torch.bfloat16)
        x[1, 7], x[2, 3] = float("nan"), float("inf")
        y = Microscaled().apply(x, Microscaled().pack(make(text, 20, 64)))
        assert y[1].isnan().all()
        assert not y[2].isfinite().any()
        assert y[0].isfinite().all()


def test_a_stored_outer_scale_clips_what_is_infinite_as_the_reference_does() -> None:
    weight = make(NV, 20, 64)
    x = torch.ones(3, 64, dtype=torch.float16)
    x[1, 7], x[2, 3] = float("nan"), float("inf")
    y = NVFP4().apply(x, NVFP4().pack(weight))
    assert y[1].isnan().all()
    assert distance(y[[0, 2]], exact(x, weight)[[0, 2]]) < 5e-4


def stacked(packs: list[PackedWeight]) -> PackedWeight:
    tensors = {
        name: torch.stack([p.tensors[name].view(torch.uint8) for p in packs]).view(t.dtype)
        for name, t in packs[0].tensors.items()
    }
    return PackedWeight(packs[0].kernel, packs[0].n, packs[0].k, tensors, packs[0].meta)


@pytest.mark.parametrize("text", [NV, MX[0], MX[1]])
def test_one_launch_gives_what_the_experts_give_one_by_one(text: str) -> None:
    kernel, counts = kernel_of(text), (3, 0, 17, 2)
    weights = [make(text, 40, 100) for _ in counts]
    weights = [
        replace(
            w,
            codes=w.codes.roll(e, 0),
            scales=w.scales.view(torch.uint8).roll(e, 1).view(w.scales.dtype),
            pre_scale=torch.linspace(0.5 + e, 2, 100),
            act_scale=w.act_scale and w.act_scale * (1 + e),
        )
        for e, w in enumerate(weights)
    ]
    packs = [kernel.pack(w) for w in weights]
    x = torch.randn(sum(counts) + 3, 100, generator=torch.Generator().manual_seed(3)).half()
    bias = torch.linspace(-1, 1, 160).view(4, 40).half()
    y = kernel.apply_experts(x, stacked(packs), torch.tensor(counts).cumsum(0), bias)
    parts = [kernel.apply(r, p, bias[e]) for e, (r, p) in enumerate(zip(x.split([*counts, 3]), packs, strict=False))]
    expected = torch.cat([*parts, x.new_zeros(3, 40)])
    assert float((y - expected).abs().max()) <= 2e-3 * float(expected.abs().max())
    assert not y[sum(counts) :].any()


def test_no_tokens_and_leading_axes_and_strides() -> None:
    packed = NVFP4().pack(make(NV, 48, 96))
    assert NVFP4().apply(torch.empty(0, 96, dtype=torch.bfloat16), packed).shape == (0, 48)
    x = torch.randn(2, 3, 192, dtype=torch.bfloat16)[..., ::2]
    assert torch.equal(NVFP4().apply(x, packed).view(6, 48), NVFP4().apply(x.reshape(6, 96), packed))


def test_packing_again_refills_the_same_storage() -> None:
    first, second = make(NV, 16, 64), make(NV, 16, 65).narrow((0, 16), (0, 64))
    packed = NVFP4().pack(first)
    where = {name: t.data_ptr() for name, t in packed.tensors.items()}
    again = NVFP4().pack(second, packed)
    assert {name: t.data_ptr() for name, t in again.tensors.items()} == where
    assert torch.equal(again.tensors["codes"], NVFP4().pack(second).tensors["codes"])


@pytest.mark.parametrize(
    ("text", "device", "codes"),
    [
        (NV, "sm_100", set()),
        (NV, "sm_121", set()),
        (NV, "sm_90", {"device"}),
        (NV, "gfx950", {"device"}),
        (MX[0], "gfx950", set()),
        (MX[0], "gfx942", {"device"}),
        (MX[1], "sm_120", set()),
        ("Wmxfp4Amxfp4_a:rule=other", "sm_100", {"rule"}),
        ("Wmxfp4A16", "sm_100", {"scheme"}),
        ("Wmxfp4Afp8", "sm_100", {"scheme"}),
        ("Wnvfp4Anvfp4_g32", "sm_100", {"group"}),
    ],
)
def test_refusals(text: str, device: str, codes: set[str]) -> None:
    problem = problem_of(make(text, 64, 256), "linear", "bfloat16")
    assert {r.code for r in kernel_of(text).supports(problem, Device.from_name(device))} == codes
