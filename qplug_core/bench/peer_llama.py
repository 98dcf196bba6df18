"""llama.cpp's matrix product, through the C interface of the ggml that llama-cpp-python brings."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..device import Device
from ..scheme import QuantScheme
from ..weight import QuantWeight
from .contender import Call, Contender, copies
from .peer import ROUNDS, Peer, integers, unsigned

F32, Q4_0, Q8_0 = 0, 2, 8
"""``enum ggml_type``."""
BLOCK = 32


class LlamaCpp(Peer):
    """``ggml_mul_mat`` with Q4_0 or Q8_0 weights, repacked as llama.cpp does where it knows a layout for this CPU; float32 x."""

    name = "llama.cpp ggml_mul_mat"
    install = "pip install llama-cpp-python"
    modules = ("llama_cpp",)

    def missing(self) -> str:
        """See :class:`Peer`."""
        return super().missing() or (
            "" if _library() is not None else f"llama_cpp brings no libggml-cpu that loads: {self.install}"
        )

    def takes(self, scheme: QuantScheme, n: int, k: int) -> bool:
        """Symmetric 4 or 8 bits whose groups are whole blocks of 32."""
        groups = [integers(scheme, bits, symmetric_only=True) for bits in (4, 8)]
        return any(g is not None and g % BLOCK == 0 for g in groups) and k % BLOCK == 0

    def contender(self, weight: QuantWeight, beyond: int, device: Device) -> Contender:
        """See :class:`Peer`."""
        library = _library()
        assert library is not None
        assert weight.scheme.weight is not None
        kind = Q4_0 if weight.scheme.weight.bits == 4 else Q8_0
        stored = blocks(weight)
        model = _Model(library, weight.n, weight.k, kind, torch.get_num_threads())

        def make(index: int) -> Call:
            model.add(stored)
            return lambda run: model.compute(run, index)

        calls = copies(beyond, stored.nbytes, make)
        note = f"as {'Q4_0' if kind == Q4_0 else 'Q8_0'}{', repacked' if model.repacked else ''}; {ROUNDS}"
        return Contender(self.name, "peer", calls, stored.nbytes, model.prepare, model.product, note)


def blocks(weight: QuantWeight) -> Tensor:
    """uint8 ``[N, K/32, 18 or 34]``: a float16 scale, then 32 codes; of two 4-bit codes in a byte, the low one is 16 columns earlier."""
    assert weight.scheme.weight is not None
    bits, weight = weight.scheme.weight.bits, weight.regroup(1, BLOCK)
    scales = weight.scale_values().half()[..., None].view(torch.uint8)
    if bits == 8:
        return torch.cat([scales, weight.codes.view(weight.n, -1, BLOCK).view(torch.uint8)], dim=-1).contiguous()
    codes = unsigned(weight).view(weight.n, -1, BLOCK)
    return torch.cat([scales, codes[..., :16] | codes[..., 16:] << 4], dim=-1).contiguous()


@dataclass
class _Run:
    """A graph for each copy of the weight with one x of ``m`` rows, and the tensor that the first of them writes."""

    graphs: list[int]
    m: int
    output: int


class _Parameters(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Model:
    """Copies of one weight in ggml, and the graphs that multiply with them."""

    def __init__(self, library: ctypes.CDLL, n: int, k: int, kind: int, threads: int) -> None:
        self.library, self.n, self.k, self.kind = library, n, k, kind
        self.weights: list[int] = []
        self.contexts: list[int] = []
        self.buffers: list[int] = []
        self.repacked = False
        self.backend: int = library.ggml_backend_cpu_init()
        library.ggml_backend_cpu_set_n_threads(self.backend, threads)
        registry = library.ggml_backend_cpu_reg()
        self.device: int = library.ggml_backend_reg_dev_get(registry, 0)
        self.plain: int = library.ggml_backend_cpu_buffer_type()
        self.repack = self._repack_type(registry)

    def _repack_type(self, registry: int) -> int | None:
        address = self.library.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(self.device)
        index = 0
        while kinds and (kind := kinds[index]) is not None:
            if b"REPACK" in self.library.ggml_backend_buft_name(kind):
                return int(kind)
            index += 1
        return None

    def add(self, stored: Tensor) -> None:
        """One more copy of the weight."""
        for where in (self.repack, self.plain):
            if where is None:
                continue
            context = self._context(4)
            weight = self.library.ggml_new_tensor_2d(context, self.kind, self.k, self.n)
            buffer = self._allocate(context, where)
            product = self.library.ggml_mul_mat(context, weight, self.library.ggml_new_tensor_2d(context, F32, self.k, 1))
            if buffer and (where == self.plain or self.library.ggml_backend_dev_supports_op(self.device, product)):
                self.library.ggml_backend_tensor_set(weight, stored.data_ptr(), 0, stored.nbytes)
                self.weights.append(weight)
                self.repacked = where != self.plain
                return
        raise MemoryError(f"ggml gave no buffer of {stored.nbytes} bytes")

    def prepare(self, x: Tensor) -> _Run:
        """x ``[M, K]`` in place, and the graphs for its M."""
        x = x.float().contiguous()
        context = self._context(2 + 4 * len(self.weights), graphs=len(self.weights))
        given = self.library.ggml_new_tensor_2d(context, F32, self.k, x.shape[0])
        products = [self.library.ggml_mul_mat(context, weight, given) for weight in self.weights]
        if not self._allocate(context, self.plain):
            raise MemoryError("ggml gave no buffer for x")
        self.library.ggml_backend_tensor_set(given, x.data_ptr(), 0, x.nbytes)
        graphs = []
        for product in products:
            graph = self.library.ggml_new_graph(context)
            self.library.ggml_build_forward_expand(graph, product)
            graphs.append(graph)
        return _Run(graphs, x.shape[0], products[0])

    def compute(self, run: _Run, index: int) -> _Run:
        """Multiply with one copy."""
        status = self.library.ggml_backend_graph_compute(self.backend, run.graphs[index])
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute gave status {status}")
        return run

    def product(self, run: _Run) -> Tensor:
        """What the first copy gave: float32 ``[M, N]``."""
        y = torch.empty(run.m, self.n)
        self.library.ggml_backend_tensor_get(run.output, y.data_ptr(), 0, y.nbytes)
        return y

    def _context(self, tensors: int, graphs: int = 0) -> int:
        size = (tensors + 2) * self.library.ggml_tensor_overhead() + graphs * self.library.ggml_graph_overhead()
        context: int = self.library.ggml_init(_Parameters(size, None, True))
        self.contexts.append(context)
        return context

    def _allocate(self, context: int, where: int) -> int:
        buffer: int | None = self.library.ggml_backend_alloc_ctx_tensors_from_buft(context, where)
        if buffer:
            self.buffers.append(buffer)
        return buffer or 0

    def __del__(self) -> None:
        for buffer in self.buffers:
            self.library.ggml_backend_buffer_free(buffer)
        for context in self.contexts:
            self.library.ggml_free(context)
        self.library.ggml_backend_free(self.backend)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """ggml's CPU backend with its prototypes, or None where llama_cpp has none that loads."""
    spec = importlib.util.find_spec("llama_cpp")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        with contextlib.suppress(OSError):
            base = ctypes.CDLL(str(Path(folder, "lib", "libggml-base.so")), mode=ctypes.RTLD_GLOBAL)
            cpu = ctypes.CDLL(str(Path(folder, "lib", "libggml-cpu.so")))
            return _declared(base, cpu)
    return None


