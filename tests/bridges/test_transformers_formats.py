"""Every method in from_pretrained, in a process that imports nothing of qplug: log-probabilities against a dequantized copy in transformers.

Activations are at 16 bit for that, because float32 logits do not tell a right activation quantizer from a wrong one. With quantized
activations the model is compared with the reference engine in bfloat16, which test_oracles.py holds against the producers' own logits.
Each comparison has a contrast.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", "5.23")
pytest.importorskip("accelerate")  # transformers asks for it where a GGUF file is read.

import qplug_core
from qplug_core.bridges.transformers import hook
from qplug_core.testing.dequantized import save_dequantized

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import proof
from conftest import make_model, oracles
from made_by_hand import READ_ONLY, gguf

WRITTEN = {
    "awq": "W4A16_g64_asym",
    "bitsandbytes": "WNF4A16_g64",
    "blockwise_int8": "W8A8_b128x128",
    "compressed_tensors": "W4A16_g32",
    "fastdeploy": "W8A16",
    "fastdeploy_fp8": "Wfp8Afp8_b128x128",
    "fbgemm_fp8": "Wfp8Afp8",
    "fp8": "Wfp8Afp8_b128x128",
    "gptq": "W3A16_g32_asym",
    "hqq": "W4A16_g64_asym",
    "int8": "W8A8",
    "marlin": "W4A16_g128",
    "modelopt": "Wnvfp4A16",
    "mxfp4": "Wmxfp4A16",
    "mxfp8": "Wmxfp8A16",
    "nvfp4": "Wnvfp4A16",
    "omni_quant": "W8A8",
    "ptpc_fp8": "Wfp8Afp8",
    "quanto": "W8A16",
    "quark": "Wfp8Afp8_tensor_a:tensor",
    "smooth_quant": "W8A8",
    "torchao": "W8A16",
    "w8a8_int8": "W8A8",
}
"""Formats that `qplug quantize` writes, each with a scheme."""
BLOCKS = {
    "gguf Q4_0": "Q4_0",
    "gguf Q8_0": "Q8_0",
    "gguf-k Q4_K": "Q4_K",
    "gguf-k Q6_K": "Q6_K",
    "gguf-grid IQ2_XS": "IQ2_XS",
}
ROUND = ("llmcompressor", "bitsandbytes", "torchao", "autoawq", "gguf")
"""Tools whose reference rounds each dequantized weight to 16 bit: a copy that does not is made here."""
SKIPPED = ("base-", "qwen2-transformers-fp8block-ragged-garbage", "llmcompressor-kvfp8-only")
"""What has no quantized weights, and a file that its producer spoiled, which test_transformers.py shows to be refused."""
ORACLES = [folder for folder in oracles() if not folder.name.startswith(SKIPPED)]
NOT_RUN = (
    "GPUs",
    "FSDP, pipeline and expert parallelism, which are refused",
    "other files than one GGUF file or safetensors",
)
IDS = (torch.arange(24)[None] * 7 % 95 + 1).tolist()
MADE = [*WRITTEN, *READ_ONLY, *BLOCKS]


def environment(site: Path) -> dict[str, str]:
    """Of a process that finds qplug as one does where the wheel is installed."""
    shutil.copy(hook.__file__, site / f"{hook.HOOK}.py")
    # The sitecustomize of this process alone does what a .pth in site-packages does.
    (site / "sitecustomize.py").write_text(f"import {hook.HOOK}\n")
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("QPLUG_TRANSFORMERS", None)
    return env


def run(place: Path, jobs: dict) -> dict:
    """Results of transformers_jobs.py by name, and what the process said under ``log``."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "jobs.json").write_text(json.dumps(list(jobs.values()), default=str))
    script = Path(__file__).with_name("transformers_jobs.py")
    command = [sys.executable, str(script), str(place / "jobs.json"), str(place / "results.pt")]
    done = subprocess.run(command, env=environment(place), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return {**dict(zip(jobs, torch.load(place / "results.pt"), strict=True)), "log": {"text": done.stderr}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("formats")


@pytest.fixture(scope="module")
def models(place):
    sizes = {"vocab_size": 304, "head_dim": 64, "hidden_size": 256, "intermediate_size": 512}
    moe = {"hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}
    return {
        "base": make_model(place / "base", **sizes),
        "moe": make_model(place / "moe", "qwen3_moe", **{**sizes, **moe}),
    }


@dataclass
class Case:
    """A checkpoint with what it is held against: folders of a right and a wrong copy, or the numbers of a tool in ``ref``."""

    method: str
    folder: Path
    right: Path | None
    wrong: Path | None = None
    ref: Path | None = None

    @property
    def file(self) -> dict[str, str]:
        return {"gguf_file": "model.gguf"} if (self.folder / "model.gguf").exists() else {}

    @property
    def hidden(self) -> bool:
        """True for an encoder, whose output is no logits."""
        return self.folder.name.startswith("bert")

    @property
    def ids(self) -> list[list[int]]:
        return IDS if self.ref is None else load_file(self.ref)["input_ids"].tolist()

    def stored(self, name: str) -> torch.Tensor:
        """The output of a tool's model, as ref.safetensors has it."""
        kind = "last_hidden_state" if self.hidden else "logits"
        return self.read(load_file(self.ref)[f"{kind}_{name}_fp32"].float())

    def read(self, out: torch.Tensor) -> torch.Tensor:
        return out if self.hidden else torch.log_softmax(out, dim=-1)


def cases(place: Path, models: dict[str, Path]) -> dict[str, Case]:
    """Every checkpoint, made or copied."""
    found = {}
    for folder in ORACLES:
        alone = place / "oracles" / folder.name
        shutil.copytree(folder, alone, ignore=shutil.ignore_patterns("ref.safetensors", "NOTE.json"))
        rounds = any(tool in folder.name for tool in ROUND) and not (folder / "model.gguf").exists()
        # A GGUF folder has no safetensors to ask; 2:4 is a format that the one of the config hands layers to.
        named = {"gguf": "gguf", "sparse24": "compressed_tensors.sparse24"}
        method = next((m for word, m in named.items() if word in folder.name), None) or proof.method_of(folder)
        found[folder.name] = Case(method, alone, copy(alone) if rounds else None, ref=folder / "ref.safetensors")
    for fmt, scheme in WRITTEN.items():
        qplug_core.quantize(models["base"], place / fmt, scheme=scheme, format=fmt)
        found[fmt] = Case(fmt, place / fmt, copy(place / fmt), models["base"])
    for fmt, (make, which) in READ_ONLY.items():
        folder = make(models[which], place / fmt)
        found[fmt] = Case(fmt, folder, folder.with_name(f"{fmt}-copy"), models[which])
    for name, types in BLOCKS.items():
        folder = gguf("llama", types, place / types)
        other = place / f"{'Q8_0' if types == 'Q4_0' else 'Q4_0'}-copy"
        found[name] = Case(name.split()[0], folder, folder.with_name(f"{types}-copy"), other)
    return found


def copy(folder: Path) -> Path:
    """A dequantized copy that transformers reads: of Mixtral it knows the first names alone."""
    out = save_dequantized(folder, folder.with_name(f"{folder.name}-copy"))
    if "mixtral" in folder.name:
        tensors = load_file(out / "model.safetensors")
        for new, old in {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.items():
            tensors = {name.replace(f"{old}.weight", f"{new}.weight"): t for name, t in tensors.items()}
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.fixture(scope="module")
def served(place, models):
    """One process for all. Of each checkpoint: ``bare`` is what a user writes, the others are for a comparison."""
    found, jobs = cases(place, models), {}
    for name, case in found.items():
        job = {"ids": case.ids, "auto": "AutoModel" if case.hidden else "AutoModelForCausalLM"}
        options, plain = {"dtype": "float32", **case.file}, {"dtype": "float32"}
        saved = {} if case.file else {"save": place / "saved" / name}
        jobs[name, "bare"] = {**job, "model": case.folder, "options": options, **saved}
        jobs[name, "weights"] = {**job, "model": case.folder, "options": options, "qplug": {"activations": "16bit"}}
        native = {**options, "dtype": "bfloat16"}
        jobs[name, "native"] = {**job, "model": case.folder, "options": native, "qplug": {"kernels": "reference"}}
        jobs |= {
            (name, w): {**job, "model": f, "options": plain} for w, f in (("right", case.right), ("wrong", case.wrong)) if f
        }
    return found, run(place / "first", jobs)


def output(served, name: str, what: str) -> torch.Tensor:
    found, results = served
    result = results[name, what]
    assert "error" not in result, result["error"]
    return found[name].read(result["out"])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def row(capsys, text: str) -> None:
    with capsys.disabled():
        print(f"\n{text}", end="")


NAMES = [*(folder.name for folder in ORACLES), *MADE]


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_its_dequantized_copy(served, name, capsys, request):
    case = served[0][name]
    layers = served[1][name, "bare"].get("layers", {})
    assert output(served, name, "bare").isfinite().all()
    right = output(served, name, "right") if case.right else case.stored("dequant")
    wrong = output(served, name, "wrong") if case.wrong else case.stored("unquantized")
    error, contrast = distance(output(served, name, "weights"), right), distance(wrong, right)
    row(capsys, f"{case.method:20} {name:52} {error:.1e}  contrast {contrast:.1e}  {layers}")
    assert error < 1e-4
    assert contrast > 100 * error
    assert contrast > 1e-2
    assert layers
    proof.record(
        "transformers", version("transformers"), case.method, f"checkpoint {name}", request.node.nodeid, error, contrast
    )


@pytest.mark.parametrize("name", NAMES)
def test_quantized_activations_are_those_of_the_reference_engine(served, name, capsys, request):
    case = served[0][name]
    engine = qplug_core.load(case.folder, dtype="bfloat16", kernels="reference", kv_cache="16bit")
    if not any(s.scheme and s.scheme.act for d in engine.plan.decisions for s in d.segments):
        return
    ids = torch.tensor(case.ids)
    with torch.inference_mode():
        right = case.read(engine.forward(input_ids=ids).last_hidden_state.float() if case.hidden else engine.logits(ids))
        without = qplug_core.load(case.folder, dtype="bfloat16", kernels="reference", activations="16bit", kv_cache="16bit")
        wrong = case.read(without.forward(input_ids=ids).last_hidden_state.float() if case.hidden else without.logits(ids))
    error, contrast = distance(output(served, name, "native"), right), distance(wrong, right)
    row(capsys, f"{case.method:20} {name:52} {error:.1e}  contrast {contrast:.1e}")
    assert error == 0
    assert contrast > 1e-3
    proof.record(
        "transformers", version("transformers"), case.method, f"activations {name}", request.node.nodeid, error, contrast
    )


@pytest.mark.parametrize("name", [name for name in NAMES if "gguf" not in name])
def test_saved_and_loaded_again_is_bit_equal(served, name):
    first = served[1][name, "bare"]
    assert first["again"]["layers"] == first["layers"]
    assert torch.equal(first["again"]["out"], first["out"])


def test_what_was_run_and_what_was_not(served):
    proof.record_limits("transformers", version("transformers"), "x86 CPU, float32 and bfloat16", NOT_RUN)
    assert "qplug serves gptq: " in served[1]["log"]["text"]
