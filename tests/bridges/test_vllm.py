"""The real vLLM serves qplug's checkpoints: log-probabilities of given tokens against a dequantized copy in the same engine.

Every number has a contrast: the same distance to wrong weights, which must be far. Models run one after the other in few processes
(vllm_jobs.py), because starting vLLM takes longer than the models. Set QPLUG_ORACLES to a folder of checkpoints for the longer table.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="tox run -e vllm")

import torch
from safetensors.torch import load_file, save_file

import qplug_core
from qplug_core.testing.dequantized import save_dequantized

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import DATA, make_model, oracles
from made import make, scaled

DEMO = Path(qplug_core.__file__).parent / "demo"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
EXACT = 2e-4
"""Mean distance in float32 that rounding explains: sums in another order. The contrasts are at least 50 times as far."""
SIZES = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 304, "head_dim": 32, "initializer_range": 0.1}
MADE = {
    "gptq_v2 W4A16 asym": ("gptq", "gptq_v2", "W4A16_g32_asym", ("lm_head",)),
    "gptq W2A16": ("gptq", "gptq", "W2A16_g32", ()),
    "awq gemv W4A16 asym": ("awq", "awq_gemv", "W4A16_g64_asym", ()),
    "int8 W8A8": ("int8", "int8", "W8A8", ()),
}
"""Checkpoints of formats that vLLM lacks, refuses or dropped: format, layout, scheme, quantized layers beside the linear ones."""
TOOLS = ("gptqmodel-w4-g128-sym-descact", "gptqmodel-w3-g128-sym")
MOE = "mixtral-gptqmodel-w4-g32-sym"
ACTORDER = TOOLS[0]


def prompts(vocabulary: int = 250) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (40,), generator=generator).tolist() for _ in range(3)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def base(place):
    return make_model(place / "base", **SIZES)


@pytest.fixture(scope="module")
def run(place):
    """Jobs of vllm_jobs.py in one process, under the environment given."""

    def start(jobs: list[dict], **environment: str) -> list[dict]:
        given, found, log = (place / f"{n}-{time.monotonic_ns()}" for n in ("jobs.json", "results.json", "log.txt"))
        given.write_text(json.dumps([{"prompts": prompts(), **job} for job in jobs], default=str))
        ranks = max(job.get("options", {}).get("tensor_parallel_size", 1) for job in jobs)
        mode = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if ranks == 1 else {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        command = [sys.executable, str(Path(__file__).with_name("vllm_jobs.py")), str(given), str(found)]
        with log.open("w") as out:
            done = subprocess.run(
                command, env={**os.environ, **ENVIRONMENT, **mode, **environment}, stdout=out, stderr=out, check=False
            )
        results = json.loads(found.read_text()) if found.exists() else []
        assert len(results) == len(jobs), f"vLLM ended with {done.returncode}: {log.read_text()[-3000:]}"
        return [{**result, "log": log.read_text()} for result in results]

    return start


@pytest.fixture
def far(capsys):
    """The mean and largest distance of two results, printed as a row of the table with those of the contrast."""

    def compare(what: str, ours: dict, copy: dict, wrong: dict, bound: float = EXACT) -> None:
        for result in (ours, copy, wrong):
            assert "error" not in result, result["error"]
        (mean, worst), (off, _) = distance(ours, copy), distance(ours, wrong)
        row = f"{what:58} mean {mean:.1e}  largest {worst:.1e}  contrast {off:.1e}"
        with capsys.disabled():
            print(f"\n{row}", end="")
        assert mean < bound, row
        assert off > 50 * bound or off > 50 * mean, row

    return compare


def distance(a: dict, b: dict) -> tuple[float, float]:
    assert len(a["logprobs"]) == len(b["logprobs"]) > 100
    steps = [abs(x - y) for x, y in zip(a["logprobs"], b["logprobs"], strict=True)]
    return sum(steps) / len(steps), max(steps)


def checkpoint(name: str, place: Path) -> Path:
    """A checkpoint of a real tool, without the logits that lie beside it."""
    source = next(path for path in oracles() if path.name == name)
    if not (place / name).exists():
        shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("ref.safetensors", "NOTE.json"))
    return place / name


def adapter(base: Path, out: Path) -> Path:
    """A LoRA adapter for attention and MLP, large enough to see."""
    generator, tensors = torch.Generator().manual_seed(5), {}
    for name, tensor in load_file(base / "model.safetensors").items():
        leaf = name.split(".")[-2]
        if leaf in ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"):
            n, k = tensor.shape
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(8, k, generator=generator) / k**0.5
            tensors[f"{stem}.lora_B.weight"] = torch.randn(n, 8, generator=generator) * 0.05
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "bias": "none",
    }
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def beside(source: Path, out: Path) -> Path:
    """The same checkpoint as AutoGPTQ wrote it: quantize_config.json alone says that it is quantized."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    (out / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (out / "config.json").write_text(json.dumps(config))
    return out