def _declared(base: ctypes.CDLL, cpu: ctypes.CDLL) -> ctypes.CDLL:
    """The functions that are used, by their signatures in ggml.h, ggml-alloc.h, ggml-backend.h and ggml-cpu.h; ``cpu`` has all."""
    pointer = c_void_p
    signatures: dict[ctypes.CDLL, dict[str, tuple[Any, ...]]] = {
        base: {
            "ggml_init": (pointer, _Parameters), "ggml_free": (None, pointer),
            "ggml_tensor_overhead": (c_size_t,), "ggml_graph_overhead": (c_size_t,),
            "ggml_new_tensor_2d": (pointer, pointer, c_int, c_int64, c_int64), "ggml_mul_mat": (pointer, pointer, pointer, pointer),
            "ggml_new_graph": (pointer, pointer), "ggml_build_forward_expand": (None, pointer, pointer),
            "ggml_backend_alloc_ctx_tensors_from_buft": (pointer, pointer, pointer),
            "ggml_backend_tensor_set": (None, pointer, pointer, c_size_t, c_size_t),
            "ggml_backend_tensor_get": (None, pointer, pointer, c_size_t, c_size_t),
            "ggml_backend_graph_compute": (c_int, pointer, pointer), "ggml_backend_free": (None, pointer),
            "ggml_backend_buffer_free": (None, pointer), "ggml_backend_buft_name": (c_char_p, pointer),
            "ggml_backend_reg_get_proc_address": (pointer, pointer, c_char_p), "ggml_backend_reg_dev_get": (pointer, pointer, c_size_t),
            "ggml_backend_dev_supports_op": (c_bool, pointer, pointer), "ggml_backend_cpu_buffer_type": (pointer,),
        },
        cpu: {
            "ggml_backend_cpu_init": (pointer,), "ggml_backend_cpu_reg": (pointer,),
            "ggml_backend_cpu_set_n_threads": (None, pointer, c_int),
        },
    }  # fmt: skip
    for library, functions in signatures.items():
        for name, (result, *arguments) in functions.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(cpu, name, function)
    return cpu
