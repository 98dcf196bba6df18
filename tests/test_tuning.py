"""The tuning file: who decides, when it is not used, and what becomes of a damaged one."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from qplug_core import LayerSpec, Policy
from qplug_core.cli import main
from qplug_core.decl import API, KernelDecl
from qplug_core.device import Device
from qplug_core.errors import UsageError
from qplug_core.kernel import Problem
from qplug_core.planner import plan
from qplug_core.registry import Entry, PluginRow, Registry, get_registry
from qplug_core.resolve import Resolver
from qplug_core.scheme import QuantScheme
from qplug_core.tuning import Key, Tuning, Verdict, find_tuning, threads_of, tuning_path

sys.path.insert(0, str(Path(__file__).parent))
from conftest import DATA

W3 = DATA / "gptqmodel-w3-g128-sym"
CPU = Device.cpu()
PROBLEM = Problem("linear", QuantScheme.parse("W4A16_g128"), 64, 128)
KEY = Key("linear", "W4A16_g128", 64, 128, "bfloat16", 2)
FIRST, SECOND = {1: 0.62, 8: 1.0, 512: 50.0}, {1: 0.41, 8: 0.9, 512: 52.0}


def registry(version="1.0", *more):
    """Two kernels by rank: first, then second."""
    row = PluginRow("x", "dist-x", version, API, "ready")
    made = Registry([row])
    for name, rank, mode in (("x.first", 50, "native"), ("x.second", 40, "native"), *more):
        decl = KernelDecl(
            name, "qplug_core.reference.linear:ReferenceLinear", ("linear",), ("*",), ("any",), rank=rank, mode=mode
        )
        made.kernels.append(Entry(decl, row))
    return made


def tuning(times=None, **changes):
    measured = {KEY: times or {"x.first": FIRST, "x.second": SECOND}}
    return replace(Tuning(CPU.name, CPU.arch, {"dist-x": "1.0"}, measured, threads=2), **changes)


def choose(times=None, policy=None, kernels=None, problem=PROBLEM):
    return Resolver(kernels or registry(), CPU, policy or Policy(), tuning(times)).choose(problem, "layer")


def test_without_measurements_rank_decides():
    choice = Resolver(registry(), CPU, Policy()).choose(PROBLEM)
    assert (choice.kernel, choice.why) == ("x.first", "rank")


def test_the_measured_fastest_is_taken_and_the_choice_says_so():
    choice = choose()
    assert choice.kernel == "x.second"
    assert choice.why.startswith("measured: 0.41 ms against 0.62 ms of x.first at M=1, 0.9 against 1 at M=8")
    (tried,) = choice.tried
    assert (tried.kernel, tried.refusals[0].code) == ("x.first", "measured")
    assert "0.62 ms at M=1" in tried.refusals[0].have


def test_a_prompt_weighs_as_much_as_it_takes():
    """128 tokens at 0.2 ms more lose against a prompt of 512 that is 100 ms faster."""
    choice = choose({"x.first": {1: 0.62, 512: 50.0}, "x.second": {1: 0.42, 512: 150.0}})
    assert choice.kernel == "x.first"
    assert choice.why.startswith("measured")


@pytest.mark.parametrize("second", [0.61, 0.62, 0.63])
def test_times_that_a_measurement_cannot_tell_apart_leave_the_order_of_rank(second):
    choice = choose({"x.first": {1: 0.62}, "x.second": {1: second}})
    assert choice.kernel == "x.first"
    assert ("by rank" in choice.why) == (second < 0.62)


def test_a_pin_beats_a_measurement():
    choice = choose(policy=Policy(pin={"lay*": "x.first"}))
    assert (choice.kernel, choice.why) == ("x.first", "pinned by the user")


def test_a_forbidden_kernel_is_not_compared():
    choice = choose(policy=Policy(forbid=frozenset({"x.second"})))
    assert (choice.kernel, choice.why) == ("x.first", "rank")


def test_a_kernel_without_a_time_leaves_the_choice_to_rank():
    choice = choose(kernels=registry("1.0", ("x.zeroth", 60, "native")))
    assert (choice.kernel, choice.why) == ("x.zeroth", "rank; x.zeroth was not measured for this shape")


def test_a_reference_kernel_may_be_missing():
    choice = choose(kernels=registry("1.0", ("x.floor", 0, "reference")))
    assert choice.kernel == "x.second"
    assert next(t for t in choice.tried if t.kernel == "x.floor").refusals[0].code == "measured"


def test_a_measurement_never_drops_the_quantization_of_activations():
    times = {"x.first": FIRST, "x.second": SECOND, "x.lossy": {1: 0.001, 8: 0.001, 512: 0.001}}
    choice = choose(times, kernels=registry("1.0", ("x.lossy", 10, "weight-only")))
    assert choice.kernel == "x.second"


@pytest.mark.parametrize(
    "change",
    [{"n": 65}, {"dtype": "float16"}, {"scheme": QuantScheme.parse("W4A16_g64")}, {"pre_scale": True}, {"encoding": "x"}],
)
def test_another_problem_was_not_measured(change):
    assert choose(problem=replace(PROBLEM, **change)).why == "rank"


def test_a_file_is_read_back_as_it_was_written_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "t.json"
    tuning().write(path)
    read = Tuning.read(path)
    assert (read.device, read.arch, read.plugins) == (CPU.name, CPU.arch, {"dist-x": "1.0"})
    assert read.measured == tuning().measured
    assert read.digest
    assert [p.name for p in path.parent.iterdir()] == ["t.json"]
    tuning({"x.first": FIRST}).write(path)
    assert Tuning.read(path).digest != read.digest


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="QPLUG_TUNING=FILE"):
        tuning().write(tmp_path / "file" / "t.json")


def test_new_measurements_join_old_ones_of_the_same_versions():
    other = replace(KEY, n=128)
    old = tuning(measured={other: {"x.first": FIRST}, KEY: {"x.first": {1: 9.0}}})
    assert tuning().merged(old).measured == {other: {"x.first": FIRST}, **tuning().measured}
    assert tuning().merged(replace(old, plugins={"dist-x": "0.9"})).measured == tuning().measured
    assert tuning().merged(replace(old, device="another")).measured == tuning().measured
    assert tuning().merged(replace(old, plugins={"dist-y": "1.0"})).plugins == {"dist-x": "1.0", "dist-y": "1.0"}


def found(path, kernels=None, threads=2, device=CPU):
    return find_tuning(device, kernels or registry(), {"QPLUG_TUNING": str(path)}, threads)


def test_a_file_for_this_device_is_found(tmp_path):
    path = tuning_path(CPU, {"XDG_CACHE_HOME": str(tmp_path)})
    assert path.parent == tmp_path / "qplug" / "tuning"
    assert path.name.startswith(CPU.arch)
    assert find_tuning(CPU, registry(), {"XDG_CACHE_HOME": str(tmp_path)}, 2) == (None, "")
    tuning().write(path)
    read, note = find_tuning(CPU, registry(), {"XDG_CACHE_HOME": str(tmp_path)}, 2)
    assert (read.measured, note, read.threads) == (tuning().measured, "", 2)
    assert find_tuning(CPU, registry(), {"XDG_CACHE_HOME": str(tmp_path), "QPLUG_TUNING": "0"}, 2) == (None, "")


@pytest.mark.parametrize(
    ("changes", "arguments", "word"),
    [
        ({"device": "another CPU"}, {}, "another CPU"),
        ({"arch": "sm_90"}, {}, "sm_90"),
        ({}, {"kernels": registry("1.1")}, "dist-x 1.0 and 1.1"),
        ({"plugins": {"dist-gone": "1.0"}}, {}, "dist-gone 1.0 and none"),
        ({}, {"threads": 4}, "threads=2 and threads=4"),
        ({}, {"device": Device.from_name("sm_80")}, "sm_80"),
    ],
)
def test_a_stale_file_is_not_used_and_a_note_says_why(tmp_path, changes, arguments, word):
    tuning(**changes).write(tmp_path / "t.json")
    read, note = found(tmp_path / "t.json", **arguments)
    assert read is None
    assert word in note
    assert "chosen by rank; run `qplug tune` again" in note


def test_a_file_that_is_named_and_missing_is_noted(tmp_path):
    assert found(tmp_path / "gone.json") == (
        None,
        "QPLUG_TUNING names gone.json, which is no file, so kernels are chosen by rank; run `qplug tune`",
    )


def damage(body, **changes):
    return json.dumps({**body, **changes})


BODY = {"schema": 1, "device": "d", "arch": "a", "plugins": {}, "measured": []}
ROW = {"op": "linear", "scheme": "W8A16", "n": 1, "k": 1, "dtype": "bfloat16", "threads": 1, "ms": {"x.y": {"1": 0.1}}}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "{}", damage(BODY, schema=2), damage(BODY, measured=[{}]), damage(BODY, measured=7), damage(BODY, plugins=[]),
        damage(BODY, measured=[{**ROW, "n": "x"}]), damage(BODY, measured=[{**ROW, "ms": {"x.y": {"1": -1}}}]),
        damage(BODY, measured=[{**ROW, "ms": {"x.y": {"1": float("nan")}}}]), damage(BODY, measured=[{**ROW, "ms": 3}]), damage(BODY, facts=3),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_sentence(tmp_path, text):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(UsageError) as raised:
        found(path)
    said = str(raised.value)
    assert "\n" not in said
    assert said.startswith(f"{path} cannot be read as a tuning file (")
    assert said.endswith("delete it, run `qplug tune` again, or set QPLUG_TUNING=0")


def test_the_intact_body_of_the_damaged_ones_is_read(tmp_path):
    (tmp_path / "t.json").write_text(damage(BODY, measured=[ROW]))
    assert len(Tuning.read(tmp_path / "t.json").measured) == 1


def measured_w3(path, kernels, threads):
    """A file whose times make the second of the kernels that fit W3's layer the fastest."""
    key = Key("linear", "W3A16_g128", 128, 256, "bfloat16", threads)
    versions = {row.distribution: row.version for row in get_registry().plugins}
    times = {name: {1: 1.0 / (i + 1)} for i, name in enumerate(kernels)}
    Tuning(CPU.name, CPU.arch, {"qplug-core": versions["qplug-core"]}, {key: times}).write(path)


