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
"""What each word of the tables means in numbers; MixQuant is WINT8, WINT4 and WINT2 by layer, FP8 KV is a cache."""

RTP = ("Int8WeightOnly", "Int8W8A8", "BlockWiseFp8", "PerTensorFp8", "INT4", "PTPC")
CUDA, AMD = "sm_90", "gfx942"
TABLES: dict[tuple[str, str], set[str]] = {
    ("RTP-LLM", CUDA): {"Int8WeightOnly", "Int8W8A8", "BlockWiseFp8", "PerTensorFp8", "INT4"},
    ("RTP-LLM", AMD): {"Int8W8A8", "BlockWiseFp8", "PerTensorFp8", "INT4", "PTPC"},
    ("TensorRT-LLM", "sm_120"): {"NVFP4", "MXFP4", "FP8 tensor"},
    ("TensorRT-LLM", "sm_100"): {"NVFP4", "MXFP4", "FP8 tensor", "FP8 block"},
    ("TensorRT-LLM", "sm_90"): {
        "FP8 tensor", "FP8 block", "FP8 rowwise", "W4A8 AWQ", "W4A16 AWQ", "W4A8 GPTQ", "W4A16 GPTQ",
    },
    ("TensorRT-LLM", "sm_89"): {"FP8 tensor", "W4A8 AWQ", "W4A16 AWQ", "W4A8 GPTQ", "W4A16 GPTQ"},
    ("TensorRT-LLM", "sm_80"): {"W4A16 AWQ", "W4A16 GPTQ"},
    ("FastDeploy", "sm_90"): {"WINT8", "WINT4", "block FP8", "WINT2"},
    ("llm-compressor", "sm_80"): {"W8A8-INT8"},
    ("llm-compressor", "sm_90"): {"FP8", "2:4 FP8"},
}  # fmt: skip
ROWS = {
    "RTP-LLM": RTP,
    "TensorRT-LLM": (
        "NVFP4", "MXFP4", "FP8 tensor", "FP8 block", "FP8 rowwise", "W4A8 AWQ", "W4A16 AWQ", "W4A8 GPTQ", "W4A16 GPTQ",
    ),
    "FastDeploy": ("WINT8", "WINT4", "block FP8", "WINT2"),
    "llm-compressor": ("W8A8-INT8", "FP8", "2:4 FP8"),
}  # fmt: skip
CELLS = [(engine, device, row) for engine, device in TABLES for row in ROWS[engine]]


def cell(device: str, row: str):
    return scheme_cell(get_registry(), QuantScheme.parse(SCHEMES[row]), "linear", Device.from_name(device), device)


MISSING = "qplug has no GPU kernel for it yet, and the reference kernel runs it slowly"
SLOWER = {
    ("W4A8 AWQ", "sm_90"): MISSING,
    ("W4A8 AWQ", "sm_89"): MISSING,
    ("W4A8 GPTQ", "sm_90"): MISSING,
    ("W4A8 GPTQ", "sm_89"): MISSING,
    ("WINT2", "sm_90"): MISSING,
    ("2:4 FP8", "sm_90"): "it is decoded to dense weights, and no GPU kernel declares them yet",
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


def test_fp8_caches_run_on_every_device_of_the_tables():
    scheme = QuantScheme(kv=kv_scheme("fp8"))
    for device in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120"):
        found = scheme_cell(get_registry(), scheme, "kv_cache", Device.from_name(device), device)
        assert found.status in (*FAST, "reference")
