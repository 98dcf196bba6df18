"""GPTQ checkpoints of real tools give the logits of an independent unpacker, and wrong ones do not."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qplug_core

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import DATA, oracles


def is_gptq(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    return config.get("quant_method") == "gptq"


def error(folder: Path, reference: Path, **options) -> float:
    ref = load_file(reference / "ref.safetensors")
    logits = qplug_core.load(folder, dtype="float32", **options).logits(ref["input_ids"])
    expected = ref["logits_dequant_fp32"]
    return float((logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("folder", [f for f in oracles() if is_gptq(f)], ids=lambda f: f.name)
def test_logits(folder, capsys):
    exact, fast = error(folder, folder, kernels="reference"), error(folder, folder)
    ref = load_file(folder / "ref.safetensors")
    contrast = ref["logits_unquantized_fp32"] - ref["logits_dequant_fp32"]
    distance = float(contrast.norm() / ref["logits_dequant_fp32"].norm())
    with capsys.disabled():
        print(f"\n{folder.name:45} reference {exact:.1e}  kernels {fast:.1e}  unquantized model {distance:.1e}")
    assert exact < 1e-6
    assert fast < 1e-5
    assert distance > 1e-2


def spoil(folder: Path, out: Path, suffix: str, change) -> Path:
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    changed = {n: change(t) if n.endswith(suffix) else t for n, t in tensors.items()}
    save_file({n: t.contiguous() for n, t in changed.items()}, out / "model.safetensors")
    return out


def test_an_ignored_act_order_is_garbage(tmp_path):
    folder = DATA / "gptqmodel-w4-g128-sym-descact"
    wrong = spoil(folder, tmp_path / "wrong", ".g_idx", lambda t: (torch.arange(len(t)) // 128).int())
    assert error(wrong, folder) > 0.05


def test_swapped_nibbles_are_garbage(tmp_path):
    folder = DATA / "gptqmodel-w4-g128-sym-descact"
    wrong = spoil(folder, tmp_path / "wrong", ".qweight", lambda t: ((t & 0x0F0F0F0F) << 4) | ((t >> 4) & 0x0F0F0F0F))
    assert error(wrong, folder) > 0.05


def test_a_zero_point_off_by_one_is_refused_or_garbage(tmp_path):
    """vLLM issues 26343 and 14126: v2 zero points that are called v1 gave "!!!!"."""
    folder = DATA / "gptqmodel-w4-g128-sym-descact"
    wrong = spoil(folder, tmp_path / "wrong", ".qzeros", lambda t: t + 0x11111111)
    with pytest.raises(qplug_core.errors.DecodeError, match="gptq_v2"):
        qplug_core.load(wrong, dtype="float32")
