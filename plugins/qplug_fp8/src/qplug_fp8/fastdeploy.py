"""FastDeploy's block-wise FP8, stored in Paddle's orientation.

============ ============================== ================== =========================================================
quant_weight [K, N]                         int8, uint8, e4m3  bytes of e4m3 codes
weight_scale [ceil(K/bk), ceil(N/bn)]       float              amax / 448 of each block
============ ============================== ================== =========================================================

The config is ``{"quantization": "block_wise_fp8", "is_quantized": true, "weight_block_size": [128, 128]}``. Its two other FP8
methods are no storage formats that can be read: ``wfp8afp8`` is quantization at load, and ``tensor_wise_fp8`` multiplies weights
that were rotated, which needs the same rotation of every activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qplug_core import paddle
from qplug_core.axes import FLOATS, StoredTensor
from qplug_core.config import LayerQuant, QuantizationConfig, Rule
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.format import CheckpointFormat
from qplug_core.keys import check_keys
from qplug_core.match import Matcher
from qplug_core.packing import transposed
from qplug_core.scheme import QuantScheme, TensorQuant
from qplug_core.weight import OpaqueWeight, QuantWeight

from .config import Said, _activation, _said
from .headers import ModuleSet
from .layouts import LAYOUTS
from .loader import affine, storable

if TYPE_CHECKING:
    from qplug_core.source import Source

KEYS = {"quantization", "quant_method", "is_quantized", "weight_block_size"}
ONLINE = {"wfp8afp8": "Wfp8Afp8", "block_wise_fp8": "Wfp8Afp8_b128x128"}


class FastDeployFP8Format(CheckpointFormat):
    """One layout, ``fastdeploy_fp8``."""

    name = "fastdeploy_fp8"

    def parse(self, source: Source) -> QuantizationConfig:
        """FastDeploy has no list of names: what has a ``quant_weight`` is quantized.

        :raises ConfigError: for methods and keys that are not understood, and for configs that ask for quantization at load.
        """
        raw = source.quant_config or {}
        method = str(raw.get("quantization") or raw.get("quant_method")).lower()
        check_keys(raw, KEYS, f"the {method} config", "qplug-fp8")
        if method == "tensor_wise_fp8":
            raise ConfigError(
                "the config says quantization: tensor_wise_fp8, whose weights were rotated by a Hadamard matrix that FastDeploy "
                "also applies to activations; no other engine does, so quantize the original model"
            )
        modules = [name.removesuffix(".quant_weight") for name in source.tensors if name.endswith(".quant_weight")]
        if method == "wfp8afp8" or raw.get("is_quantized") is False or (source.tensors and not modules):
            raise ConfigError(
                f"the config says quantization: {method} and the file holds no such weights, which asks FastDeploy to quantize at "
                f"load; remove the config and load with quantize={ONLINE[method]!r}"
            )
        block = _said({"weight_block_size": raw.get("weight_block_size") or [128, 128]}).block
        assert block is not None
        quant = LayerQuant(QuantScheme(TensorQuant("fp8_e4m3", block), _activation(Said(block=block), False)), self.name)
        rules = [Rule(Matcher("Embedding", "class"), None, implicit=True, origin="FastDeploy quantizes linear layers")]
        if modules:
            rules.append(Rule(ModuleSet.of(modules), quant, implicit=True, origin="modules with a quant_weight"))
        else:
            rules.append(Rule(Matcher("lm_head", "suffix"), None, implicit=True, origin="FastDeploy leaves lm_head alone"))
            rules.append(Rule(Matcher("", "all"), quant, origin="quantization"))
        inferred = (
            [] if raw.get("weight_block_size") else ["weight_block_size is not said: [128, 128], FastDeploy's default"]
        )
        inferred += [said for said in [paddle.orient(source)] if said]
        return QuantizationConfig(method, rules, inferred=inferred)

    def model_name(self, stored: str) -> str:
        """See :func:`qplug_core.paddle.model_name`."""
        return paddle.model_name(stored)

    def tensors(self, quant: LayerQuant) -> tuple[StoredTensor, ...]:
        """The two tensors of the table above."""
        part = quant.scheme.weight
        assert part is not None, "a layer that stays 16 bit has no FP8 tensors"
        bn, bk = part.block
        return (
            StoredTensor("quant_weight", ("K", "N"), ("I8", "U8", "F8_E4M3")),
            StoredTensor("weight_scale", (f"ceil(K/{bk})", f"ceil(N/{bn})"), FLOATS),
        )

    def decode(self, tensors: Mapping[str, Tensor], quant: LayerQuant, n: int, k: int) -> QuantWeight:
        """Codes ``[N, K]`` and scales ``[ceil(N/bn), ceil(K/bk)]``.

        :raises DecodeError: as :func:`qplug_fp8.loader.affine`.
        """
        codes = transposed(tensors["quant_weight"].view(torch.uint8)).view(torch.float8_e4m3fn)
        return affine(quant, codes, transposed(tensors["weight_scale"]), None)

    def encode(self, weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> dict[str, Tensor]:
        """The inverse of :meth:`decode`; codes as int8, because Paddle has no safetensors dtype for e4m3.

        :raises CannotEncode: for anything but e4m3 by block with dynamic activations.
        """
        weight = _block_wise(weight, quant)
        codes = transposed(weight.codes.view(torch.uint8)).view(torch.int8)
        return {"quant_weight": codes, "weight_scale": transposed(weight.scales)}

    def quant_for_scheme(self, weight: QuantWeight | OpaqueWeight) -> LayerQuant:
        """The one layout.

        :raises CannotEncode: as :meth:`encode`.
        """
        quant = LayerQuant(weight.scheme, self.name)
        _block_wise(weight, quant)
        return quant

    def quantization_config(self, layers: Mapping[str, LayerQuant | None]) -> dict[str, Any]:
        """The block; names are not said, because FastDeploy reads none.

        :raises CannotEncode: where no layer is quantized, or blocks differ.
        """
        blocks = {
            quant.scheme.weight.block for quant in layers.values() if quant is not None and quant.scheme.weight is not None
        }
        if len(blocks) != 1:
            what = "no layer is quantized" if not blocks else "layers have different blocks"
            raise CannotEncode(f"{what}; a block_wise_fp8 config has one block for all, so choose another format")
        return {"quantization": "block_wise_fp8", "is_quantized": True, "weight_block_size": list(blocks.pop())}


def _block_wise(weight: QuantWeight | OpaqueWeight, quant: LayerQuant) -> QuantWeight:
    checked = storable(weight, quant, LAYOUTS["fastdeploy_fp8"])
    part, act = checked.scheme.weight, checked.scheme.act
    assert part is not None
    if part.dtype != "fp8_e4m3" or part.scale_dtype != "float" or act != _activation(Said(block=part.block), False):
        raise CannotEncode(
            f"scheme {checked.scheme} was given; block_wise_fp8 stores e4m3 by block with float scales and dynamic activations by "
            "the block's columns, so choose another format"
        )
    return checked
