"""The conformance kit passes a right plugin, and names what is wrong with each of these broken ones."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from qplug_core.decl import SchemePattern
from qplug_core.scheme import QuantScheme
from qplug_core.testing import QuantizerConformance, random_weight
from qplug_core.testing.base import schemes_of

pytest_plugins = ["pytester"]

DECLARATIONS = """
from qplug_core.decl import FormatDecl, KernelDecl
from qplug_core.hookspecs import hookimpl

API = "1.0"


@hookimpl
def qplug_formats():
    return [FormatDecl("toy", impl="toy_code:ToyFormat", layouts=("toy",), schemes=("W4A16 g32 sym|asym",))]


@hookimpl
def qplug_kernels():
    return [
        KernelDecl("toy.w4", impl="toy_code:W4", ops=("linear",), schemes=("W4A16 g32 sym|asym",), devices=("any",)),
        KernelDecl("toy.w8a8", impl="toy_code:W8A8", ops=("linear",), schemes=("W8A8 channel rules=127",), devices=("any",)),
        KernelDecl("toy.far", impl="toy_code:Far", ops=("linear",), schemes=("W4A16 g32",), devices=("gfx90a",)),
    ]
"""

CODE = """
from dataclasses import replace

import torch

from qplug_core.axes import FLOATS, StoredTensor
from qplug_core.config import LayerQuant, QuantizationConfig, Rule
from qplug_core.errors import CannotEncode, ConfigError
from qplug_core.format import CheckpointFormat
from qplug_core.kernel import Kernel, PackedWeight
from qplug_core.match import Matcher
from qplug_core.scheme import QuantScheme
from qplug_core.support import Refusal
from qplug_core.weight import QuantWeight


class ToyFormat(CheckpointFormat):
    name = "toy"

    def parse(self, source):
        raw = source.quant_config
        for key in raw:
            if key not in ("scheme", "ignore"):
                raise ConfigError(f"{key} is not known")
        rules = [Rule(Matcher(name, "exact"), None) for name in raw["ignore"]]
        quant = LayerQuant(QuantScheme.parse(raw["scheme"]), "toy")
        return QuantizationConfig("toy", [*rules, Rule(Matcher("", "all"), quant)])

    def quantization_config(self, layers):
        scheme = next(quant.scheme for quant in layers.values() if quant)
        return {"scheme": str(scheme), "ignore": [name for name, quant in layers.items() if quant is None]}

    def quant_for_scheme(self, weight):
        self.check(weight)
        return LayerQuant(weight.scheme, "toy")

    def check(self, weight):
        if weight.shift is not None or weight.k % 2 or (weight.zeros is not None and int(weight.zeros.max()) > 15):
            raise CannotEncode("an even number of columns and zero points to 15 are needed")

    def tensors(self, quant):
        stored = [StoredTensor("packed", ("N", "K/2"), ("U8",)), StoredTensor("scale", ("N", "ceil(K/32)"), FLOATS)]
        if not quant.scheme.weight.symmetric:
            stored.append(StoredTensor("zero", ("N", "ceil(K/32)"), ("U8",)))
        return tuple(stored)

    def decode(self, tensors, quant, n, k):
        packed = tensors["packed"]
        low, high = packed & 15, packed >> 4
        codes = torch.stack([low, high], dim=-1).flatten(-2)
        zeros = None
        if quant.scheme.weight.symmetric:
            codes = (codes - 8).view(torch.int8)
        else:
            zeros = tensors["zero"].to(torch.int16)
        return QuantWeight(quant.scheme, codes, tensors["scale"], (1, 32), zeros=zeros)

    def encode(self, weight, quant):
        self.check(weight)
        codes = weight.codes if weight.zeros is not None else weight.codes.view(torch.uint8) + 8
        tensors = {"packed": codes[:, 0::2] | (codes[:, 1::2] << 4), "scale": weight.scales}
        if weight.zeros is not None:
            tensors["zero"] = weight.zeros.to(torch.uint8)
        return tensors


@torch.library.custom_op("toy::product", mutates_args=())
def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x.float() @ weight.t()).to(x.dtype)


@product.register_fake
def _(x, weight):
    return x.new_empty(x.shape[0], weight.shape[0])


