"""The hardware tables of RTP-LLM, TensorRT-LLM, FastDeploy and llm-compressor against ``qplug list-methods``.

Every cell of those tables is a line here. Where qplug does what the table says, the cell is native, weight-only or emulated. Where it
differs, the reason has to stand in :data:`SLOWER` or :data:`BROADER`, and is checked to be still true.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from qplug_core.device import Device
from qplug_core.errors import DeviceError
from qplug_core.kv import kv_scheme
from qplug_core.matrix import scheme_cell
from qplug_core.registry import get_registry
from qplug_core.scheme import QuantScheme

SCHEMES = {
    "Int8WeightOnly": "W8A16", "Int8W8A8": "W8A8", "BlockWiseFp8": "Wfp8Afp8_b128x128", "PerTensorFp8": "Wfp8Afp8_tensor_static",
    "INT4": "W4A16_g128", "PTPC": "Wfp8Afp8", "NVFP4": "Wnvfp4Anvfp4", "MXFP4": "Wmxfp4A16", "FP8 tensor": "Wfp8Afp8_tensor_static",
    "FP8 block": "Wfp8Afp8_b128x128", "FP8 rowwise": "Wfp8Afp8", "W4A8 AWQ": "W4Afp8_g128_static", "W4A16 AWQ": "W4A16_g128_asym",
    "W4A8 GPTQ": "W4Afp8_g128", "W4A16 GPTQ": "W4A16_g128_actorder", "WINT8": "W8A16", "WINT4": "W4A16_channel",
    "block FP8": "Wfp8Afp8_b128x128", "WINT2": "Wccq2A16", "W8A8-INT8": "W8A8", "FP8": "Wfp8Afp8", "2:4 FP8": "Wfp8Afp8_2:4",
}  # fmt: skip
"""What each word of the tables means in numbers."""
PARTS = {"MixQuant": (("linear", "WINT8"), ("experts", "WINT4")), "WINT2": (("linear", "WINT8"), ("experts", "WINT2"))}
"""Rows of several schemes by kind of layer, as FastDeploy dispatches; a cell is as good as its worst part."""

RTP = ("Int8WeightOnly", "Int8W8A8", "BlockWiseFp8", "PerTensorFp8", "INT4", "PTPC")
CUDA, AMD = "sm_90", "gfx942"
TABLES: dict[tuple[str, str], set[str]] = {
    ("RTP-LLM", CUDA): {"Int8WeightOnly", "Int8W8A8", "BlockWiseFp8", "PerTensorFp8", "INT4"},
    ("RTP-LLM", AMD): {"Int8W8A8", "BlockWiseFp8", "PerTensorFp8", "INT4", "PTPC"},
    ("TensorRT-LLM", "sm_120"): {"NVFP4", "MXFP4", "FP8 tensor", "FP8 KV"},
    ("TensorRT-LLM", "sm_100"): {"NVFP4", "MXFP4", "FP8 tensor", "FP8 block", "FP8 KV"},
    ("TensorRT-LLM", "sm_90"): {
        "FP8 tensor", "FP8 block", "FP8 rowwise", "FP8 KV", "W4A8 AWQ", "W4A16 AWQ", "W4A8 GPTQ", "W4A16 GPTQ",
    },
    ("TensorRT-LLM", "sm_89"): {"FP8 tensor", "FP8 KV", "W4A8 AWQ", "W4A16 AWQ", "W4A8 GPTQ", "W4A16 GPTQ"},
    ("TensorRT-LLM", "sm_80"): {"FP8 KV", "W4A16 AWQ", "W4A16 GPTQ"},
    ("FastDeploy", "sm_90"): {"WINT8", "WINT4", "block FP8", "WINT2", "MixQuant"},
    ("llm-compressor", "sm_75"): {"W8A8-INT8"},
    ("llm-compressor", "sm_80"): {"W8A8-INT8"},
    ("llm-compressor", "sm_90"): {"FP8", "2:4 FP8"},
}  # fmt: skip
ROWS = {
    "RTP-LLM": RTP,
    "TensorRT-LLM": (
        "NVFP4", "MXFP4", "FP8 tensor", "FP8 block", "FP8 rowwise", "FP8 KV", "W4A8 AWQ", "W4A16 AWQ", "W4A8 GPTQ", "W4A16 GPTQ",
    ),
    "FastDeploy": ("WINT8", "WINT4", "block FP8", "WINT2", "MixQuant"),
    "llm-compressor": ("W8A8-INT8", "FP8", "2:4 FP8"),
}  # fmt: skip
CELLS = [(engine, device, row) for engine, device in TABLES for row in ROWS[engine]]


def parts(row: str):
    """Operations and schemes of one row."""
    if row == "FP8 KV":
        return [("kv_cache", QuantScheme(kv=kv_scheme("fp8")))]
    named = PARTS.get(row, (("linear", row),))
    return [(op, QuantScheme.parse(SCHEMES[name])) for op, name in named]


def cell(device: str, row: str):
    """The worst cell of a row's parts."""
    found = [scheme_cell(get_registry(), scheme, op, Device.from_name(device), device) for op, scheme in parts(row)]
    return max(found, key=lambda c: ("native", "weight-only", "emulated", "reference", "no").index(c.status))


