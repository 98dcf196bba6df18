"""quantize_module(): one ``nn.Linear`` as a fast quantized module, for people who have no checkpoint and no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .aliases import online_schemes
from .device import Device
from .engine.engine import DTYPES
from .engine.modules import QuantLinear
from .errors import CheckpointError, UsageError
from .layer import LayerSpec
from .method import HubMethod
from .planner import Planner
from .registry import Registry
from .resolve import Policy
from .scheme import QuantScheme
from .source import MemorySource, Source

NAME = "linear"


class QuantModule(QuantLinear):
    """A linear layer with the packed weight of one kernel. Its state holds that weight: ``packed_*`` beside ``bias``.

    ``decision``: the kernel, and why each other one was not taken.
    """

    method: HubMethod

    def __init__(self, method: HubMethod, bias: nn.Parameter | None) -> None:
        super().__init__(method, bias)
        # The tensors in use, not copies: load_state_dict fills what the kernel multiplies with.
        for name, tensor in method.tensors().items():
            self.register_buffer(f"packed_{name.replace('.', '_')}", tensor)
        self.register_load_state_dict_pre_hook(_check_state)  # type: ignore[no-untyped-call]

    @property
    def decision(self) -> Any:
        """See :class:`~qplug_core.quant_plan.Decision`."""
        return self.method.decision

    def get_extra_state(self) -> dict[str, str]:
        """What the packed tensors are tensors of."""
        return {"scheme": str(self.method.decision.segments[0].scheme), "kernel": self.method.kernels[0]}

    def set_extra_state(self, state: Any) -> None:
        """Nothing to set: the state was checked before anything was loaded."""


def _check_state(module: Any, state: Any, prefix: str, metadata: Any, *_: Any) -> None:
    """Refuse a state before any of it is loaded: packed weights of one kernel mean nothing to another."""
    own, given = module.get_extra_state(), state.get(f"{prefix}_extra_state", {})
    if given != own:
        raise CheckpointError(
            f"the state holds {given.get('scheme', '16 bit')} packed for {given.get('kernel', 'no kernel')} and this module is "
            f"{own['scheme']} packed for {own['kernel']}; quantize the 16-bit layer again, or with the scheme and pin= of the state"
        )
    if metadata.get("assign_to_params_buffers"):
        raise CheckpointError("load_state_dict(assign=True) would leave the old weight in use; leave assign out")


def quantize_module(
    linear: nn.Linear,
    scheme: str | QuantScheme,
    *,
    kernels: str = "auto",
    pin: str | None = None,
    forbid: Sequence[str] = (),
    activations: str = "quantized",
    registry: Registry | None = None,
) -> QuantModule:
    """The layer with its weight in ``scheme``, on the device and in the dtype of its weight; ``linear`` itself is not changed.

    scheme
        A scheme name, or an engine's word for one, as ``load(quantize=...)`` takes them.
    pin
        The name of the kernel to take.
    kernels, forbid, activations
        See :class:`~qplug_core.resolve.Policy`.

    :raises QplugError: for what is no plain linear layer, a scheme that needs calibration, or a kernel that does not take it.
    """
    weight = _weight(linear)
    dtype = str(weight.dtype).removeprefix("torch.")
    policy = Policy(kernels, {NAME: pin} if pin else {}, frozenset(forbid), activations)
    device = Device.cpu() if weight.device.type == "cpu" else Device.current()
    planner = Planner(_nothing(), device, dtype, policy, _linear_scheme(scheme), registry, assumed=True)
    n, k = weight.shape
    (decision,) = planner.plan([LayerSpec(NAME, "linear", n, k)], complete=False).decisions
    method = HubMethod(decision, planner.resolver, planner.layout, weight.dtype, weight.device)
    with torch.no_grad():
        method.load(MemorySource({f"{NAME}.weight": weight}))
    bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    module = QuantModule(method, bias)
    return module.train(linear.training)


def _weight(linear: Any) -> torch.Tensor:
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise UsageError(f"a {type(linear).__name__} was given; a torch.nn.Linear with its own forward is needed")
    weight = linear.weight.detach()
    if weight.is_meta:
        raise UsageError("the layer is on the meta device and has no values; load its weight first")
    if weight.dtype not in DTYPES.values():
        raise UsageError(f"the layer is {weight.dtype}; {', '.join(DTYPES)} are known, so convert it first")
    return weight


def _linear_scheme(scheme: str | QuantScheme) -> QuantScheme:
    found, _ = online_schemes(scheme)
    wanted = found.get("linear")
    if wanted is None or wanted.weight is None:
        raise UsageError(f"{scheme} says nothing of a linear layer's weight; name a scheme such as W4A16_g128")
    if wanted.kv is not None:
        raise UsageError(
            f"{scheme} quantizes a KV cache, which a linear layer has none of; leave it out, as in {replace(wanted, kv=None)}"
        )
    return wanted


def _nothing() -> Source:
    """A source of no file: the weight is in memory."""
    return Source(Path("memory"), {}, None, "", {}, {}, {})