class Dense(Kernel):
    def supports(self, problem, device):
        refusals = []
        for field in ("pre_scale", "act_shift", "shift", "float_zeros", "encoding"):
            if getattr(problem, field):
                refusals.append(Refusal("scheme", f"a weight with {field}", f"one without {field}"))
        if problem.k % 4:
            refusals.append(Refusal("shape", f"K {problem.k}", "a multiple of 4"))
        return refusals

    def pack(self, weight, out=None):
        packed = PackedWeight(self.name, weight.n, weight.k, {"weight": weight.dequantize()})
        return packed if out is None else out.refill(packed)

    def apply(self, x, packed, bias=None):
        flat = x.reshape(-1, x.shape[-1])
        y = product(flat, packed.tensors["weight"])
        y = y if bias is None else y + bias
        return y.view(*x.shape[:-1], packed.n)


class W4(Dense):
    name = "toy.w4"


class Far(Dense):
    name = "toy.far"

    def apply(self, x, packed, bias=None):
        raise AssertionError("this machine has no such device")


class W8A8(Dense):
    name = "toy.w8a8"

    def apply(self, x, packed, bias=None):
        values = x.float()
        scale = values.abs().amax(-1, keepdim=True) / 127
        codes = torch.round(values / scale).clamp(-127, 127)
        return super().apply((codes * scale).to(x.dtype), packed, bias)
"""

TEST = """
from qplug_core.testing import PluginConformance


class TestToy(PluginConformance):
    plugin = "toy_plugin"
"""

BROKEN = {
    "nibble order of decode": ("torch.stack([low, high]", "torch.stack([high, low]", "test_decode_of_encode"),
    "zero point off by one": (
        'tensors["zero"].to(torch.int16)',
        'tensors["zero"].to(torch.int16) + 1',
        "test_decode_of_encode",
    ),
    "decode changes the file": (
        "low, high = packed & 15",
        "packed.bitwise_xor_(1); low, high = packed & 15",
        "test_decode_of_encode",
    ),
    "an undeclared tensor": (
        '"scale": weight.scales}',
        '"scale": weight.scales, "more": weight.scales}',
        "test_decode_of_encode",
    ),
    "scales that are cut at the wrong place": (
        '("N", "ceil(K/32)"), FLOATS)',
        '("N", "ceil(K/32)"), FLOATS, whole=("K",))',
        "test_cut",
    ),
    "a scheme that is not stored": ('raise CannotEncode("an even', 'raise ValueError("an even', "test_decode_of_encode"),
    "an unknown key is ignored": ('raise ConfigError(f"{key} is not known")', "pass", "test_unknown_key"),
    "a config that forgets a rule": ("if quant is None]", "if False]", "test_config_says"),
    "supports lies about shapes": ("x.float() @ weight.t()", "x.float()[:, :256] @ weight[:, :256].t()", "test_product"),
    "supports lies about a field": ('("pre_scale", "act_shift",', '("act_shift",', "test_unusual"),
    "only the first refusal": ("        return refusals\n", "        return refusals[:1]\n", "test_refusals"),
    "a refusal without a need": ('f"one without {field}"', '""', "test_refusals"),
    "a declared scheme is refused": ("if problem.k % 4:", "if problem.k % 1024:", "test_refusals"),
    "no tokens are not thought of": ("y.view(*x.shape[:-1], packed.n)", "y.view(*x.shape[:-1], -1)", "test_no_tokens"),
    "a NaN is swallowed": ("x.float() @ weight.t()", "x.float().nan_to_num() @ weight.t()", "test_what_is_not_finite"),
    "bias is forgotten": ("y = y if bias is None else y + bias", "y = y + 0", "test_product"),
    "16-bit accumulation": ("(x.float() @ weight.t())", "(x.bfloat16() @ weight.bfloat16().t())", "test_product"),
    "pack ignores out": ("out.refill(packed)", "packed", "test_pack"),
    "pack leaves old values": ("out.refill(packed)", "out", "test_pack"),
    "a fake of the wrong shape": (
        "weight.shape[0])\n\n\nclass Dense",
        "weight.shape[1])\n\n\nclass Dense",
        "test_custom_op",
    ),
    "another activation rule": (".amax(-1, keepdim=True) / 127", ".amax(-1, keepdim=True) / 127.5", "test_activation_codes"),
    "scales of activations in bf16": (
        "keepdim=True) / 127",
        "keepdim=True).bfloat16().float() / 127",
        "test_activation_codes",
    ),
    "activations are not quantized": ("(codes * scale).to(x.dtype)", "x", "test_activation_codes"),
}


def _run(pytester: pytest.Pytester, declarations: str, code: str) -> pytest.RunResult:
    pytester.makepyfile(toy_plugin=declarations, toy_code=code, test_toy=TEST)
    return pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider", "--tb=line")


def test_right_plugin_passes(pytester: pytest.Pytester) -> None:
    result = _run(pytester, DECLARATIONS, CODE)
    outcomes = result.parseoutcomes()
    assert outcomes.keys() == {"passed"}, outcomes
    assert outcomes["passed"] > 30


def test_kernels_of_other_hardware_are_planned_and_not_run(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(toy_plugin=DECLARATIONS, toy_code=CODE, test_toy=TEST)
    result = pytester.runpytest_subprocess("--collect-only", "-q")
    found = [line for line in result.outlines if "toy.far" in line]
    assert found
    assert all("declared-only" in line and "test_refusals_say_why" in line for line in found)


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Names of the failed tests of every broken plugin, by test class; all of them run in one process."""
    folder = tmp_path_factory.mktemp("broken")
    tests = ["from qplug_core.testing import FormatConformance, KernelConformance"]
    for i, (old, new, _) in enumerate(BROKEN.values()):
        assert CODE.count(old) == 1, f"{old!r} is there {CODE.count(old)} times"
        (folder / f"code_{i}.py").write_text(CODE.replace(old, new).replace("toy::", f"toy_{i}::"))
        (folder / f"plugin_{i}.py").write_text(DECLARATIONS.replace("toy_code:", f"code_{i}:"))
        tests.append(f"class TestBroken{i}(FormatConformance, KernelConformance):\n    plugin = 'plugin_{i}'")
    (folder / "test_broken.py").write_text("\n\n".join(tests))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=no",
        "--rootdir",
        str(folder),
        str(folder),
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    found: dict[str, set[str]] = {}
    for owner, name in re.findall(r"^FAILED \S*::(TestBroken\d+)::(\w+)", result.stdout, re.MULTILINE):
        found.setdefault(owner, set()).add(name)
    return found


