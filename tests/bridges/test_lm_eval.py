"""The reference engine in lm-evaluation-harness, on a task that lies beside the test; likelihoods against ones summed here."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval", "0.4.13")

import lm_eval
from lm_eval.tasks import TaskManager

import qplug_core
from qplug_core.bridges.lm_eval import QplugLM
from qplug_core.errors import UsageError

sys.path.insert(0, str(Path(__file__).parents[1]))
from bridges import proof

DEMO = Path(qplug_core.__file__).parent / "demo"
TEXTS = (DEMO / "heldout.txt").read_text(encoding="utf-8")[:1200].split("\n\n\n")
CHOICES = [
    {"question": "import os\nimport sys\n\nprint(os.path.", "options": ["join(", "))(((", "££££"], "answer": 0},
    {"question": "class A:\n    def __init__(", "options": ["0xFFFF", "self", "!!!"], "answer": 1},
]
TASKS = {
    "local_text": """
task: local_text
dataset_path: json
dataset_kwargs: {data_files: {test: %s/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "local_choice": """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s/choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{options}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
    (folder / "choices.jsonl").write_text("\n".join(json.dumps(c) for c in CHOICES))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text % folder)
    return folder


@pytest.fixture(scope="module")
def model():
    return QplugLM(str(DEMO / "gptq"), dtype="float32", batch_size=4)


def own_nll(engine, text, max_length):
    """Negative log-likelihood of a text after the first token of all texts, in one window."""
    ids = [
        engine.tokenizer.bos_token_id or engine.tokenizer.eos_token_id,
        *engine.tokenizer(text, add_special_tokens=False)["input_ids"],
    ]
    assert len(ids) <= max_length
    scores = torch.log_softmax(engine.logits(torch.tensor([ids]))[0, :-1], dim=-1)
    return -float(scores.gather(-1, torch.tensor(ids[1:])[:, None]).double().sum())


def evaluate(tasks, names, **arguments):
    options = {"pretrained": str(DEMO / "gptq"), "dtype": "float32", **arguments}
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    done = lm_eval.simple_evaluate(
        model="qplug", model_args=options, tasks=names, task_manager=manager, bootstrap_iters=0, batch_size=4
    )
    return done["results"]


def test_bits_per_byte_are_those_of_the_engine(tasks, model, capsys, request):
    def expected(folder):
        engine = qplug_core.load(DEMO / folder, dtype="float32")
        return sum(own_nll(engine, t, model.max_length) for t in TEXTS) / sum(len(t.encode()) for t in TEXTS) / math.log(2)

    found = evaluate(tasks, ["local_text"])["local_text"]["bits_per_byte,none"]
    quantized, parent = expected("gptq"), expected("bf16")
    with capsys.disabled():
        print(f"\nlm-eval {found:.6f} bits per byte, summed here {quantized:.6f}, its 16-bit parent {parent:.6f}")
    assert found == pytest.approx(quantized, abs=1e-6)
    assert abs(parent - quantized) > 1e-3
    proof.record(
        "reference", version("qplug-core"), "gptq", "lm-eval, bits per byte", request.node.nodeid, abs(found - quantized),
        abs(parent - quantized),
    )  # fmt: skip


def test_likelihoods_of_a_bfloat16_model_are_not_rounded(tasks):
    """In bfloat16 a sum of 200 is a multiple of 1, and a quantized model scores as its parent does."""
    model = QplugLM(str(DEMO / "gptq"), dtype="bfloat16")
    (score,) = model.loglikelihood_rolling([SimpleNamespace(args=(TEXTS[0],))], disable_tqdm=True)
    assert score == pytest.approx(-own_nll(model.engine, TEXTS[0], model.max_length), rel=2e-3)
    assert score != float(torch.tensor(score).bfloat16())


def test_multiple_choice(tasks):
    assert evaluate(tasks, ["local_choice"])["local_choice"]["acc,none"] == 1.0


def test_padding_changes_nothing(model):
    pairs = [
        ((c["question"], o), model.tok_encode(c["question"]), model.tok_encode(o)) for c in CHOICES for o in c["options"]
    ]
    together = model._loglikelihood_tokens(pairs, disable_tqdm=True)
    alone = [model._loglikelihood_tokens([pair], disable_tqdm=True)[0] for pair in pairs]
    assert [g for _, g in together] == [g for _, g in alone]
    assert max(abs(a - b) for (a, _), (b, _) in zip(together, alone, strict=True)) < 1e-4


def test_windows_cover_a_long_text(model):
    """Two windows predict each token once, the second with less to look at."""
    short = QplugLM(str(DEMO / "gptq"), dtype="float32", max_length=64)
    text = TEXTS[0] + TEXTS[1]
    assert len(model.tok_encode(text)) > 64
    (windowed,), (whole,) = (
        m.loglikelihood_rolling([SimpleNamespace(args=(text,))], disable_tqdm=True) for m in (short, model)
    )
    assert windowed < whole < 0


def test_generate_until_stops(model):
    request = SimpleNamespace(args=("import os\nimport ", {"until": ["\n"], "max_gen_toks": 24}))
    (text,) = model.generate_until([request], disable_tqdm=True)
    assert "\n" not in text
    assert model.engine.generate("import os\nimport ", 24).startswith(text)


def test_a_continuation_that_does_not_fit_is_refused(model):
    short = QplugLM(str(DEMO / "gptq"), dtype="float32", max_length=4)
    with pytest.raises(UsageError, match="a continuation of 9 tokens was asked for and 4 fit"):
        short._loglikelihood_tokens([(("", ""), [1], list(range(9)))], disable_tqdm=True)


def test_the_command_line_of_the_page(tasks, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
    said = next(line.split() for line in page.splitlines() if "python -m qplug_core.bridges.lm_eval run" in line)
    given = {"python": sys.executable, "TASK": "local_choice", "FOLDER": str(tasks)}
    command = [given.get(word, word.replace("PATH", str(DEMO / "gptq"))) for word in said]
    command += ["--output_path", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["local_choice"]["acc,none"] == 1.0
