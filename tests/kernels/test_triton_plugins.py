"""Every Triton kernel that an installed plugin declares: it takes what it declares, and its product is right."""

from __future__ import annotations

import pytest
import torch

from qplug_core.decl import KernelDecl
from qplug_core.device import Device
from qplug_core.kernel import Kernel, problem_of
from qplug_core.reference.activation import quantize_activation
from qplug_core.registry import get_registry
from qplug_core.samples import schemes_of
from qplug_core.testing.base import load
from qplug_core.testing.compile_cells import TARGETS
from qplug_core.testing.interpreter import need_interpreter
from qplug_core.testing.weights import random_weight

need_interpreter()

DECLARED = [e.decl for e in get_registry().kernels if any(text.startswith("triton") for text in e.decl.requires)]


def test_there_are_kernels() -> None:
    assert DECLARED, "no installed plugin declares a Triton kernel"


@pytest.mark.parametrize("decl", DECLARED, ids=lambda decl: decl.name)
def test_every_declared_scheme_is_taken_on_every_declared_device_and_right(decl: KernelDecl) -> None:
    kernel: Kernel = load(decl.impl)
    assert kernel.name == decl.name
    devices = [Device.from_name(name) for name in TARGETS if Device.from_name(name).matches_any(decl.devices)]
    assert devices
    for seed, scheme in enumerate(schemes_of(decl.schemes)):
        if scheme.weight is not None and scheme.weight.dtype == "ccq2":
            continue  # Random codes are no such weight: test_triton_wint2.py has some.
        weight = random_weight(scheme, 40, 256, torch.Generator().manual_seed(seed))
        for device, op, dtype in ((d, o, t) for d in devices for o in decl.ops for t in decl.dtypes):
            assert kernel.supports(problem_of(weight, op, dtype), device) == []
        x = torch.randn(3, 256, generator=torch.Generator().manual_seed(seed)).half()
        values, act = x.float(), scheme.act
        if act is not None and decl.mode != "weight-only":
            values = quantize_activation(values, act, weight.act_scale, weight.act_zero, weight.act_div).dequantize(
                torch.float32
            )
        expected = values.double() @ weight.dequantize().double().t()
        y = kernel.apply(x, kernel.pack(weight)).double()
        assert float((y - expected).norm() / expected.norm()) < 1e-3, f"{decl.name} {scheme}"
