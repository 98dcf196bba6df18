# ruff: noqa: F811
"""Methods one by one in the real vLLM, with no flag: checkpoints that ``qplug quantize`` writes, and GGUF files.

Against a dequantized copy in the same engine. Where activations are quantized, the copy rounds the input of every linear layer too, by a
hook that has nothing of qplug in it, and must be far from the copy that does not. There the distance is the median over short prompts: where
a value lies on the edge between two codes, sums in another order take the other one, and all later tokens of that prompt move by a tenth of
what rounding does.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="tox run -e vllm")


import torch
from safetensors.torch import load_file

import qplug_core
from qplug_core.testing.dequantized import save_dequantized

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import proof
from conftest import make_model
from made import auto_round, scaled, sparse24, with_config
from made_by_hand import READ_ONLY
from vllm_session import SIZES, VERSION, WEIGHTS_ALONE, base, far, place, prompts, run  # noqa: F401

EXPERTS = {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}
TOKEN_INT8, TOKEN_FP8 = ("int8", 0), ("fp8", 0)
MADE = {
    "awq": "W4A16_g64_asym",
    "bitsandbytes": "WNF4A16",
    "compressed_tensors": "Wmxfp4A16",
    "fastdeploy": "W8A16",
    "gptq": "W8A16_g32",
    "hqq": "W4A16_g64_asym",
    "marlin": "W4A16_g128",
    "modelopt": "Wnvfp4Anvfp4",
    "mxfp4": "Wmxfp4A16",
    "mxfp8": "Wmxfp8A16",
    "nvfp4": "Wnvfp4A16",
    "quanto": "W8A16",
    "torchao": "W8A16",
}
"""Formats and what ``qplug quantize`` stores in them; weights alone."""
ROUNDED = {
    "blockwise_int8": ("W8A8_b128x128_a:g128", ("int8", 128)),
    "fastdeploy_fp8": ("Wfp8Afp8_b128x128_a:g128", ("fp8", 128)),
    "fbgemm_fp8": ("Wfp8Afp8", TOKEN_FP8),
    "fp8": ("Wfp8Afp8", TOKEN_FP8),
    "int8": ("W8A8", TOKEN_INT8),
    "omni_quant": ("W8A8", TOKEN_INT8),
    "ptpc_fp8": ("Wfp8Afp8", TOKEN_FP8),
    "quark": ("Wfp8Afp8", TOKEN_FP8),
    "smooth_quant": ("W8A8", TOKEN_INT8),
    "w8a8_int8": ("W8A8", TOKEN_INT8),
}
"""The same with quantized activations, and how a hook rounds them: dtype, and columns that share a scale (0: a token)."""
DERIVED = {"compressed_tensors.sparse24": "2:4, bit masks", "auto-round": "W8A16_g32, of GPTQ's tensors"}
"""Formats that are not written, and what the tests make of them."""
READ = ("gptq_marlin_24", "fastdeploy_ccq", "fastdeploy_w4a8")
"""Formats that no tool here writes, made by hand; weights alone."""
ASKED = ("awq",)
"""What vLLM serves by itself on a CPU, so that QPLUG_VLLM has to name it."""
GGUF = importlib.util.find_spec("gguf") is not None


class Jobs:
    """Jobs by name; equal copies of several methods run once."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict] = {}
        self.same: dict[str, str] = {}
        self._known: dict[str, str] = {}

    def copy(self, name: str, folder: Path, **more) -> None:
        key = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() + repr(more)
        self.same[name] = self._known.setdefault(key, name)
        self.jobs.setdefault(self.same[name], {"model": folder, **more})


