"""Builds the C kernels with the system compiler, for the instruction sets of this CPU, and loads them.

An object that was built beforehand and lies beside its source (``weight_only-avx2-<digest>.so``, in a wheel) is taken first.
Otherwise the source is compiled once into ``$XDG_CACHE_HOME/qplug`` (``~/.cache/qplug``), under a name that tells source, flags and
compiler; where that cannot be written, into a temporary folder. What cannot be built is a refusal, never an exception.

OpenMP is not linked: its symbols are those that torch has loaded already, so that there is one pool of threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..device import Device
from ..support import Refusal

FOLDER = Path(__file__).parent
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp")
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
SETS: dict[str, tuple[str, ...]] = {
    "avx512_bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi"),
    "avx512_vnni": (*_AVX512, "-mavx512vnni"),
    "avx512": _AVX512,
    "avx2": _AVX2,
}
"""Instruction sets that kernels are compiled for, best first, with the flags of GCC and Clang."""


VARIABLE = "QPLUG_CPU_SET"
"""The environment variable that names an instruction set to be taken in place of better ones."""
_INCLUDE = re.compile(rb'^#include "(.+)"', re.MULTILINE)


def instruction_set(device: Device) -> str | None:
    """The best set that kernels are compiled for and that ``device`` has, from the one in ``$QPLUG_CPU_SET`` down, or None."""
    names = list(SETS)
    wanted = os.environ.get(VARIABLE, names[0])
    return next((name for name in names[names.index(wanted) if wanted in names else 0 :] if name in device.features), None)


@functools.cache
def load(name: str) -> ctypes.CDLL | Refusal:
    """The kernels of ``<name>.c`` for the CPU of this machine, built if needed; a refusal with the reason where that fails."""
    chosen = instruction_set(Device.cpu())
    if chosen is None:
        return Refusal(
            "device", f"a CPU with {', '.join(sorted(Device.cpu().features)) or 'no vector unit known here'}", "AVX2"
        )
    found = build(name, chosen)
    return found if isinstance(found, Refusal) else _open(found)


def build(name: str, chosen: str) -> Path | Refusal:
    """The shared object of ``<name>.c`` for the instruction set ``chosen``: prebuilt, from the cache, or compiled now."""
    digest = source_digest(name)
    prebuilt = FOLDER / f"{name}-{chosen}-{digest}.so"
    if prebuilt.exists():
        return prebuilt
    found = compiler()
    if isinstance(found, Refusal):
        return found
    command, version = found
    flags = (*FLAGS, *SETS[chosen])
    key = hashlib.sha256("\0".join([digest, version, *command, *flags]).encode()).hexdigest()[:16]
    folder = _cache_folder()
    target = folder / f"{name}-{chosen}-{key}.so"
    return target if target.exists() else compile_to(target, name, [*command, *flags])


def source_digest(name: str) -> str:
    """Hash of a source and of all that it includes from beside it, part of the name of a prebuilt object."""
    digest = hashlib.sha256()
    found = [f"{name}.c"]
    for file in found:
        content = (FOLDER / file).read_bytes()
        digest.update(content)
        found += [new for line in _INCLUDE.findall(content) if (new := line.decode()) not in found]
    return digest.hexdigest()[:16]


def compile_to(target: Path, name: str, command: list[str]) -> Path | Refusal:
    """Compile ``<name>.c`` to the shared object ``target``, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        relocatable, shared = Path(folder, "kernel.o"), Path(folder, "kernel.so")
        # Two steps, because -fopenmp at the link would bring a second OpenMP runtime.
        linker = [word for word in command if word != "-fopenmp"]
        for step in (
            [*command, "-c", str(FOLDER / f"{name}.c"), "-o", str(relocatable)],
            [*linker, "-shared", str(relocatable), "-o", str(shared)],
        ):
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
                return Refusal(
                    "requires", f"a C compiler that failed ({reason})", "GCC 9 or Clang 10 and newer", "set CC to one"
                )
        os.replace(shared, target)
    return target


def compiler() -> tuple[list[str], str] | Refusal:
    """The compiler of the environment (``CC``, or ``cc``) as a command, and the first line of its version."""
    command = shlex.split(os.environ.get("CC", "cc"))
    if not command or not shutil.which(command[0]):
        have = f"no C compiler ({command[0] if command else 'CC is empty'} was not found)"
        return Refusal("requires", have, "a C compiler, or a wheel with built kernels", "install gcc, or set CC")
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return command, (done.stdout.splitlines() or [""])[0]


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(home) if home else Path.home() / ".cache") / "qplug"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _temporary_folder()
    return folder if os.access(folder, os.W_OK) else _temporary_folder()


@functools.cache
def _temporary_folder() -> Path:
    """A folder of this process alone: one that others could write to must not be loaded code from."""
    return Path(tempfile.mkdtemp(prefix="qplug-"))


def _open(path: Path) -> ctypes.CDLL | Refusal:
    # The import puts torch's OpenMP runtime among the global symbols, where the loader looks for ours.
    import torch  # noqa: F401

    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        return Refusal(
            "requires", f"built kernels that do not load ({error})", "a torch with OpenMP", f"delete {path} if it is stale"
        )


@functools.cache
def _this_cpu() -> Device:
    """Facts of a CPU are read from a file, and kernels are asked about every layer."""
    return Device.cpu()


def refusals(name: str, device: Device) -> list[Refusal]:
    """Why the kernels of ``<name>.c`` do not run on ``device``. A CPU that is not this one is judged by its facts alone."""
    if device.vendor != "cpu" or instruction_set(device) is None:
        return [Refusal("device", str(device), "a CPU with AVX2", "choose another device")]
    if device != _this_cpu():
        return []
    found = load(name)
    return [found] if isinstance(found, Refusal) else []


def library(name: str) -> ctypes.CDLL:
    """The loaded kernels of ``<name>.c``.

    :raises NoKernel: where there are none, with the reason.
    """
    from ..errors import NoKernel

    found = load(name)
    if isinstance(found, Refusal):
        raise NoKernel(f"the C kernels {name!r} cannot run here: {found}")
    return found
