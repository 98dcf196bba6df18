"""PTPC FP8: as a checkpoint, also in e4m3fnuz, and at load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qplug_rocm.ptpc import PTPCFormat, PTPCFp8

from qplug_core.config import LayerQuant, ModuleName
from qplug_core.errors import CannotEncode, ConfigError, DecodeError, SchemeError
from qplug_core.scheme import QuantScheme
from qplug_core.source import MemorySource, Source
from qplug_core.testing import random_weight

FORMAT = PTPCFormat()
PTPC = QuantScheme.parse("Wfp8Afp8")
FNUZ = LayerQuant(PTPC, "ptpc_fp8", (("fmt", "e4m3fnuz"),))


def source(raw: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Source:
    return Source(
        Path("memory"), {}, {"quant_method": "ptpc_fp8", **raw}, "config.json", {}, MemorySource(tensors or {}).tensors, {}
    )


@pytest.mark.parametrize("kind", [torch.float8_e4m3fnuz, torch.float8_e4m3fn, torch.uint8, torch.int8])
def test_e4m3fnuz_file_keeps_its_values(kind: torch.dtype) -> None:
    data = torch.randint(0x10, 0x7F, (8, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data[2, 5], data[3, 1] = 0x7F, 0x00
    scales = torch.rand(8, 1, generator=torch.Generator().manual_seed(1))
    weight = FORMAT.decode({"weight": data.view(kind), "weight_scale": scales}, FNUZ, 8, 32)
    assert weight.codes.dtype == torch.float8_e4m3fn
    assert torch.equal(weight.dequantize(), data.view(torch.float8_e4m3fnuz).float() * scales)
    wrong = FORMAT.decode(
        {"weight": data.view(torch.float8_e4m3fn), "weight_scale": scales}, LayerQuant(PTPC, "ptpc_fp8"), 8, 32
    )
    assert torch.equal(wrong.dequantize()[0], weight.dequantize()[0] * 2)


def test_fnuz_is_seen_in_the_headers() -> None:
    tensors = {"m.weight": torch.zeros(4, 4).to(torch.float8_e4m3fnuz), "m.weight_scale": torch.ones(4, 1)}
    parsed = FORMAT.parse(source({}, tensors))
    assert parsed.quant_for(ModuleName(("m",))) == FNUZ
    assert parsed.inferred
    assert FORMAT.parse(source({"fmt": "e4m3fnuz"})).quant_for(ModuleName(("m",))) == FNUZ
    stored = MemorySource(tensors)
    assert all(stored.tensors[f"m.{t.name}"].dtype in t.dtypes for t in FORMAT.tensors(FNUZ))


def test_nan_scales_are_refused() -> None:
    stored = FORMAT.encode(random_weight(PTPC, 4, 8), LayerQuant(PTPC, "ptpc_fp8"))
    stored["weight_scale"][2] = float("nan")
    with pytest.raises(DecodeError, match="NaN"):
        FORMAT.decode(stored, LayerQuant(PTPC, "ptpc_fp8"), 4, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation_scheme": "static"}, "static"),
        ({"fmt": "e5m2"}, "e5m2"),
        ({"surprise": 1}, "'surprise'"),
        ({"ignored_layers": "x"}, "a list"),
    ],
)
def test_config_that_is_not_understood_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FORMAT.parse(source(change))


def test_ignored_layers_are_whole_names() -> None:
    parsed = FORMAT.parse(source({"ignored_layers": ["model.layers.0.mlp.gate"]}))
    assert parsed.quant_for(ModuleName(("model.layers.0.mlp.gate",))) is None
    assert parsed.quant_for(ModuleName(("model.layers.0.mlp.gate_proj",))) is not None
    assert parsed.quant_for(ModuleName(("lm_head",))) is None


def test_e4m3fnuz_is_not_written() -> None:
    with pytest.raises(CannotEncode, match="every device reads e4m3fn"):
        FORMAT.encode(random_weight(PTPC, 4, 8), FNUZ)


def test_at_load() -> None:
    weight = torch.tensor([[448.0, -1.0, 0.5], [1e-6, 0.0, -1e-6]])
    found = PTPCFp8().quantize(weight, PTPC)
    assert found.scales[:, 0].tolist() == pytest.approx([1.0, 1e-4 / 448])
    assert found.codes.float()[0].tolist() == [448.0, -1.0, 0.5]
    assert float((found.dequantize()[1] - weight[1]).abs().max()) < 1e-7
    with pytest.raises(SchemeError, match="makes Wfp8Afp8"):
        PTPCFp8().quantize(weight, QuantScheme.parse("W8A8"))