def test_a_plan_holds_the_digest_of_the_file_that_decided(tmp_path, monkeypatch):
    layer = LayerSpec("model.layers.0.mlp.up_proj", "linear", 128, 256)
    monkeypatch.setenv("QPLUG_TUNING", "0")
    config = json.loads((W3 / "config.json").read_text())["quantization_config"]
    by_rank = plan(config, [layer], device="cpu")
    choice = by_rank.decisions[0].segments[0].choice
    fit = [choice.kernel, *(t.kernel for t in choice.tried if t.refusals[0].code == "rank")]
    assert len(fit) > 1
    assert "tuning" not in by_rank.policy
    path = tmp_path / "t.json"
    measured_w3(path, fit, threads_of(CPU))
    monkeypatch.setenv("QPLUG_TUNING", str(path))
    tuned = plan(config, [layer], device="cpu")
    assert tuned.decisions[0].segments[0].choice.kernel == fit[-1]
    assert tuned.policy["tuning"] == Tuning.read(path).digest
    assert tuned.digest != by_rank.digest
    assert tuned.digest == plan(config, [layer], device="cpu").digest
    assert "measured" in tuned.report()
    pinned = plan(config, [layer], device="cpu", policy=Policy(pin={"*": fit[0]}))
    assert pinned.decisions[0].segments[0].choice.why == "pinned by the user"
    oracle = plan(config, [layer], device="cpu", policy=Policy("reference"))
    assert "tuning" not in oracle.policy
    measured_w3(path, fit, threads_of(CPU) + 1)
    stale = plan(config, [layer], device="cpu")
    assert stale.decisions[0].segments[0].choice.kernel == fit[0]
    assert any("threads" in note for note in stale.all_notes())