@pytest.mark.parametrize("what", BROKEN)
def test_broken_plugin_fails(failures: dict[str, set[str]], what: str) -> None:
    failed = failures.get(f"TestBroken{list(BROKEN).index(what)}", set())
    assert any(name.startswith(BROKEN[what][2]) for name in failed), f"these failed: {sorted(failed)}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import torch\n", "test_declarations_import_no_torch"),
        ("", "test_implementations_are"),
    ],
)
def test_broken_declarations_fail(pytester: pytest.Pytester, line: str, expected: str) -> None:
    declarations = line + (DECLARATIONS if line else DECLARATIONS.replace("toy.w4", "toy.w5"))
    result = _run(pytester, declarations, CODE)
    assert any(expected in out for out in result.outlines if out.startswith("FAILED")), result.outlines


def test_plugin_with_a_format_only_has_no_kernel_tests(pytester: pytest.Pytester) -> None:
    head, _, _ = DECLARATIONS.partition("@hookimpl\ndef qplug_kernels")
    result = _run(pytester, head, CODE)
    outcomes = result.parseoutcomes()
    assert outcomes.keys() == {"passed"}, outcomes


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("W{2,4}A16 channel|g* sym|asym actorder", 2 * (2 + 2 * 2 * 2)),
        ("W8A8 tensor a:token|tensor.static rules=127|127.5", 4),
    ],
)
def test_schemes_of_a_pattern(pattern: str, count: int) -> None:
    found = schemes_of((pattern,))
    assert len(found) == count
    assert all(SchemePattern(pattern).matches(scheme) for scheme in found)


@pytest.mark.parametrize(
    "name",
    [
        "W4A16_g32",
        "W4A16_g32_asym_actorder",
        "W8A8_static",
        "Wfp8Afp8_b128x128",
        "Wnvfp4Anvfp4",
        "Wmxfp4A16",
        "WNF4A16",
        "W8A16_2:4",
    ],
)
def test_random_weight_is_of_its_scheme(name: str) -> None:
    scheme = QuantScheme.parse(name)
    weight = random_weight(scheme, 70, 300)
    value = weight.dequantize()
    assert weight.scheme == scheme
    assert (weight.zeros is None) == scheme.weight.symmetric  # type: ignore[union-attr]
    assert (weight.group_index is not None) == scheme.act_order
    assert value.isfinite().all()
    assert (value != 0).float().mean() > 0.4
    assert weight.narrow((3, 50), (64, 256)).dequantize().equal(value[3:50, 64:256])


class TestRoundToNearest(QuantizerConformance):
    """The kit on core's own quantizer."""

    plugin = "qplug_core.builtin"
