"""The recipe of docs/transformers.md: `transformers serve` on the embedded quantized model, asked by an OpenAI client over HTTP."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

for name in ("openai", "fastapi", "uvicorn", "accelerate"):
    pytest.importorskip(name)
pytest.importorskip("transformers", "5.23")

from openai import OpenAI  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import qplug_core  # noqa: E402
import qplug_core.bridges.transformers as bridge  # noqa: E402
from qplug_core.bridges.transformers import hook  # noqa: E402

DEMO = Path(qplug_core.__file__).parent / "demo"
PROMPT = "import os\n\n\ndef read_lines(path):\n    "
TOKENS = 32
PAGE = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
COMMAND = next(line.strip() for line in PAGE.splitlines() if line.strip().startswith("transformers serve"))
CLIENT = next(block.partition("```")[0] for block in PAGE.split("```python\n") if "import OpenAI" in block)
"""What the page tells people to run."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server in a process of its own that finds qplug by itself, and what it wrote to stderr."""
    site = tmp_path_factory.mktemp("site")
    shutil.copy(hook.__file__, site / f"{hook.HOOK}.py")
    # The sitecustomize of this process alone does what a .pth in site-packages does.
    (site / "sitecustomize.py").write_text(f"import {hook.HOOK}\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = site / "log"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("QPLUG_TRANSFORMERS", None)
    assert "--port 8000" in COMMAND
    with log.open("w") as stderr:
        command = ["bash", "-c", f"exec {COMMAND.replace('--port 8000', f'--port {port}')}"]
        # Elsewhere than in a checkout, whose qplug_core python would import instead of the one that is installed.
        process = subprocess.Popen(command, stdout=stderr, stderr=stderr, env=env, cwd=site)
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0)
    try:
        for _ in range(240):
            if process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        assert process.poll() is None, log.read_text()[-3000:]
        yield client, log, port
    finally:
        process.terminate()
        process.wait(30)


def expected(folder):
    """Text of a model in this process."""
    bridge.register()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "gptq")
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_completions_are_those_of_the_quantized_model(server):
    _, log, port = server
    said: dict = {"FOLDER": str(DEMO / "gptq")}
    assert "127.0.0.1:8000" in CLIENT
    exec(CLIENT.replace("127.0.0.1:8000", f"127.0.0.1:{port}"), said)
    text = said["answer"].choices[0].text
    assert text == expected(DEMO / "gptq")
    assert text != expected(DEMO / "bf16")
    assert "qplug serves gptq" in log.read_text()


def test_a_stream_is_the_same_text(server):
    client, *_ = server
    stream = client.completions.create(
        model=str(DEMO / "gptq"), prompt=PROMPT, max_tokens=TOKENS, temperature=0, stream=True
    )
    pieces = [choice.text for chunk in stream for choice in chunk.choices if choice.text]
    assert len(pieces) > 3
    assert "".join(pieces) == expected(DEMO / "gptq")