def test_ranks_whose_shapes_differ_have_one_digest(tmp_path, monkeypatch):
    """The times of two shapes differ, and what ranks compare does not."""
    config = json.loads((W3 / "config.json").read_text())["quantization_config"]
    layer = LayerSpec("model.layers.0.mlp.up_proj", "linear", 255, 256)
    monkeypatch.setenv("QPLUG_TUNING", "0")
    plans = [plan(config, [layer], device="cpu", tp=(rank, 2), parallel={"*": "N"}) for rank in (0, 1)]
    choice = plans[0].decisions[0].segments[0].choice
    fit = [choice.kernel, *(t.kernel for t in choice.tried if t.refusals[0].code == "rank")]
    measured = {}
    for i, n in enumerate((127, 128)):
        key = Key("linear", "W3A16_g128", n, 256, "bfloat16", threads_of(CPU))
        measured[key] = {name: {1: (1.0 + i) * (1 + at)} for at, name in enumerate(fit)}
    path = tmp_path / "t.json"
    Tuning(CPU.name, CPU.arch, {}, measured).write(path)
    monkeypatch.setenv("QPLUG_TUNING", str(path))
    tuned = [plan(config, [layer], device="cpu", tp=(rank, 2), parallel={"*": "N"}) for rank in (0, 1)]
    assert len({p.decisions[0].segments[0].choice.why for p in tuned}) == 2
    assert len({p.digest for p in tuned}) == 1


