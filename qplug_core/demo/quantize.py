"""Make the W4A16 g128 version of the embedded model with GPTQModel, so that the demo runs on a file of somebody else's tool.

Needs an environment of its own, because GPTQModel pins its dependencies::

    pip install torch==2.13.0
    BUILD_CUDA_EXT=0 pip install --no-build-isolation gptqmodel==7.6.0 transformers==5.23.0
    python qplug_core/demo/quantize.py qplug_core/demo/bf16 qplug_core/demo/gptq

Calibration: 256 windows of 256 tokens of the standard library of the running Python, none of them held out.
"""

from __future__ import annotations

import argparse
import hashlib
import sysconfig
from pathlib import Path

from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoTokenizer

SAMPLES = 256
TOKENS = 256


def calibration(tokenizer: object) -> list[dict[str, list[int]]]:
    """Windows of ``TOKENS`` tokens, one from each of the first ``SAMPLES`` training files that are long enough."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        held_out = hashlib.sha256(relative.as_posix().encode()).digest()[0] % 40 == 0
        if held_out or {"site-packages", "test", "tests", "idlelib"} & set(relative.parts):
            continue
        ids = tokenizer(path.read_text(encoding="utf-8", errors="ignore"))["input_ids"]  # type: ignore[operator]
        if len(ids) >= 3 * TOKENS:
            window = ids[len(ids) // 2 : len(ids) // 2 + TOKENS]
            found.append({"input_ids": window, "attention_mask": [1] * TOKENS})
        if len(found) == SAMPLES:
            break
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    arguments = parser.parse_args()
    samples = calibration(AutoTokenizer.from_pretrained(arguments.model))
    model = GPTQModel.load(arguments.model, QuantizeConfig(bits=4, group_size=128), device="cpu")
    model.quantize(samples, batch_size=8)
    model.save(arguments.out)