def moe_copy(place: Path) -> Path:
    """The copy under the names that vLLM's own Mixtral reads."""
    out = place / "moe-copy"
    if not out.exists():
        save_dequantized(checkpoint(MOE, place), out)
        tensors = load_file(out / "model.safetensors")
        save_file(
            {n.replace(".mlp.", ".block_sparse_moe."): t for n, t in tensors.items()},
            out / "model.safetensors",
            {"format": "pt"},
        )
    return out


WEIGHTS_ALONE = {"additional_config": {"qplug": {"activations": "16bit"}}}


@pytest.fixture(scope="module")
def eager(run, base, place):
    """One process, one rank, no compilation, default policy: results by name."""
    tool = checkpoint(ACTORDER, place)
    other = scaled(tool, place / "other", ".scales", 1.05)
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_logprobs": -1}
    online = {"quantization": "qplug", "additional_config": {"qplug": {"quantize": "W4A16_g32"}}}
    jobs: dict[str, dict] = {
        "moe": {"model": checkpoint(MOE, place)},
        "moe copy": {"model": moe_copy(place)},
        "moe wrong": {"model": scaled(moe_copy(place), place / "moe-wrong", "experts.0.down_proj.weight", 0.9)},
        "base": {"model": base},
        "online": {"model": base, "options": online},
        "online copy": {"model": save_dequantized(base, place / "online", quantize="W4A16_g32")},
        "no scheme": {"model": base, "options": {"quantization": "qplug"}},
        "other copy": {"model": save_dequantized(other, place / "other-copy")},
        "reload": {"model": tool, "reload": other},
        "push": {"model": tool, "push": other},
    }
    jobs["beside"] = {"model": beside(tool, place / "beside")}
    for name in TOOLS:
        jobs[name] = {"model": checkpoint(name, place)}
        jobs[f"{name} copy"] = {"model": save_dequantized(checkpoint(name, place), place / f"{name}-copy")}
    for name, (fmt, *how) in MADE.items():
        made = make(base, place / name.replace(" ", "-"), fmt, *how)
        jobs[name] = {"model": made, "options": WEIGHTS_ALONE}
        jobs[f"{name} copy"] = {"model": save_dequantized(made, place / f"{name}-copy")}
    copy = jobs[f"{ACTORDER} copy"]["model"]
    adapted = adapter(copy, place / "lora")
    jobs |= {
        "lora": {"model": tool, "options": lora, "lora": adapted, "next": True},
        "lora copy": {"model": copy, "options": lora, "lora": adapted, "next": True},
        "lora wrong": {"model": copy, "options": {"max_logprobs": -1}, "next": True},
    }
    return dict(zip(jobs, run(list(jobs.values())), strict=True))


@pytest.mark.parametrize("name", TOOLS)
def test_checkpoints_of_tools(eager, far, name):
    far(name, eager[name], eager[f"{name} copy"], eager[f"{TOOLS[1 - TOOLS.index(name)]} copy"])


@pytest.mark.parametrize("name", MADE)
def test_formats_that_vllm_has_not(eager, far, name):
    far(name, eager[name], eager[f"{name} copy"], eager["base"], 2e-5 if "W8A8" in name else EXACT)


def test_a_file_beside_config_json(eager, far):
    far("quantize_config.json alone", eager["beside"], eager[f"{ACTORDER} copy"], eager[f"{TOOLS[1]} copy"])


def test_experts(eager, far):
    far(f"{MOE}, contrast: one expert of 8 at 0.9", eager["moe"], eager["moe copy"], eager["moe wrong"], 5e-6)


def test_online(eager, far):
    far("online W4A16_g32", eager["online"], eager["online copy"], eager["base"])


def test_vllm_48312_reload_of_other_weights(eager, far):
    far("reload_weights, contrast: the weights before", eager["reload"], eager["other copy"], eager[ACTORDER])


def test_push_of_other_weights(eager, far):
    far("load_weights on the live model", eager["push"], eager["other copy"], eager[ACTORDER])


def test_lora_on_a_4_bit_model(eager, far):
    far("LoRA on act-order W4A16, contrast: without it", eager["lora"], eager["lora copy"], eager["lora wrong"])


def test_the_flag_without_a_scheme_is_one_sentence(eager):
    assert "does not say what to make of it" in eager["no scheme"]["error"]


def test_the_log_says_who_serves_and_why(eager):
    log = eager["base"]["log"]
    assert "qplug serves the gptq checkpoint: vLLM >=0.32,<0.33 does not serve W4A16_g128_actorder stored as gptq" in log
    assert "qplug serves the int8 checkpoint: vLLM >=0.32,<0.33 has no int8" in log
    assert "W4A16_g128_actorder  gptq  ->" in log