@pytest.fixture(scope="module")
def served(run, base, place):
    """One process, one rank: results by name."""
    jobs = Jobs()
    short = prompts(24, 6)
    jobs.copy("base", base)
    for name, scheme in MADE.items():
        folder = qplug_core.quantize(base, place / name, scheme=scheme, format=name).path
        policy = {"policy": name} if name in ASKED else {}
        jobs.jobs[name] = {"model": folder, "options": WEIGHTS_ALONE, **policy}
        jobs.copy(f"{name} copy", save_dequantized(folder, place / f"{name}-copy"))
    made = (sparse24(base, place / "sparse24"), auto_round(place / "gptq", place / "auto-round"))
    for name, folder in zip(DERIVED, made, strict=True):
        jobs.jobs[name] = {"model": folder}
        jobs.copy(f"{name} copy", save_dequantized(folder, place / f"{name}-copy"))
    for name, (scheme, how) in ROUNDED.items():
        folder = qplug_core.quantize(base, place / name, scheme=scheme, format=name).path
        jobs.jobs[name] = {"model": folder, "prompts": short}
        copy = save_dequantized(folder, place / f"{name}-copy")
        jobs.copy(f"{name} copy", copy, activations=how, prompts=short)
        jobs.copy(f"{name} alone", copy, prompts=short)
    bases = {"base": base, "moe": make_model(place / "moe", "qwen3_moe", **SIZES, **EXPERTS)}
    jobs.copy("moe", bases["moe"])
    for name in READ:
        make, kind = READ_ONLY[name]
        folder = make(bases[kind], place / name)
        jobs.jobs[name] = {"model": folder, "options": WEIGHTS_ALONE}
        jobs.copy(f"{name} copy", folder.with_name(f"{name}-copy"))
    if GGUF:
        for name, (kind, tied, types) in GGUF_FILES.items():
            folder, copy = gguf(place / name, kind, tied, types)
            jobs.jobs[name] = {"model": folder, "prompts": [[1, *range(5 + i, 90)] for i in range(2)]}
            jobs.jobs[f"{name} copy"] = {**jobs.jobs[name], "model": copy}
            wrong = scaled(copy, place / f"{name}-wrong", "0.self_attn.o_proj.weight", 0.9)
            jobs.jobs[f"{name} wrong"] = {**jobs.jobs[name], "model": wrong}
    results = dict(zip(jobs.jobs, run(list(jobs.jobs.values())), strict=True))
    return results | {name: results[other] for name, other in jobs.same.items()}


GGUF_FILES = {
    "gguf Q8_0": ("llama", False, "Q8_0"),
    "gguf-k Q4_K, Q6_K": ("llama", False, {"o_proj": "Q4_K", "down_proj": "Q6_K", "proj": "Q8_0"}),
    "gguf-grid IQ2_XS": ("llama", False, {"down_proj": "IQ2_XS", "proj": "Q8_0"}),
    "gguf Q8_0, tied": ("qwen2", True, {"embed_tokens": "Q8_0", "proj": "Q5_1"}),
}
"""Model, whether its embedding is the head, GGUF types by the end of a module's name."""


def gguf(out: Path, kind: str, tied: bool, types) -> tuple[Path, Path]:
    """A GGUF file as llama.cpp's converter writes it with config.json beside it, and the model with the values that it means."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "plugins" / "qplug_gguf" / "tests"))
    from gguf_files import model_of, write

    model = model_of(kind, tie_word_embeddings=tied)
    write(out / "model.gguf", model, types, leave=("output.weight",) if tied else ())
    copy = out.with_name(f"{out.name}-copy")
    model.save_pretrained(copy)
    shutil.copy(copy / "config.json", out / "config.json")
    return out, copy


@pytest.mark.parametrize("name", MADE)
def test_weights(served, far, name):
    far(name, f"checkpoint {MADE[name]}", served[name], served[f"{name} copy"], served["base"], 2e-5)


@pytest.mark.parametrize("name", DERIVED)
def test_what_nobody_writes_any_more(served, far, name):
    far(name, f"checkpoint {DERIVED[name]}", served[name], served[f"{name} copy"], served["base"], 2e-5)


@pytest.mark.parametrize("name", READ)
def test_what_is_only_read(served, far, name):
    far(name, "checkpoint made by hand", served[name], served[f"{name} copy"], served[READ_ONLY[name][1]], 2e-5)


def test_scales_beside_a_module_are_refused(run, base, place, request):
    """vLLM hands a tensor to the module whose name it begins with; RTP-LLM's ``q_proj_input_scale`` begins with none."""
    make, _ = READ_ONLY["pertensor_quant"]
    (result,) = run([{"model": make(base, place / "pertensor")}])
    assert "q_proj_input_scale is stored beside" in result["error"]
    sentence = result["error"].partition(": ")[2]
    proof.record_refusal(
        "vllm", importlib.metadata.version(VERSION), "pertensor_quant", "checkpoint", request.node.nodeid, sentence
    )


