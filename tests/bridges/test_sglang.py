"""The real SGLang serves qplug's checkpoints on a CPU: log-probabilities against a dequantized copy in the same engine.

SGLang's GPU kernels are not there (sglang_standin), and nothing here calls any: its registration, argument parsing, model config, loader,
models, layers, attention and memory pool are SGLang's own. Every number has a contrast: the same distance to wrong weights.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "sglang_standin"))
import absent_kernels  # noqa: F401

pytest.importorskip("sglang", reason="tox run -e sglang")

import torch
from safetensors.torch import load_file, save_file

import qplug_core
from qplug_core.bridges import sglang as bridge
from qplug_core.errors import UsageError
from qplug_core.testing.dequantized import save_dequantized

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import proof
from conftest import DATA, make_model, oracles
from made import make, scaled

HERE = Path(__file__).parent
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(HERE / "sglang_standin"),
}  # fmt: skip
EXACT = 2e-4
"""Mean distance in float32 that rounding explains. The contrasts are at least 50 times as far."""
SIZES = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 304, "head_dim": 32}
MADE = {
    "gptq_v2 W4A16 asym, head too": ("gptq", "gptq_v2", "W4A16_g32_asym", ("lm_head",)),
    "awq gemv W4A16 asym": ("awq", "awq_gemv", "W4A16_g64_asym", ()),
    "int8 W8A8": ("int8", "int8", "W8A8", ()),
}
TOOLS = ("gptqmodel-w4-g128-sym-descact", "gptqmodel-w3-g128-sym")
MOE = "mixtral-autoawq-gemm-g64"
QWEN_MOE = "qwen3moe-modelopt-nvfp4"
BIASED = "gptoss-handwritten-mxfp4"
ALONE = {"QPLUG_SGLANG": "all", "QPLUG_SGLANG_OPTIONS": '{"activations": "16bit"}'}
TWO = {**ALONE, "SGLANG_CPU_OMP_THREADS_BIND": f"0|{(os.cpu_count() or 1) - 1}"}
NOT_RUN = (
    "GPUs: CUDA graphs, torch.compile, and SGLang's own kernels for attention and sampling beside qplug's",
    "sgl_kernel, whose CPU build is on no package index: a stand-in that computes nothing takes its place, and the attention is torch_native",
    "ROCm, where SGLang has a fixed list of quantization methods and refuses qplug's name",
    "expert parallelism, LoRA, speculative decoding, multimodal models, a quantized KV cache beyond the loading of its scales",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("sglang")


@pytest.fixture(scope="module")
def base(place):
    return make_model(place / "base", **SIZES)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 250, (length,), generator=generator).tolist() for length in (40, 17, 5)]


@pytest.fixture(scope="module")
def run(place):
    """Jobs of sglang_jobs.py in one process."""

    def start(jobs: list[dict]) -> list[dict]:
        given, found, log = (place / f"{n}-{time.monotonic_ns()}" for n in ("jobs.json", "results.json", "log.txt"))
        given.write_text(json.dumps([{"prompts": prompts(), **job} for job in jobs], default=str))
        command = [sys.executable, str(HERE / "sglang_jobs.py"), str(given), str(found)]
        with log.open("w") as out:
            done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, stdout=out, stderr=out, check=False)
        results = json.loads(found.read_text()) if found.exists() else []
        assert len(results) == len(jobs), f"SGLang ended with {done.returncode}: {log.read_text()[-3000:]}"
        return [{**result, "log": log.read_text()} for result in results]

    return start


@pytest.fixture
def far(request):
    """The mean and largest distance of two results, printed as a row of the table with those of the contrast, and recorded."""

    def compare(method: str, feature: str, ours: dict, copy: dict, wrong: dict, bound: float = EXACT) -> None:
        for result in (ours, copy, wrong):
            assert "error" not in result, result["error"]
        (mean, worst), (off, _) = distance(ours, copy), distance(ours, wrong)
        row = f"{method + ', ' + feature:50} mean {mean:.1e}  largest {worst:.1e}  contrast {off:.1e}"
        request.config.pluginmanager.get_plugin("terminalreporter").write_line(row)
        assert mean < bound, row
        assert off > 50 * mean, row
        proof.record("sglang", version("sglang"), method, feature, request.node.nodeid, mean, off)

    return compare


def distance(a: dict, b: dict) -> tuple[float, float]:
    assert len(a["logprobs"]) == len(b["logprobs"]) > 50
    steps = [abs(x - y) for x, y in zip(a["logprobs"], b["logprobs"], strict=True)]
    return sum(steps) / len(steps), max(steps)


def checkpoint(name: str, place: Path) -> Path:
    """A checkpoint of a real tool, without the logits that lie beside it."""
    if not (place / name).exists():
        source = next(path for path in oracles() if path.name == name)
        shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("ref.safetensors", "NOTE.json"))
    return place / name


def copy_of(folder: Path, place: Path, **options) -> Path:
    """A dequantized copy, once."""
    out = place / f"{folder.name}-copy{'-'.join(options)}"
    if not out.exists():
        save_dequantized(folder, out, **options)
    return out


def of_prompts(folder: Path) -> list[float]:
    """Log-probabilities of every token of the prompts after the first, in the reference engine."""
    engine = qplug_core.load(folder, dtype="float32")
    found = []
    for ids in prompts():
        steps = engine.logits(torch.tensor([ids]))[0].log_softmax(-1)
        found += [float(steps[i, token]) for i, token in enumerate(ids[1:])]
    return found


def with_cache_scales(base: Path, out: Path) -> Path:
    """``base`` with an FP8 KV cache, as compressed-tensors stores its scales."""
    shutil.copytree(base, out)
    tensors = load_file(base / "model.safetensors")
    tensors |= {
        f"model.layers.{i}.self_attn.{w}_scale": torch.tensor([s])
        for i in range(2)
        for w, s in (("k", 0.0123), ("v", 0.0217))
    }
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": [], "kv_cache_scheme": scheme,
        "quantization_status": "compressed",
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    return out


def without(folder: Path, out: Path, suffix: str) -> Path:
    """The same checkpoint without some tensors."""
    shutil.copytree(folder, out)
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.endswith(suffix)}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.fixture(scope="module")
def results(run, base, place):
    """One process for all, results by name."""
    tool = checkpoint(TOOLS[0], place)
    other = scaled(tool, place / "other", ".scales", 1.05)
    moe, qwen = copy_of(checkpoint(MOE, place), place), copy_of(checkpoint(QWEN_MOE, place), place)
    online = {"QPLUG_SGLANG_OPTIONS": '{"quantize": "W4A16_g32"}'}
    jobs: dict[str, dict] = {
        MOE: {"model": checkpoint(MOE, place), "environment": ALONE},
        f"{MOE} copy": {"model": moe},
        f"{MOE} wrong": {"model": scaled(moe, place / "moe-wrong", "experts.0.w2.weight", 0.9)},
        QWEN_MOE: {"model": checkpoint(QWEN_MOE, place), "environment": ALONE},
        f"{QWEN_MOE} copy": {"model": qwen},
        f"{QWEN_MOE} wrong": {"model": scaled(qwen, place / "qwen-wrong", "experts.0.down_proj.weight", 0.9)},
        BIASED: {"model": checkpoint(BIASED, place), "environment": ALONE, "options": {"attention_backend": "triton"}},
        "base": {"model": base},
        "online": {"model": base, "options": {"quantization": "qplug"}, "environment": online},
        "online copy": {"model": copy_of(base, place, quantize="W4A16_g32")},
        "no scheme": {"model": base, "options": {"quantization": "qplug"}},
        "other copy": {"model": copy_of(other, place)},
        "push": {"model": tool, "push": other, "environment": ALONE},
        "default": {"model": checkpoint(TOOLS[1], place)},
        "lacking": {"model": without(tool, place / "lacking", "layers.1.mlp.down_proj.scales"), "environment": ALONE},
        "cache": {
            "model": with_cache_scales(base, place / "cache"),
            "environment": ALONE,
            "options": {"kv_cache_dtype": "bfloat16"},
        },
        "2 ranks": {"model": tool, "environment": TWO, "options": {"tp_size": 2}},
        "2 ranks, experts": {"model": checkpoint(QWEN_MOE, place), "environment": TWO, "options": {"tp_size": 2}},
    }
    for name in TOOLS:
        jobs[name] = {"model": checkpoint(name, place), "environment": ALONE}
        jobs[f"{name} copy"] = {"model": copy_of(checkpoint(name, place), place)}
    for name, (fmt, *how) in MADE.items():
        made = make(base, place / name.replace(" ", "-"), fmt, *how)
        jobs[name] = {"model": made, "environment": ALONE}
        jobs[f"{name} copy"] = {"model": copy_of(made, place)}
    return dict(zip(jobs, run(list(jobs.values())), strict=True))


def test_sglang_finds_the_entry_point():
    assert [e.value for e in entry_points(group="sglang.srt.plugins") if e.name == "qplug"] == [
        "qplug_core.bridges.sglang:register"
    ]


@pytest.mark.parametrize("name", TOOLS)
def test_checkpoints_of_tools(results, far, name):
    far(
        "gptq", f"checkpoint {name}", results[name], results[f"{name} copy"], results[f"{TOOLS[1 - TOOLS.index(name)]} copy"]
    )


@pytest.mark.parametrize("name", MADE)
def test_formats_that_sglang_has_not_on_a_cpu(results, far, name):
    far(
        MADE[name][0],
        f"checkpoint {name}",
        results[name],
        results[f"{name} copy"],
        results["base"],
        2e-5 if "W8A8" in name else EXACT,
    )


@pytest.mark.parametrize("name", [MOE, QWEN_MOE])
def test_experts(results, far, place, name):
    method = proof.method_of(checkpoint(name, place))
    # SGLang's Mixtral has experts as linear layers one by one where a quantization is not its own.
    assert ("QplugExperts" in results[name]["methods"]) == (name == QWEN_MOE)
    far(method, f"experts {name}", results[name], results[f"{name} copy"], results[f"{name} wrong"], 5e-6)


def test_online(results, far):
    far("rtn", "at load W4A16_g32", results["online"], results["online copy"], results["base"])


def test_layers_that_stay_at_16_bit_are_known_before_they_are_made(results):
    assert results[TOOLS[0]]["unquantized"] == ["lm_head"]
    assert results["gptq_v2 W4A16 asym, head too"]["unquantized"] == []


def test_push_of_other_weights(results, far):
    far("gptq", "new weights into the running model", results["push"], results["other copy"], results[TOOLS[0]])


def test_scales_of_the_kv_cache_arrive_as_they_are_stored(results):
    assert results["cache"]["scales"] == pytest.approx([0.0123]), results["cache"].get("error")


def test_2_ranks(results, far):
    far("gptq", "2 ranks, act order", results["2 ranks"], results[f"{TOOLS[0]} copy"], results[f"{TOOLS[1]} copy"])
    far(
        "modelopt",
        "2 ranks, experts",
        results["2 ranks, experts"],
        results[f"{QWEN_MOE} copy"],
        results[f"{QWEN_MOE} wrong"],
        5e-6,
    )


def test_the_whole_engine(run, far, place):
    """Its own processes, the scheduler, and tokens; the plugin found by SGLang itself in each. Against the reference engine."""
    folder = checkpoint(TOOLS[0], place)
    (ours,) = run([{"model": folder, "engine": True, "environment": ALONE}])
    right, wrong = ({"logprobs": of_prompts(checkpoint(name, place))} for name in TOOLS)
    far("gptq", "sglang.Engine", ours, right, wrong)
    assert "qplug serves the gptq checkpoint: QPLUG_SGLANG=all asks for it" in ours["log"]
    proof.record_limits("sglang", version("sglang"), "x86 CPU, float32", NOT_RUN)


def test_without_a_word_of_the_user_sglang_keeps_what_it_says_it_has(results):
    said = "SGLang serves the gptq checkpoint: its gptq takes it; QPLUG_SGLANG=all or QPLUG_SGLANG=gptq gives it to qplug"
    assert said in results["default"]["log"]


def test_biases_of_experts_are_refused_in_one_sentence(results, request):
    error = results[BIASED]["error"]
    assert error.startswith(
        "ValueError: model.layers.0.mlp.experts has experts with biases, which qplug does not serve in SGLang"
    )
    proof.record_refusal(
        "sglang", version("sglang"), "mxfp4", "experts with biases (gpt-oss)", request.node.nodeid, error.partition(": ")[2]
    )


def test_the_flag_without_a_scheme_is_one_sentence(results):
    assert "does not say what to make of it; set QPLUG_SGLANG_OPTIONS=" in results["no scheme"]["error"]


def test_a_missing_tensor_is_refused_before_a_weight_is_read(results):
    assert "model.layers.1.mlp.down_proj.scales" in results["lacking"]["error"]
    assert "\n" not in results["lacking"]["error"].strip()


def test_registering_twice_is_registering_once(run):
    code = (
        "from qplug_core.bridges.sglang import register; import sglang.srt.layers.quantization as q; register(); register();"
        "from sglang.srt.arg_groups.choices import QUANTIZATION_CHOICES as c; print(list(q.QUANTIZATION_METHODS)[0], c.count('qplug'),"
        "q.get_quantization_config('qplug').__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-3:] == ["qplug", "1", "QplugConfig"]


def test_another_version_of_sglang_is_one_sentence(monkeypatch, caplog):
    monkeypatch.setattr(bridge, "VERSIONS", ">=9")
    bridge.register()
    (record,) = caplog.records
    assert record.getMessage() == (
        f"qplug stays out of this SGLang: it is version {version('sglang')} and qplug-core {version('qplug-core')} is tested with >=9; "
        "install one of those"
    )


def test_an_sglang_that_changed_is_one_sentence(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "qplug_core.bridges.sglang.config", None)
    bridge.register()
    (record,) = caplog.records
    assert "is not as qplug-core" in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "a JSON object was needed"),
        ('{"kernel": "x"}', "'kernel'; quantize, kernels"),
        ("{", "a JSON object was needed"),
    ],
)
def test_options_that_are_not_understood(text, said):
    from qplug_core.bridges.sglang.policy import Options

    with pytest.raises(UsageError, match=said):
        Options.read({"QPLUG_SGLANG_OPTIONS": text})


def test_policy():
    from qplug_core.bridges.sglang.policy import decide
    from qplug_core.registry import get_registry

    gptq = json.loads((DATA / TOOLS[0] / "config.json").read_text())["quantization_config"]
    registry = get_registry()
    assert not decide(gptq, None, "gptq_marlin", registry, {}).qplug
    assert decide(gptq, None, "", registry, {}).qplug
    assert decide(gptq, None, "gptq_marlin", registry, {"QPLUG_SGLANG": "gptq"}).qplug
    assert not decide(gptq, "gptq", "gptq", registry, {"QPLUG_SGLANG": "all"}).qplug
    assert decide(gptq, "qplug", "gptq", registry, {}).qplug
    assert decide({"quant_method": "unheard"}, None, "", registry, {}) is None
    with pytest.raises(UsageError, match="QPLUG_SGLANG names 'gtpq'"):
        decide(gptq, None, "gptq", registry, {"QPLUG_SGLANG": "gtpq"})