def test_torch_compile(run, eager, far, place):
    options = {"enforce_eager": False}
    reference = {**options, "additional_config": {"qplug": {"kernels": "reference"}}}
    jobs = [{"model": checkpoint(ACTORDER, place), "options": o} for o in (options, reference)]
    ours, floor = run(jobs, TORCHDYNAMO_DISABLE="0")
    far("torch.compile", ours, eager[f"{ACTORDER} copy"], eager[f"{TOOLS[1]} copy"])
    far("torch.compile, reference kernels", floor, eager[f"{ACTORDER} copy"], eager[f"{TOOLS[1]} copy"])


def test_tensor_parallel_2(run, eager, far, place):
    options = {"tensor_parallel_size": 2}
    moe, dense = run([{"model": checkpoint(name, place), "options": options} for name in (MOE, ACTORDER)])
    far("act order, 2 ranks, row-parallel layers included", dense, eager[f"{ACTORDER} copy"], eager[f"{TOOLS[1]} copy"])
    far("experts, 2 ranks", moe, eager["moe copy"], eager["moe wrong"], 5e-6)


def test_kv_cache_scales(run, base, far, place):
    """Against vLLM's own reading of the same file; the contrast has other scales, so the values count."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    folder = place / "kv"
    shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors")
    for layer in range(2):
        for which, scale in (("k", 0.0123), ("v", 0.0217)):
            tensors[f"model.layers.{layer}.self_attn.{which}_scale"] = torch.tensor([scale])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": [], "kv_cache_scheme": scheme,
        "quantization_status": "compressed",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    wrong = scaled(folder, place / "kv-wrong", "k_scale", 1.7)
    (ours,) = run([{"model": folder}], QPLUG_VLLM="all")
    own, other = run([{"model": folder}, {"model": wrong}], VLLM_PLUGINS="none")
    assert "qplug serves the compressed-tensors checkpoint: QPLUG_VLLM=all" in ours["log"]
    far("FP8 KV cache with stored scales", ours, own, other, 1e-6)


def test_http(place):
    """``vllm serve`` of the embedded checkpoint answers a real client as the reference engine does."""
    from openai import OpenAI

    port, log = 8000 + os.getpid() % 1000, place / "serve.log"
    version = importlib.metadata.version("vllm-cpu")
    # The distribution vllm-cpu has no metadata of the name vllm, without which its own command does not start.
    info = place / "site" / f"vllm-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "PYTHONPATH": str(place / "site"),
        "QPLUG_VLLM": "all",
    }
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(DEMO / "gptq"),
        "--port",
        str(port),
        "--enforce-eager",
    ]
    command += ["--dtype", "float32", "--max-model-len", "256", "--served-model-name", "demo"]
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        deadline = time.monotonic() + 240
        while not _answers(client):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        prompt = "def read_lines(path):\n"
        answer = client.completions.create(model="demo", prompt=prompt, max_tokens=24, temperature=0, logprobs=1)
        streamed = client.completions.create(model="demo", prompt=prompt, max_tokens=24, temperature=0, stream=True)
        pieces = [chunk.choices[0].text for chunk in streamed]
    finally:
        server.terminate()
        server.wait(60)
    engine = qplug_core.load(DEMO / "gptq", dtype="float32")
    assert answer.choices[0].text == engine.generate(prompt, 24)
    assert "".join(pieces) == answer.choices[0].text
    assert len(pieces) > 2
    ids = engine.tokenizer(prompt, return_tensors="pt").input_ids
    expected = engine.logits(ids)[0, -1].log_softmax(-1).max()
    assert abs(answer.choices[0].logprobs.token_logprobs[0] - float(expected)) < 1e-4
    assert "qplug serves the gptq checkpoint: QPLUG_VLLM=all" in log.read_text()


def _answers(client) -> bool:
    from openai import APIConnectionError, APIStatusError

    try:
        return bool(client.models.list().data)
    except (APIConnectionError, APIStatusError):
        return False


EXTRA = [path.name for path in oracles() if path.parent != DATA]


@pytest.mark.slow
@pytest.mark.skipif(not EXTRA, reason="QPLUG_ORACLES is not set")
def test_oracles(run, place, far):
    """Every further checkpoint of a tool whose model vLLM 0.32 has, weights alone, all served by qplug."""
    names = [name for name in EXTRA if (next(p for p in oracles() if p.name == name) / "config.json").exists()]
    jobs, kept = [], []
    for name in sorted(names, key=lambda n: ("moe" not in n and "mixtral" not in n, n)):
        folder = checkpoint(name, place)
        if "quantization_config" not in json.loads((folder / "config.json").read_text()):
            continue
        try:
            copy = save_dequantized(folder, place / f"{name}-extra")
        except qplug_core.errors.QplugError:
            continue
        kept.append(name)
        jobs += [{"model": folder, "options": WEIGHTS_ALONE}, {"model": copy}]
    results = run(jobs, QPLUG_VLLM="all")
    for i, name in enumerate(kept):
        wrong = {**results[2 * i + 1], "logprobs": [v - 1 for v in results[2 * i + 1].get("logprobs", ())]}
        far(name, results[2 * i], results[2 * i + 1], wrong)