@pytest.mark.parametrize("name", ROUNDED)
def test_weights_and_activations(served, far, name):
    ours, copy, alone = served[name], served[f"{name} copy"], served[f"{name} alone"]
    far(name, f"checkpoint {ROUNDED[name][0]}, activations too", ours, copy, alone, 1e-5, middle=True)


@pytest.mark.skipif(not GGUF, reason="qplug-gguf needs the package gguf")
@pytest.mark.parametrize("name", GGUF_FILES)
def test_vllm_gguf_that_vllm_dropped(served, far, name):
    far(name.partition(" ")[0], f"file {name}", served[name], served[f"{name} copy"], served[f"{name} wrong"], 2e-5)


FP8_KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
OUTPUT = {"dtype": "fp8_e4m3", "is_dynamic": False, "qscheme": "per_tensor", "symmetric": True}
OF_QUARK = {
    "quant_method": "quark",
    "quant_mode": "eager_mode",
    "global_quant_config": {},
    "exclude": ["*"],
    "export": {"kv_cache_group": ["*k_proj", "*v_proj"]},
    "layer_quant_config": {"*k_proj": {"output_tensors": OUTPUT}, "*v_proj": {"output_tensors": OUTPUT}},
}
CACHES = {
    "compressed_tensors": (
        {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "config_groups": {},
            "ignore": [],
            "kv_cache_scheme": FP8_KV,
        },
        "{0}_scale",
    ),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": None, "kv_cache_scheme": FP8_KV, "ignore": [], "config_groups": {}},
        "{0}_proj.{0}_scale",
    ),
    "quark": (OF_QUARK, "{0}_proj.output_scale"),
    "fp8": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "kv_cache_scheme": "static", "ignored_layers": ["re:.*"]},
        "kv_scale",
    ),
}
"""Formats that store scales of an FP8 KV cache: a config that quantizes nothing else, and the names of the scales in an attention layer."""


def with_cache(base: Path, out: Path, config: dict, name: str, scales: dict[str, float]) -> Path:
    """A 16-bit checkpoint with scales of its KV cache."""
    tensors = load_file(base / "model.safetensors")
    for which, scale in scales.items():
        tensors |= {f"model.layers.{i}.self_attn.{name.format(which)}": torch.tensor([scale]) for i in range(2)}
    return with_config(base, out, tensors, config)


@pytest.fixture(scope="module")
def caches(run, base, place):
    """What qplug serves, by method; and vLLM's own reading of compressed-tensors files with the same scales and with others."""
    two, one, other = {"k": 0.0123, "v": 0.0217}, {"k": 0.0123, "v": 0.0123}, {"k": 0.0209, "v": 0.0217}
    own = {
        "two": with_cache(base, place / "own-two", *CACHES["compressed_tensors"], two),
        "one": with_cache(base, place / "own-one", *CACHES["compressed_tensors"], one),
        "other": with_cache(base, place / "own-other", *CACHES["compressed_tensors"], other),
    }
    ours = {
        name: with_cache(base, place / f"{name}-cache", *how, one if name == "fp8" else two) for name, how in CACHES.items()
    }
    found = run([{"model": folder, "policy": "all"} for folder in ours.values()])
    truth = run([{"model": folder} for folder in own.values()], VLLM_PLUGINS="none")
    return dict(zip([*ours, *own], [*found, *truth], strict=True))


@pytest.mark.parametrize("name", CACHES)
def test_kv_cache_scales(caches, far, name):
    """Against vLLM's own loader; the contrast has other scales, so the values count."""
    assert f"qplug serves the {CACHES[name][0]['quant_method']} checkpoint" in caches[name]["log"]
    truth = caches["one" if name == "fp8" else "two"]
    far(name, "KV cache FP8, stored scales", caches[name], truth, caches["other"], 1e-6)
