"""Loads models with from_pretrained, one after the other: ``python transformers_jobs.py JOBS RESULTS``. Nothing of qplug is imported.

A job: ``model``, ``auto`` (the class of transformers), ``options`` of from_pretrained, ``ids``, ``qplug`` (arguments of a QplugConfig, only
where the test is about one), ``save`` (a folder to save to and load from again). A result: ``out`` (float32), ``layers`` (module classes of
qplug), or ``error``.
"""

from __future__ import annotations

import sys

imported_before = "qplug_core" in sys.modules

import json  # noqa: E402
from collections import Counter  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One model, and what it makes of ``ids``; ``again``: of what it saved, loaded with nothing said."""
    options = dict(job.get("options", {}))
    if "qplug" in job:
        from qplug_core.bridges.transformers import QplugConfig

        options["quantization_config"] = QplugConfig(**job["qplug"])
    model, result = load(job, job["model"], options)
    if "save" in job:
        model.save_pretrained(job["save"])
        result["again"] = load(job, job["save"], options)[1]
    return result


def load(job: dict[str, Any], folder: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model in ``folder``; its output and its modules of qplug."""
    cls = getattr(transformers, job.get("auto", "AutoModelForCausalLM"))
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    if lost := {key: names for key, names in info.items() if names}:
        raise ValueError(f"transformers did not load all of {folder}: {lost}")
    with torch.inference_mode():
        out = model(input_ids=torch.tensor(job["ids"]))
    layers = Counter(type(m).__name__ for m in model.modules() if type(m).__module__.startswith("qplug_core."))
    hidden = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return model, {"out": hidden.float(), "layers": dict(layers)}


def main(jobs: Path, results: Path) -> None:
    """All jobs; an error of one is its result."""
    assert not imported_before
    found = []
    for job in json.loads(jobs.read_text()):
        try:
            found.append(run(job))
        except Exception as error:
            found.append({"error": f"{type(error).__name__}: {error}"})
    torch.save(found, results)


main(Path(sys.argv[1]), Path(sys.argv[2]))
