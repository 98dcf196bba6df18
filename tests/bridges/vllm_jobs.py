"""Runs models in vLLM, one after the other, in a process of its own: ``python vllm_jobs.py JOBS RESULTS``.

A job: ``model``, ``options`` of ``vllm.LLM``, ``prompts`` (token ids), and perhaps ``policy`` (QPLUG_VLLM), ``lora`` (a folder), ``reload`` (a
checkpoint to load into the running engine), ``push`` (a checkpoint whose tensors are given to ``load_weights``, as trainers do),
``activations`` (what :class:`_Rounded` does to inputs of linear layers). A result: ``logprobs`` of every prompt token after the first, or
``error`` where vLLM refused. With ``next``: those of the whole vocabulary after each prompt, because vLLM 0.32 has no prompt
log-probabilities under LoRA on a CPU.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    os.environ["QPLUG_VLLM"] = job.get("policy", "missing")
    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "skip_tokenizer_init": True, "seed": 0}
    llm = LLM(job["model"], **{**defaults, **job.get("options", {})})
    try:
        if "reload" in job:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": job["reload"]})
        if "push" in job:
            llm.apply_model(_Push(job["push"]))
        if "activations" in job:
            llm.apply_model(_Rounded(*job["activations"]))
        lora = LoRARequest("adapter", 1, job["lora"]) if "lora" in job else None
        wanted: dict[str, Any] = {"logprobs": -1} if job.get("next") else {"prompt_logprobs": 0}
        asked = SamplingParams(max_tokens=1, detokenize=False, **wanted)
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        outputs = llm.generate(prompts, asked, lora_request=lora, use_tqdm=False)
        if job.get("next"):
            steps = [dict(out.outputs[0].logprobs[0]) for out in outputs]
            values = [step[token].logprob for step in steps for token in sorted(step)]
        else:
            values = [
                step[token].logprob
                for out, ids in zip(outputs, job["prompts"], strict=True)
                for step, token in zip(out.prompt_logprobs[1:], ids[1:], strict=True)
            ]
        return {"logprobs": values}
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


class _Push:
    """Gives the tensors of a checkpoint to the model's own ``load_weights``."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, model: Any) -> None:
        from safetensors.torch import load_file

        for file in sorted(Path(self.path).glob("*.safetensors")):
            model.load_weights(load_file(file).items())


class _Rounded:
    """Rounds the input of every linear layer, as a quantized model does, in a model that is not quantized: written from the formats'
    definitions, without anything of qplug. ``dtype``: int8 or fp8; ``group``: columns that share a scale, 0 for a whole token.
    """

    def __init__(self, dtype: str, group: int) -> None:
        self.dtype, self.group = dtype, group

    def __call__(self, model: Any) -> None:
        from vllm.model_executor.layers.linear import LinearBase

        count = 0
        for module in model.modules():
            if isinstance(module, LinearBase):
                module.register_forward_pre_hook(lambda _, given: (self.rounded(given[0]), *given[1:]))
                count += 1
        assert count, "no layer's input is rounded"

    def rounded(self, x: Any) -> Any:
        import torch

        groups = x.unflatten(-1, (-1, self.group or x.shape[-1]))
        largest = 127.0 if self.dtype == "int8" else 448.0
        scale = (groups.abs().amax(-1, keepdim=True) / largest).clamp_min(1e-12)
        codes = groups / scale
        codes = codes.round() if self.dtype == "int8" else codes.to(torch.float8_e4m3fn).to(x.dtype)
        return (codes * scale).flatten(-2)


def main() -> None:
    jobs, results = json.loads(Path(sys.argv[1]).read_text()), []
    for job in jobs:
        try:
            results.append(run(job))
        except Exception as error:
            traceback.print_exc()
            results.append({"error": f"{type(error).__name__}: {error}"})
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
