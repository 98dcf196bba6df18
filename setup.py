"""What pyproject.toml has no field for: the hook for transformers beside the package, and compiled kernels in the wheel.

``QPLUG_PREBUILD=1 python -m build --wheel`` compiles every C source for every instruction set (minutes), which makes a wheel of one
platform that needs no compiler. Without it the wheel is of any platform, and kernels are compiled where they are used first.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HOOK = "qplug_transformers_hook"
SOURCE = "qplug_core/bridges/transformers/hook.py"
KERNELS = "qplug_core/kernels"
PREBUILD = os.environ.get("QPLUG_PREBUILD", "0") not in ("", "0")


class Build(build_py):
    """setuptools has no field for files at the root of site-packages that are not modules, nor for objects without Python in them."""

    def run(self) -> None:
        """Build, and add the files. An editable install has none of them: register() is called there, and kernels are compiled."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib)
        self.copy_file(SOURCE, str(target / f"{HOOK}.py"))
        (target / f"{HOOK}.pth").write_text(f"import {HOOK}\n", encoding="utf-8")
        if PREBUILD:
            prebuild(target / KERNELS)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """What was built, with the files that were added."""
        folder = Path(self.build_lib)
        own = [] if self.editable_mode else [str(folder / f"{HOOK}{suffix}") for suffix in (".py", ".pth")]
        objects = [] if self.editable_mode else [str(path) for path in (folder / KERNELS).glob("*.so")]
        return [*super().get_outputs(include_bytecode), *own, *objects]


class Wheel(bdist_wheel):
    """Compiled kernels know nothing of Python: their wheel is of one platform, and of any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform."""
        return ("py3", "none", super().get_tag()[2])


class Core(Distribution):
    """Of one platform where kernels are compiled into it."""

    def has_ext_modules(self) -> bool:
        """Whether the wheel is of one platform."""
        return PREBUILD


def prebuild(folder: Path) -> None:
    """Compile every kernel for every instruction set into ``folder``, under the names that the builder looks for."""
    sys.path.insert(0, str(Path(__file__).parent))
    from qplug_core.kernels import builder
    from qplug_core.support import Refusal

    if platform.machine() not in ("x86_64", "AMD64"):
        raise SystemExit(f"QPLUG_PREBUILD is set on {platform.machine()}; kernels are compiled on x86-64 only, so unset it")
    for old in folder.glob("*.so"):
        old.unlink()
    found = builder.compiler()
    if isinstance(found, Refusal):
        raise SystemExit(f"QPLUG_PREBUILD is set, and kernels cannot be compiled: {found}")
    command, _ = found

    def compiled(name: str, chosen: str) -> object:
        target = folder / f"{name}-{chosen}-{builder.source_digest(name)}.so"
        return builder.compile_to(target, name, [*command, *builder.FLAGS, *builder.SETS[chosen]])

    # The largest first, so that no processor waits for it at the end.
    sources = sorted(builder.FOLDER.glob("*.c"), key=lambda path: path.stem != "weight_only")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = [pool.submit(compiled, path.stem, chosen) for path in sources for chosen in builder.SETS]
    for result in done:
        if isinstance(result.result(), Refusal):
            raise SystemExit(f"QPLUG_PREBUILD is set, and a kernel does not compile: {result.result()}")


setup(cmdclass={"build_py": Build, "bdist_wheel": Wheel}, distclass=Core)
