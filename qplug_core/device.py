"""Device: facts about the hardware that a layer runs on. Found without torch, or named, so that a plan needs no hardware."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from .errors import DeviceError

Vendor = Literal["cpu", "nvidia", "amd"]

CPU_SETS: dict[str, tuple[str, ...]] = {
    "avx2": (),
    "avx512": ("avx2",),
    "avx512_vnni": ("avx512", "avx2"),
    "avx512_bf16": ("avx512_vnni", "avx512", "avx2"),
    "amx": ("amx_int8", "amx_bf16", "avx512_bf16", "avx512_vnni", "avx512", "avx2"),
    "neon": (),
    "i8mm": ("neon",),
    "sve": ("neon",),
}
"""Instruction sets by name, from old to new in each family, with those that each implies. ``avx2`` means FMA and F16C too;
``avx512`` means F, BW, DQ and VL; ``avx512_bf16`` means VBMI too, which all but Cooper Lake have; ``amx`` means the int8 and the bf16 tiles."""

CPU_FEATURES = frozenset([*CPU_SETS, "amx_int8", "amx_bf16"])

_X86_FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_vnni": {"avx512_vnni"},
    "avx512_bf16": {"avx512_bf16", "avx512vbmi"},
    "amx_int8": {"amx_tile", "amx_int8"},
    "amx_bf16": {"amx_tile", "amx_bf16"},
    "amx": {"amx_tile", "amx_int8", "amx_bf16"},
}
_ARM_FLAGS = {"neon": {"asimd"}, "i8mm": {"i8mm"}, "sve": {"sve"}}

# Shared memory that one block may use, in KiB: CUDA C++ programming guide, table "Technical Specifications per Compute
# Capability" (opt-in limit); for AMD the LDS of a workgroup in the instruction set manuals.
_SHARED_KIB = {
    "sm_70": 96, "sm_72": 96, "sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227,
    "sm_100": 227, "sm_103": 227, "sm_110": 227, "sm_120": 99, "sm_121": 99,
    "gfx90a": 64, "gfx942": 64, "gfx950": 160, "gfx1100": 64, "gfx1101": 64, "gfx1102": 64, "gfx1103": 64,
    "gfx1150": 64, "gfx1151": 64, "gfx1200": 64, "gfx1201": 64,
}  # fmt: skip

_AMD_FEATURES = {
    "gfx90a": ("int8", "bf16"),
    "gfx942": ("int8", "bf16", "fp8", "fp8_fnuz"),
    "gfx950": ("int8", "bf16", "fp8", "fp4"),
}
_CDNA = ("gfx90a", "gfx942", "gfx950")

_BOARDS = {
    "v100": ("sm_70", "NVIDIA V100", 32), "t4": ("sm_75", "NVIDIA T4", 16), "a100": ("sm_80", "NVIDIA A100", 80),
    "a10": ("sm_86", "NVIDIA A10", 24), "a40": ("sm_86", "NVIDIA A40", 48), "rtx3090": ("sm_86", "GeForce RTX 3090", 24),
    "orin": ("sm_87", "NVIDIA Jetson AGX Orin", 64), "l4": ("sm_89", "NVIDIA L4", 24), "l40s": ("sm_89", "NVIDIA L40S", 48),
    "rtx4090": ("sm_89", "GeForce RTX 4090", 24), "h100": ("sm_90", "NVIDIA H100", 80), "h200": ("sm_90", "NVIDIA H200", 141),
    "b200": ("sm_100", "NVIDIA B200", 180), "b300": ("sm_103", "NVIDIA B300", 288), "thor": ("sm_110", "NVIDIA Jetson Thor", 128),
    "rtx5090": ("sm_120", "GeForce RTX 5090", 32), "gb10": ("sm_121", "NVIDIA GB10", 128),
    "mi210": ("gfx90a", "AMD Instinct MI210", 64), "mi250x": ("gfx90a", "AMD Instinct MI250X (one die)", 64),
    "mi300x": ("gfx942", "AMD Instinct MI300X", 192), "mi325x": ("gfx942", "AMD Instinct MI325X", 256),
    "mi350x": ("gfx950", "AMD Instinct MI350X", 288), "mi355x": ("gfx950", "AMD Instinct MI355X", 288),
    "rx7900xtx": ("gfx1100", "Radeon RX 7900 XTX", 24), "rx9070xt": ("gfx1201", "Radeon RX 9070 XT", 16),
}  # fmt: skip

REPORTED = (
    "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx", "neon", "i8mm",
    "sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120",
    "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201",
)  # fmt: skip
"""The hardware columns of the capability matrix: names for :meth:`Device.from_name`, the same on every machine."""

CPUINFO = Path("/proc/cpuinfo")
KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")

_SM = re.compile(r"sm_(\d+)(?:(\+)|-sm_(\d+))?")
_GFX = re.compile(r"gfx[0-9a-f]+[+*]?")


@dataclass(frozen=True)
class Device:
    """What is known of one device.

    vendor
        ``cpu``, ``nvidia`` or ``amd``.
    arch
        ``sm_90``, ``gfx942``; for a CPU its newest instruction set, ``avx512_vnni``, or ``cpu`` where it has none that counts.
    name
        For people: ``NVIDIA H100``.
    memory, shared_memory
        Bytes of the whole device, and of shared memory that one block may use; 0 where unknown.
    features
        For a CPU, instruction sets (:data:`CPU_SETS`). For a GPU, number types that its matrix units multiply: ``int8``,
        ``bf16``, ``fp8`` (with ``fp8_fnuz`` where zero has no sign and the largest value is 240), ``fp4``.
    count, index
        Devices of this vendor in the machine, and which of them this is.
    """

    vendor: Vendor
    arch: str
    name: str
    memory: int = 0
    features: frozenset[str] = frozenset()
    count: int = 1
    index: int = 0
    shared_memory: int = 0

    @classmethod
    def current(cls) -> Device:
        """The first GPU of this machine, or its CPU."""
        return local_devices()[0]

    @classmethod
    def cpu(cls) -> Device:
        """The CPU of this machine."""
        return _local_cpu()

    @classmethod
    def from_name(cls, name: str) -> Device:
        """The device that ``name`` means.

        ``cpu``, ``cuda``, ``cuda:1`` and ``rocm`` are in this machine. An instruction set (``avx512_vnni``), an
        architecture (``sm_90``, ``gfx942``) or a board (``h100``, ``mi300x``) need not be.

        :raises DeviceError: for a name that is unknown, with the names that are close, or a device that is not here.
        """
        text = name.strip().lower()
        if text == "cpu":
            return cls.cpu()
        if found := re.fullmatch(r"(cuda|rocm|hip)(?::(\d+))?", text):
            return _local_gpu(text, found[1], int(found[2] or 0))
        if text in CPU_SETS:
            return cls("cpu", text, f"any CPU with {text}", features=frozenset([text, *CPU_SETS[text]]))
        plain = re.sub(r"[\s_-]|nvidia|amd|instinct|geforce|radeon", "", text)
        if plain in _BOARDS:
            arch, board, gib = _BOARDS[plain]
            return replace(_gpu(arch), name=board, memory=gib * 2**30)
        # sm_90a and sm_100f are the same hardware as sm_90 and sm_100: the letter is about code, not about the device.
        arch = re.sub(r"^sm(\d+)[af]?$", r"sm_\1", plain)
        if arch in _SHARED_KIB:
            return _gpu(arch)
        known = ["cpu", "cuda", "rocm", *CPU_SETS, *_SHARED_KIB, *_BOARDS]
        close = get_close_matches(text, known, n=4) or list(REPORTED)
        raise DeviceError(f"device {name!r} is unknown; close or known names are {', '.join(close)}")

    def matches(self, pattern: str) -> bool:
        """True where this device is one of those that ``pattern`` means.

        ``any``, ``cpu``, ``cuda``, ``rocm``; ``avx512_vnni`` (a CPU that has it); ``sm_80`` exactly, ``sm_80+`` that or
        newer, ``sm_80-sm_89`` from the first to the last; ``gfx942`` exactly, ``gfx11*`` a family, ``gfx90a+`` that or a newer
        CDNA (gfx90a, gfx942, gfx950; RDNA is another line and never newer).

        :raises DeviceError: for text that is no pattern.
        """
        check_pattern(pattern)
        if pattern in ("any", "cpu", "cuda", "rocm"):
            return pattern == "any" or self.vendor == {"cpu": "cpu", "cuda": "nvidia", "rocm": "amd"}[pattern]
        if pattern in CPU_FEATURES:
            return self.vendor == "cpu" and pattern in self.features
        if found := _SM.fullmatch(pattern):
            if self.vendor != "nvidia":
                return False
            low, newer, high = int(found[1]), found[2], found[3]
            mine = int(self.arch.removeprefix("sm_"))
            return mine >= low if newer else low <= mine <= int(high or low)
        if self.vendor != "amd":
            return False
        if pattern.endswith("*"):
            return self.arch.startswith(pattern[:-1])
        if pattern.endswith("+"):
            return self.arch in _CDNA[_CDNA.index(pattern[:-1]) :]
        return self.arch == pattern

    def matches_any(self, patterns: Iterable[str]) -> bool:
        """True where one of ``patterns`` means this device."""
        return any(self.matches(pattern) for pattern in patterns)

    def torch_device(self) -> str:
        """What torch calls it: ``cpu`` or ``cuda:0`` (AMD too)."""
        return "cpu" if self.vendor == "cpu" else f"cuda:{self.index}"

    def to_json(self) -> dict[str, object]:
        """All facts, as JSON holds them."""
        return {
            "vendor": self.vendor,
            "arch": self.arch,
            "name": self.name,
            "memory": self.memory,
            "shared_memory": self.shared_memory,
            "features": sorted(self.features),
            "count": self.count,
            "index": self.index,
        }

    def __str__(self) -> str:
        return f"{self.arch} ({self.name})"


def check_pattern(pattern: str) -> None:
    """Check that ``pattern`` is one that :meth:`Device.matches` understands.

    :raises DeviceError: where it is not.
    """
    if pattern in ("any", "cpu", "cuda", "rocm") or pattern in CPU_FEATURES or _SM.fullmatch(pattern):
        return
    if _GFX.fullmatch(pattern):
        if not pattern.endswith("+") or pattern[:-1] in _CDNA:
            return
        raise DeviceError(f"device pattern {pattern!r} has no order of newer devices; only {', '.join(_CDNA)} take a '+'")
    raise DeviceError(
        f"device pattern {pattern!r} is not understood; write any, cpu, cuda, rocm, an instruction set "
        f"({', '.join(sorted(CPU_FEATURES))}), sm_80, sm_80+, sm_80-sm_89, gfx942, gfx90a+ or gfx11*"
    )


def local_devices() -> list[Device]:
    """Every device of this machine that is visible to this process: GPUs first, the CPU last."""
    return [*_local_nvidia(), *_local_amd(), Device.cpu()]


def _gpu(arch: str) -> Device:
    """A GPU by its architecture, with what is publicly known of it."""
    shared = _SHARED_KIB.get(arch, 0) * 1024
    if arch.startswith("sm_"):
        number = int(arch.removeprefix("sm_"))
        since = {"int8": 72, "bf16": 80, "fp8": 89, "fp4": 100}
        features = frozenset(f for f, first in since.items() if number >= first)
        return Device("nvidia", arch, f"any {arch} GPU", features=features, shared_memory=shared)
    features = frozenset(_AMD_FEATURES.get(arch, ()))
    if re.match(r"gfx1[12]", arch):
        features = frozenset(("int8", "bf16", "fp8") if arch.startswith("gfx12") else ("int8", "bf16"))
    return Device("amd", arch, f"any {arch} GPU", features=features, shared_memory=shared)


def _local_gpu(text: str, backend: str, index: int) -> Device:
    found = _local_nvidia() if backend == "cuda" else ()
    found = found or _local_amd()
    if index >= len(found):
        here = ", ".join(d.torch_device() + f" {d.name}" for d in found) or "none"
        raise DeviceError(
            f"device {text!r} is not in this machine; GPUs found: {here}; name an architecture, such as sm_90, to plan for one"
        )
    return found[index]


def _local_cpu() -> Device:
    fields: dict[str, str] = {}
    if sys.platform == "darwin":
        flags, name = _darwin_cpu()
    else:
        if CPUINFO.exists():
            for line in CPUINFO.read_text(errors="replace").splitlines():
                key, _, value = line.partition(":")
                fields.setdefault(key.strip().lower(), value.strip())
        flags = set((fields.get("flags") or fields.get("features") or "").split())
        name = fields.get("model name") or platform.machine()
    table = _X86_FLAGS if "asimd" not in flags else _ARM_FLAGS
    features = frozenset(feature for feature, needed in table.items() if needed <= flags)
    newest = [name for name in CPU_SETS if name in features]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return Device("cpu", newest[-1] if newest else "cpu", name, memory, features)


def _darwin_cpu() -> tuple[set[str], str]:
    """Flags in Linux spelling, and the brand string, of a Mac."""

    def ask(key: str) -> str:
        return subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False).stdout.strip()

    name = ask("machdep.cpu.brand_string")
    if platform.machine() == "arm64":
        return {"asimd"} | ({"i8mm"} if ask("hw.optional.arm.FEAT_I8MM") == "1" else set()), name
    words = f"{ask('machdep.cpu.features')} {ask('machdep.cpu.leaf7_features')}".lower().split()
    return set(words), name


@functools.cache
def _local_nvidia() -> tuple[Device, ...]:
    """NVIDIA GPUs, asked of the driver in another process: initialising CUDA here would break every later fork."""
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1" if os.name == "posix" else "nvcuda.dll")
    except OSError:
        return ()
    probe = Path(__file__).with_name("_cuda_probe.py")
    done = subprocess.run([sys.executable, "-I", "-S", str(probe)], capture_output=True, text=True, check=False)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return tuple(
        replace(_gpu(arch), name=name, memory=int(memory), shared_memory=int(shared), count=len(rows), index=index)
        for index, (arch, memory, shared, name) in enumerate(rows)
    )


@functools.cache
def _local_amd() -> tuple[Device, ...]:
    """AMD GPUs, from the topology that the kernel driver shows."""
    found = []
    for node in sorted(KFD_NODES.glob("*"), key=lambda path: int(path.name)):
        version = int(_properties(node / "properties").get("gfx_target_version", "0"))
        if version:
            # 90402 is gfx942, 110000 is gfx1100: two decimal digits each for minor and stepping, which print as hexadecimal.
            arch = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
            banks = [_properties(path) for path in node.glob("mem_banks/*/properties")]
            memory = sum(int(bank.get("size_in_bytes", "0")) for bank in banks)
            found.append(replace(_gpu(arch), name=f"AMD {arch}", memory=memory))
    visible = os.environ.get("HIP_VISIBLE_DEVICES", os.environ.get("ROCR_VISIBLE_DEVICES"))
    if visible is not None:
        chosen = [int(word) for word in visible.split(",") if word.strip().isdigit()]
        found = [found[i] for i in chosen if i < len(found)]
    return tuple(replace(device, count=len(found), index=index) for index, device in enumerate(found))


def _properties(path: Path) -> dict[str, str]:
    """A sysfs file of ``name value`` lines."""
    return dict(line.split(maxsplit=1) for line in path.read_text().splitlines() if " " in line)
