"""transformers with qplug behind from_pretrained: log-probabilities of given tokens against dequantized copies in transformers itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", "5.23")

from transformers import AutoModelForCausalLM, GenerationConfig  # noqa: E402
from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402

import qplug_core.bridges.transformers as bridge  # noqa: E402
from qplug_core.bridges.transformers import QplugConfig, hook, policy, saving  # noqa: E402
from qplug_core.bridges.transformers.quantizer import QplugHfQuantizer  # noqa: E402
from qplug_core.engine.modules import QuantExperts, QuantLinear  # noqa: E402
from qplug_core.errors import CannotEncode, ConfigError, CoverError, PluginError, UsageError  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
from bridges import proof  # noqa: E402
from conftest import DATA, make_model, oracles  # noqa: E402

bridge.register()


@pytest.fixture
def prove(request):
    """Write down what the test has shown; a contrast that is not at least 50 times the error shows nothing."""

    def record(method, feature, error, contrast):
        assert contrast > 50 * error
        proof.record("transformers", transformers.__version__, method, feature, request.node.nodeid, error, contrast)

    return record


GPTQ = DATA / "gptqmodel-w4-g128-sym-descact"
MIXTRAL = DATA / "mixtral-gptqmodel-w4-g32-sym"
DEEPSEEK = DATA / "deepseekv3-transformers-fp8block-perexpert"
GPTOSS = DATA / "gptoss-handwritten-mxfp4"
IDS = torch.arange(24)[None] * 7 % 250


def load(folder, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def log_probs(model, ids=IDS):
    with torch.inference_mode():
        return torch.log_softmax(model(input_ids=ids).logits.float(), dim=-1)


def distance(one, other):
    return float((one - other).abs().max())


def reference(folder):
    """Token ids, and log-probabilities of the dequantized and of the unquantized model, made without qplug."""
    ref = load_file(folder / "ref.safetensors")
    dense, original = (torch.log_softmax(ref[f"logits_{n}_fp32"].float(), dim=-1) for n in ("dequant", "unquantized"))
    return ref["input_ids"], dense, original


def spoil(folder, out, suffix, change):
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    save_file(
        {n: (change(t) if n.endswith(suffix) else t).contiguous() for n, t in tensors.items()}, out / "model.safetensors"
    )
    return out


def test_other_codes_are_found_out(tmp_path):
    ids, dense, _ = reference(GPTQ)
    wrong = spoil(GPTQ, tmp_path / "wrong", "layers.0.mlp.down_proj.g_idx", lambda t: (torch.arange(len(t)) // 128).int())
    assert distance(log_probs(load(wrong), ids), dense) > 1e-2


def change_file(folder, out, change):
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    return out


def test_a_missing_weight_is_an_error(tmp_path):
    broken = change_file(GPTQ, tmp_path / "m", lambda t: t.pop("model.layers.1.mlp.up_proj.scales"))
    with pytest.raises(CoverError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.scales"):
        load(broken)


def test_a_missing_plain_weight_is_an_error(tmp_path):
    broken = change_file(GPTQ, tmp_path / "m", lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CoverError, match=r"model\.norm\.weight"):
        load(broken)


def test_an_unexpected_weight_is_an_error(tmp_path):
    broken = change_file(GPTQ, tmp_path / "m", lambda t: t.update({"model.layers.0.mlp.up_proj.extra": torch.ones(3)}))
    with pytest.raises(CoverError, match=r"up_proj\.extra"):
        load(broken)


def test_what_the_class_has_no_use_for_is_left_out(tmp_path):
    """The layer for multi-token prediction that every checkpoint of DeepSeek V3 has, and no class of transformers."""
    more = change_file(
        DEEPSEEK, tmp_path / "m", lambda t: t.update({"model.layers.61.shared_head.norm.weight": torch.ones(3)})
    )
    model = load(more)
    assert "1 tensors were left unread: DeepseekV3ForCausalLM has no use for them" in "; ".join(model.quant_plan.notes)
    assert torch.equal(log_probs(model), log_probs(load(DEEPSEEK)))


def test_a_missing_file_of_an_index_is_an_error(tmp_path, llama):
    load(llama).save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    next((tmp_path / "sharded").glob("*-00002-of-*")).unlink()
    with pytest.raises(Exception, match="00002"):
        load(tmp_path / "sharded", quantization_config=QplugConfig("W8A16"))


@pytest.mark.parametrize("folder", [GPTQ, MIXTRAL, DEEPSEEK, GPTOSS], ids=lambda f: f.name)
def test_save_and_reload_is_bit_equal(folder, tmp_path):
    model = load(folder, dtype="auto")
    model.save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    assert all(
        before[n].numpy(force=True).tobytes() == after[n].numpy(force=True).tobytes()
        for n in before
        if before[n].dtype in (torch.int32, torch.uint8)
    )
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config == json.loads((folder / "config.json").read_text())["quantization_config"]
    assert torch.equal(log_probs(load(tmp_path, dtype="auto")), log_probs(model))


def test_a_changed_norm_is_saved(tmp_path):
    model = load(GPTQ)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).model.norm.weight, model.model.norm.weight)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base") / "llama", hidden_size=128, intermediate_size=256, head_dim=32)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
    return make_model(tmp_path_factory.mktemp("moe") / "mixtral", "mixtral", **sizes)


def rounded(weight, bits, group):
    """Symmetric round to nearest by hand: the largest magnitude of a group is half of all levels."""
    groups = weight.float().view(weight.shape[0], -1, group or weight.shape[1])
    low = 2 ** (bits - 1)
    scale = groups.abs().amax(-1, keepdim=True) / (low - 0.5)
    return ((groups / scale).round().clamp(-low, low - 1) * scale).view(weight.shape)


@pytest.mark.parametrize(("scheme", "bits", "group"), [("W8A16", 8, 0), ("W4A16_g32", 4, 32)])
def test_online_is_a_rounded_copy(base, scheme, bits, group, prove):
    online = log_probs(load(base, quantization_config=QplugConfig(scheme)))
    copy = load(base)
    original = log_probs(copy)
    stored = load_file(base / "model.safetensors")
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.copy_(rounded(stored[name], bits, group))
    found, contrast = distance(online, log_probs(copy)), distance(original, log_probs(copy))
    assert found < 1e-5
    prove("rtn", f"at load {scheme}", found, contrast)


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16_g32", "W8A8", "Wfp8Afp8"])
@pytest.mark.parametrize("kind", ["base", "moe"])
def test_online_save_and_reload_is_bit_equal(kind, scheme, tmp_path, request):
    folder = request.getfixturevalue(kind)
    model = load(folder, dtype="auto", quantization_config=QplugConfig(scheme))
    quantized = {str(s.scheme) for d in model.quant_plan.decisions for s in d.segments}
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype="auto")
    assert {str(s.scheme) for d in again.quant_plan.decisions for s in d.segments} == quantized
    assert torch.equal(log_probs(again), log_probs(model))
    assert distance(log_probs(load(folder, dtype="auto")), log_probs(model)) > 0


def test_the_asked_format_is_written(base, tmp_path):
    load(base, quantization_config=QplugConfig("W4A16_g32", format="gptq")).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"


def test_a_format_that_cannot_hold_it_is_refused(base, tmp_path):
    with pytest.raises(CannotEncode, match="gptq"):
        load(base, quantization_config=QplugConfig("Wfp8Afp8", format="gptq")).save_pretrained(tmp_path)


def test_a_broken_plugin_does_not_stop_a_save(base, tmp_path, monkeypatch):
    model = load(base, quantization_config=QplugConfig("W8A16"))
    registry, broken = model.hf_quantizer.loading.registry, saving.FIRST[0]
    load_decl = registry.load

    def refuse(decl):
        if decl.name == broken:
            raise PluginError("it does not import")
        return load_decl(decl)

    monkeypatch.setattr(registry, "load", refuse)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"


def test_quantizing_twice_is_refused():
    with pytest.raises(UsageError, match="gptq already and W8A16 was asked for"):
        load(GPTQ, quantization_config=QplugConfig("W8A16"))


def test_tied_embeddings(tmp_path):
    folder = make_model(tmp_path / "tied", tie_word_embeddings=True)
    model = load(folder, quantization_config=QplugConfig("W8A16"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(log_probs(load(tmp_path / "saved")), log_probs(model))


def test_dequantize(tmp_path):
    ids, dense, _ = reference(MIXTRAL)
    model = load(MIXTRAL).dequantize()
    assert not any(isinstance(m, QuantLinear | QuantExperts) for m in model.modules())
    assert distance(log_probs(model, ids), dense) < 1e-4


def test_other_dtypes_and_devices_are_refused(base):
    model = load(base, quantization_config=QplugConfig("W8A16"))
    with pytest.raises(UsageError, match=r"packed for torch\.float32"):
        model.model.layers[0].to(torch.bfloat16)
    with pytest.raises(UsageError, match="device_map has 2 devices; qplug packs for one"):
        QplugHfQuantizer(QplugConfig("W8A16")).update_device_map({"model.layers.0": "cpu", "": "cuda:0"})
    assert log_probs(model.to("cpu")).isfinite().all()


def test_a_bin_file_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "bin")
    torch.save(load_file(base / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="safetensors"):
        load(tmp_path / "bin", quantization_config=QplugConfig("W8A16"))


def test_generate_follows_the_dequantized_copy(prove):
    """Scores of generated tokens, not the tokens, are compared."""
    ids, *_ = reference(GPTQ)
    options = GenerationConfig(
        max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    model = load(GPTQ)
    out = model.generate(ids, generation_config=options)
    forced = log_probs(load(GPTQ).dequantize(), out.sequences)[:, ids.shape[1] - 1 : -1]
    stepped = torch.log_softmax(torch.stack(out.logits, dim=1).float(), dim=-1)
    assert distance(stepped, forced) < 1e-4
    original = log_probs(load(spare(GPTQ)), out.sequences)[:, ids.shape[1] - 1 : -1]
    prove("gptq", "generate", distance(stepped, forced), distance(stepped, original))


def spare(folder):
    """Another quantization of the model that ``folder`` was made from: the contrast."""
    return folder.parent / "gptqmodel-w3-g128-sym"


def test_continuous_batching_follows_the_dequantized_copy(prove):
    model = load(GPTQ)
    prompts = [[5, 17, 100, 33, 8], [200, 11, 12], [77] * 9]
    options = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(
        page_size=32, num_blocks=16, max_batch_tokens=64, max_requests_per_batch=4, return_logprobs=True
    )
    out = model.generate_batch(prompts, generation_config=options, continuous_batching_config=small, warmup=False)
    copies = {"same": load(GPTQ).dequantize(), "other": load(spare(GPTQ))}
    worst = dict.fromkeys(copies, 0.0)
    for result, prompt in zip(sorted(out.values(), key=lambda r: r.request_id), prompts, strict=True):
        tokens = result.generated_tokens
        assert len(tokens) == 6
        for name, copy in copies.items():
            forced = log_probs(copy, torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
            forced = forced.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
            worst[name] = max(worst[name], distance(torch.tensor(result.logprobs), forced))
    assert worst["same"] < 1e-4
    prove("gptq", "continuous batching", worst["same"], worst["other"])


def test_a_quantized_kv_cache(base, monkeypatch):
    said = []
    monkeypatch.setattr(policy.log, "warning", lambda text, *a: said.append(text % a))
    model = load(base, quantization_config=QplugConfig("W8A16", kv_cache="int8"))
    assert "give generate() past_key_values=new_cache(model)" in said[-1]
    with torch.inference_mode():
        cached = model(input_ids=IDS, past_key_values=bridge.new_cache(model)).logits
        plain = model(input_ids=IDS).logits
    assert 0 < distance(cached, plain) < 1
    with pytest.raises(UsageError, match="was not loaded by qplug"):
        bridge.new_cache(load(base))


# Who serves what.


def test_policy_words():
    methods = {"gptq", "awq", "fp8"}
    assert policy.policy({}, methods) == policy.policy({policy.VARIABLE: "missing"}, methods) == "missing"
    assert policy.policy({policy.VARIABLE: "all"}, methods) == "all"
    assert policy.policy({policy.VARIABLE: "0"}, methods) == set()
    assert policy.policy({policy.VARIABLE: "gptq, AWQ"}, methods) == {"gptq", "awq"}
    with pytest.raises(UsageError, match="names gptqq; missing, all, 0 or some of awq, fp8, gptq were needed"):
        policy.policy({policy.VARIABLE: "gptqq"}, methods)


class Own(transformers.utils.quantization_config.QuantizationConfigMixin):
    """A config of transformers whose quantizer is decided by the test."""

    def __init__(self, quant_method="gptq", dequantize=False, **kwargs):
        self.quant_method, self.dequantize = quant_method, dequantize


def quantizer(act):
    class Quantizer:
        def __init__(self, config, pre_quantized):
            self.config = config

        def validate_environment(self, **kwargs):
            act(self.config)

    return Quantizer


def refuse(config):
    raise ImportError("Loading needs optimum\nand more")


def dequantize(config):
    config.dequantize = True


def test_transformers_serves_what_it_can():
    assert policy.refusal(Own, quantizer(lambda config: None), {}) == ""
    assert policy.refusal(Own, quantizer(refuse), {}) == "transformers does not load it here: Loading needs optimum"
    assert policy.refusal(Own, quantizer(dequantize), {}).startswith("transformers would dequantize the whole model")
    assert policy.refusal(Own, quantizer(dequantize), {"dequantize": True}) == ""


def test_the_chooser_says_who_and_why(caplog, monkeypatch):
    monkeypatch.setattr(policy, "ANNOUNCED", set())
    said = []
    monkeypatch.setattr(policy.log, "warning", lambda text, *a: said.append(text))
    stored = {"quant_method": "gptq", "bits": 4}
    assert isinstance(policy._chooser("gptq", Own, quantizer(lambda c: None), False).from_dict(stored), Own)
    assert isinstance(policy._chooser("gptq", Own, quantizer(refuse), False).from_dict(stored), QplugConfig)
    assert isinstance(policy._chooser("gptq", Own, quantizer(lambda c: None), True).from_dict(stored), QplugConfig)
    assert said == [
        "qplug serves gptq: transformers does not load it here: Loading needs optimum (QPLUG_TRANSFORMERS=0 leaves it to transformers)"
    ]


def test_what_qplug_does_not_read_stays_with_transformers(monkeypatch):
    said = []
    monkeypatch.setattr(policy, "ANNOUNCED", set())
    monkeypatch.setattr(policy.log, "warning", lambda text, *a: said.append(text))
    chosen = policy._chooser("aqlm", Own, quantizer(refuse), False).from_dict({"quant_method": "aqlm"})
    assert isinstance(chosen, Own)
    assert said[0].startswith("transformers serves aqlm: qplug does not read it here (no plugin")


# Versions and discovery.


def test_another_version_is_one_sentence(monkeypatch, base):
    monkeypatch.setattr(bridge, "VERSIONS", ">=4,<5")
    with pytest.raises(UsageError, match=r"transformers is 5\.\S+ and qplug-core \S+ is tested with >=4,<5; install"):
        bridge.register()
    said = []
    monkeypatch.setattr(bridge.log, "info", lambda text, *a: said.append(text % a))
    bridge.autoload()
    assert said[0].startswith("qplug stays out of transformers: transformers is 5")
    with pytest.raises(UsageError, match="is tested with"):
        QplugConfig("W8A16")


def test_a_changed_engine_is_one_sentence(monkeypatch, base):
    config = QplugConfig("W8A16")
    monkeypatch.delattr(transformers.PreTrainedModel, "_adjust_missing_and_unexpected_keys")
    with pytest.raises(UsageError, match=r"is not as qplug-core \S+ knows it \(AttributeError"):
        load(base, quantization_config=config)


@pytest.fixture
def site(tmp_path):
    """A folder as site-packages has it after the wheel was installed."""
    shutil.copy(hook.__file__, tmp_path / f"{hook.HOOK}.py")
    (tmp_path / f"{hook.HOOK}.pth").write_text(f"import {hook.HOOK}\n")
    return tmp_path


def run(site, code, **environment):
    import os

    code = f"import site; site.addsitedir({str(site)!r})\n{code}"
    env = {k: v for k, v in os.environ.items() if k != "QPLUG_TRANSFORMERS"} | {"OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)


LOAD = f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(GPTQ)!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


def test_discovery_without_an_import(site):
    done = run(site, LOAD)
    assert done.stdout.split() == ["QuantLinear"], done.stderr
    assert "qplug serves gptq" in done.stderr


def test_discovery_can_be_turned_off(site):
    code = "import sys; print(any(type(f).__name__ == 'Finder' for f in sys.meta_path))"
    assert run(site, code).stdout.strip() == "True"
    assert run(site, code, QPLUG_TRANSFORMERS="0").stdout.strip() == "False"


def test_discovery_imports_nothing(site):
    code = (
        "import sys; print([m for m in ('qplug_core', 'torch', 'transformers', 'importlib.metadata') if m in sys.modules])"
    )
    assert run(site, f"import json\n{code}").stdout.strip() == "[]"


def test_a_wrong_word_does_not_break_transformers(site):
    done = run(site, "import transformers.modeling_utils; print('imported')", QPLUG_TRANSFORMERS="nonsense")
    assert done.stdout.strip() == "imported"
    assert "qplug stays out of transformers: QPLUG_TRANSFORMERS names nonsense" in done.stderr


def test_the_finder_leaves_when_it_is_done():
    calls = []
    hook.when_imported("json", lambda: calls.append("now"))
    sys.modules.pop("colorsys", None)
    hook.when_imported("colorsys", lambda: calls.append("later"))
    finder = next(f for f in sys.meta_path if getattr(f, "name", "") == "colorsys")
    import colorsys  # noqa: F401

    assert calls == ["now", "later"]
    assert all(f is not finder for f in sys.meta_path)


@pytest.mark.parametrize("folder", [f for f in oracles() if f.name.endswith("garbage")], ids=lambda f: f.name)
def test_a_ragged_garbage_scale_is_refused(folder):
    with pytest.raises(ConfigError, match="gave up on quantizing"):
        load(folder)
