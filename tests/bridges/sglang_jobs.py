"""Runs models in SGLang, one after the other: ``python sglang_jobs.py JOBS RESULTS``, with sglang_standin on PYTHONPATH.

A job: ``model``, ``options`` of ``ServerArgs``, ``environment``, ``prompts`` (token ids). A result: ``logprobs`` of the whole vocabulary after
each prompt, ``kernels`` and ``notes`` of qplug's plan, or ``error`` where SGLang refused. Each model has a process of its own (one for each
rank), forked after the imports, which take longer than the models: SGLang's own loader, model, layers, runner and memory pool, without its
scheduler. With ``"engine": true`` it is the whole ``sglang.Engine``.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import traceback
from array import array
from pathlib import Path
from typing import Any

DEFAULTS = {
    "device": "cpu", "dtype": "float32", "attention_backend": "torch_native", "sampling_backend": "pytorch", "disable_radix_cache": True,
    "max_total_tokens": 512, "max_running_requests": 4, "mem_fraction_static": 0.1, "skip_tokenizer_init": True, "log_level": "info",
}  # fmt: skip

ASKED = ("model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.down_proj", "lm_head")
"""What SGLang's models ask a config before they make a layer."""


def run(job: dict[str, Any], port: int) -> dict[str, Any]:
    """All ranks of a job; the result of the first."""
    options = {**DEFAULTS, "model_path": job["model"], **job.get("options", {})}
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    ranks = range(options.get("tp_size", 1))
    children = [context.Process(target=_rank, args=(job, options, port, rank, there)) for rank in ranks]
    for child in children:
        child.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return {"error": f"SGLang ended with {[child.exitcode for child in children]}"}
    finally:
        for child in children:
            child.join(timeout=60)
            child.kill()


def _rank(job: dict[str, Any], options: dict[str, Any], port: int, rank: int, out: Any) -> None:
    os.environ.update(job.get("environment", {}))
    try:
        result = _forward(job, options, port, rank)
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    if rank == 0 or "error" in result:
        out.send(result)
    os._exit(0)


def _forward(job: dict[str, Any], options: dict[str, Any], port: int, rank: int) -> dict[str, Any]:
    from sglang.benchmark import one_batch
    from sglang.srt.entrypoints.engine import _set_envs_and_config
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank
    from sglang.srt.server_args import PortArgs, ServerArgs
    from sglang.srt.utils import configure_logger

    logging.basicConfig(level=logging.INFO, force=True)
    load_plugins()
    args = ServerArgs(**options)
    args.resolve_once()
    _set_envs_and_config(args)
    ports = PortArgs.init_new(args)
    ports.nccl_port = port
    publish(
        args, role="scheduler", ranks=SpawnRanks(world_rank=spawn_world_rank(args, tp_rank=rank, pp_rank=0), gpu_id=rank)
    )
    one_batch._init_process_global_configs()
    configure_logger(args)
    one_batch.suppress_other_loggers = lambda: None
    one_batch.get_tokenizer = lambda *_, **__: None
    runner, _ = one_batch.load_model(args, ports, rank, rank)
    if "push" in job:
        from safetensors.torch import load_file

        tensors = [item for file in sorted(Path(job["push"]).glob("*.safetensors")) for item in load_file(file).items()]
        done, message = runner.torch_runner.weight_updater.update_weights_from_tensor(tensors)
        if not done:
            return {"error": message}
    requests = one_batch.prepare_synthetic_inputs_for_latency_test(1, 1, [array("q", ids) for ids in job["prompts"]])
    _, logits, _ = runner.extend(requests)
    model = runner.torch_runner.model
    methods = [
        m.quant_method
        for m in model.modules()
        if type(getattr(m, "quant_method", None)).__module__.startswith("qplug_core.")
    ]
    return {
        "logprobs": logits.float().log_softmax(-1).flatten().tolist(),
        "methods": sorted({type(method).__name__ for method in methods}),
        "scales": sorted({float(m.k_scale) for m in model.modules() if getattr(m, "k_scale", None) is not None}),
        "unquantized": [name for name in ASKED if methods and methods[0].quant_config.is_linear_unquantized(name)],
    }


def whole_engine(job: dict[str, Any]) -> dict[str, Any]:
    """``sglang.Engine`` with its own processes, which find qplug through its entry point."""
    import sglang

    os.environ.update(job.get("environment", {}))
    engine = sglang.Engine(model_path=job["model"], **{**DEFAULTS, **job.get("options", {})})
    try:
        found = engine.generate(
            input_ids=job["prompts"],
            sampling_params={"max_new_tokens": 1, "temperature": 0},
            return_logprob=True,
            logprob_start_len=0,
        )
        return {"logprobs": [step[0] for each in found for step in each["meta_info"]["input_token_logprobs"][1:]]}
    finally:
        engine.shutdown()


def main() -> None:
    jobs, results = json.loads(Path(sys.argv[1]).read_text()), []
    import sglang.benchmark.one_batch
    import sglang.srt.models.registry  # noqa: F401

    for i, job in enumerate(jobs):
        results.append(whole_engine(job) if job.get("engine") else run(job, 29600 + os.getpid() % 300 + i))
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
