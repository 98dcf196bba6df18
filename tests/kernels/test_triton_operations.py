"""Every product is traced in one piece: operations with fakes of the right shape and dtype, and no graph break between them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from qplug_int8.kernels.triton_wint2 import wint2
from torch import Tensor

from qplug_core.kernel import Kernel
from qplug_core.kernels.triton_kv_cache import kv_store
from qplug_core.kernels.triton_microscaled import TritonMicroscaled
from qplug_core.kernels.triton_mixed import TritonMixed
from qplug_core.kernels.triton_scaled import TritonScaled
from qplug_core.kernels.triton_weight_only import TritonWeightOnly
from qplug_core.scheme import QuantScheme
from qplug_core.testing.interpreter import need_interpreter
from qplug_core.testing.weights import random_weight

need_interpreter()


class WeightOnly(TritonWeightOnly):
    name = "test.triton_weight_only"
    numbers = ("int4",)


class Scaled(TritonScaled):
    name = "test.triton_w8a8"
    number = "int8"


class Mixed(TritonMixed):
    name = "test.triton_w4afp8"
    numbers = ("int4",)
    act = "fp8_e4m3"


class Microscaled(TritonMicroscaled):
    name = "test.triton_nvfp4"
    scale = "e4m3"


CASES = (
    (WeightOnly(), "W4A16_g32"), (Scaled(), "W8A8_a:asym"), (Scaled(), "W8A8_2:4"), (Mixed(), "W4Afp8_g32_asym"),
    (Microscaled(), "Wnvfp4Anvfp4"),
)  # fmt: skip


@pytest.mark.parametrize(("kernel", "text"), CASES)
@pytest.mark.parametrize("experts", [False, True])
def test_compiled_in_one_graph(kernel: Kernel, text: str, experts: bool) -> None:
    weight = random_weight(QuantScheme.parse(text), 24, 64, torch.Generator().manual_seed(0))
    packed = kernel.pack(weight)
    call: Callable[[Tensor], Tensor] = lambda x: kernel.apply(x, packed)  # noqa: E731
    if experts:
        packed.tensors = {name: torch.stack([t, t]) for name, t in packed.tensors.items()}
        ends = torch.tensor([2, 5])
        call = lambda x: kernel.apply_experts(x, packed, ends)  # noqa: E731
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    torch._dynamo.reset()
    y = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    assert y.dtype == x.dtype
    assert torch.equal(y, call(x))


def test_the_operations_hold_what_their_schemas_say() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (16, 32), generator=generator, dtype=torch.uint8)
    local = torch.randint(0, 256, (1, 16), generator=generator, dtype=torch.uint8)
    row = torch.rand(16, generator=generator)
    x = torch.randn(3, 128, generator=generator).half()
    torch.library.opcheck(
        wint2, (x, codes, local, row, row * 100, row, None, None, 16), test_utils=("test_schema", "test_faketensor")
    )
    to = torch.zeros(1, 2, 3, 36, dtype=torch.uint8)
    keys = torch.randn(1, 2, 3, 32, generator=generator).half()
    torch.library.opcheck(kv_store, (keys, to, None, None, "e4m3"), test_utils=("test_schema", "test_faketensor"))