@pytest.fixture
def qplug(tmp_path, monkeypatch):
    """The command line in this process, with ``t.json`` as tuning file."""
    monkeypatch.setenv("QPLUG_TUNING", str(tmp_path / "t.json"))
    return lambda *arguments: CliRunner().invoke(main, arguments)


def test_tune_writes_what_explain_then_shows(tmp_path, qplug):
    path = tmp_path / "t.json"
    path.write_text("damaged")
    model = Path(__file__).parent.parent / "qplug_core" / "demo" / "gptq"
    damaged = qplug("explain", str(model))
    assert damaged.exit_code == 2
    assert len(damaged.stderr.splitlines()) == 1
    done = qplug("tune", str(model), "W8A16", "--shapes", "64x64", "--m", "1,2", "--seconds", "0.001")
    assert done.exit_code == 0, done.stderr
    assert "is replaced" in done.stderr
    tuned = Tuning.read(path)
    assert {key.threads for key in tuned.measured} == {threads_of(CPU)}
    assert {m for times in tuned.measured.values() for each in times.values() for m in each} == {1, 2}
    assert Key("linear", "W8A16", 64, 64, "bfloat16", threads_of(CPU)) in tuned.measured
    shown = qplug("explain", str(model), "--json")
    body = json.loads(shown.stdout)
    assert body["policy"]["tuning"] == tuned.digest
    whys = {s["choice"]["why"] for layer in body["layers"] for s in layer["segments"] if s["choice"]}
    assert whys
    assert all(why.startswith("measured: ") for why in whys)
    assert "measured: " in qplug("explain", str(model)).stdout


@pytest.mark.parametrize(
    "targets", [["nonsense"], ["W4A16", "--m", "0"], ["W4A16", "--shapes", "4096"], ["./missing/model"]]
)
def test_tune_refuses_what_it_does_not_understand(tmp_path, qplug, targets):
    done = qplug("tune", *targets)
    assert done.exit_code in (2, 4)
    assert isinstance(done.exception, SystemExit)
    assert done.stderr
    assert not list(tmp_path.iterdir())


def test_a_verdict_names_the_times_of_both():
    verdict = Verdict("a.b", {1: 0.412}, (("c.d", {1: 123.4}),))
    assert verdict.why() == "measured: 0.412 ms against 123 ms of c.d at M=1"