XPU = ("WINT8", "WINT4", "MixQuant")
"""Rows that FastDeploy has for XPU too."""
CODED = "keys and values take a byte each and are coded by torch's own operations; no kernel reads them inside of attention"
SLOWER = {
    **{("FP8 KV", device): CODED for device in ("sm_120", "sm_100", "sm_90", "sm_89", "sm_80")},
    ("W8A8-INT8", "sm_75"): "the Triton that compiles these kernels starts at sm_80",
}
"""Cells (row, device) that a table has and qplug runs on the reference kernel only, with the reason."""

BROADER = {
    "RTP-LLM": "its table lists what its own build ships for a vendor; the Triton kernels compile for both",
    "TensorRT-LLM": "its table lists what its kernels ship for; a weight-only product needs no unit of that type",
    "FastDeploy": "",
    "llm-compressor": "it recommends one scheme for a card, and does not say that others do not run",
}
"""Why qplug may run fast what a table leaves out."""

FAST = ("native", "weight-only", "emulated")


@pytest.mark.parametrize(("engine", "device", "row"), CELLS)
def test_a_cell_does_what_the_table_says_or_says_why_not(engine, device, row):
    found, listed = cell(device, row), row in TABLES[engine, device]
    assert found.status in (*FAST, "reference")
    if listed and found.status == "reference":
        assert SLOWER.get((row, device)), f"{row} on {device} is in the table of {engine}; here: {found.reason}"
        assert found.reason
    if not listed and found.status in FAST:
        assert BROADER[engine]


def test_reasons_that_no_longer_hold_are_removed():
    stale = [key for key in SLOWER if cell(key[1], key[0]).status != "reference"]
    assert not stale


@pytest.mark.parametrize(("engine", "device", "row"), CELLS)
def test_a_cell_claims_no_more_than_its_proof(engine, device, row):
    """Compiled and measured stand in the proof file of the kernel's own package, for this device, and nowhere else."""
    found = cell(device, row)
    entry = next(e for e in get_registry().kernels if e.decl.name == found.kernel)
    spec = find_spec(entry.plugin.module.partition(".")[0] if entry.plugin.module else "qplug_core")
    path = Path(next(iter(spec.submodule_search_locations))) / "proof.json"
    proven = json.loads(path.read_text())["kernels"].get(found.kernel, {}) if path.exists() else {}
    arch = Device.from_name(device).arch
    assert found.proof == proven.get(device, proven.get(arch, {})).get("status", "declared")
    assert found.proof != "measured" or Device.from_name(device).vendor == "cpu", "no GPU was measured yet"


def test_the_tables_have_every_cell():
    """RTP-LLM 2 x 6, TensorRT-LLM 5 x 10, FastDeploy's GPU column, llm-compressor's two recommendations; ticks counted by hand."""
    count = {engine: sum(e == engine for e, _, _ in CELLS) for engine in ROWS}
    assert count == {"RTP-LLM": 12, "TensorRT-LLM": 50, "FastDeploy": 5, "llm-compressor": 9}
    ticks = {engine: sum(len(rows) for (e, _), rows in TABLES.items() if e == engine) for engine in ROWS}
    assert ticks == {"RTP-LLM": 10, "TensorRT-LLM": 26, "FastDeploy": 5, "llm-compressor": 4}
    assert all(rows <= set(ROWS[engine]) for (engine, _), rows in TABLES.items())


def test_xpu_is_no_device_here_and_is_said():
    """FastDeploy's XPU column differs for one reason: there is no such device, and no row claims one."""
    with pytest.raises(DeviceError, match="'xpu' is unknown"):
        Device.from_name("xpu")
    assert set(XPU) <= TABLES["FastDeploy", "sm_90"]
    assert not [e.decl.name for e in get_registry().kernels if any("xpu" in device for device in e.decl.devices)]


def test_below_the_first_card_of_fp8_int8_is_what_computes():
    """llm-compressor recommends INT8 where there is no FP8 unit: there FP8 is decoded, and is not native."""
    for device in ("sm_75", "sm_80"):
        assert cell(device, "FP8").status != "native"
    assert cell("sm_80", "W8A8-INT8").status == "native"
    assert cell("sm_90", "FP8").status == "native"
