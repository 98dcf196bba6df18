"""Puts qplug_transformers_hook.py and its .pth into the wheel, beside the package; pyproject.toml says everything else."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HOOK = "qplug_transformers_hook"
SOURCE = "qplug_core/bridges/transformers/hook.py"


class BuildWithHook(build_py):
    """setuptools has no field for files at the root of site-packages that are not modules."""

    def run(self) -> None:
        """Build, and add the two files. An editable install has neither: register() is called there."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib)
        self.copy_file(SOURCE, str(target / f"{HOOK}.py"))
        (target / f"{HOOK}.pth").write_text(f"import {HOOK}\n", encoding="utf-8")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """What was built, with the two files."""
        own = [] if self.editable_mode else [str(Path(self.build_lib) / f"{HOOK}{suffix}") for suffix in (".py", ".pth")]
        return [*super().get_outputs(include_bytecode), *own]


setup(cmdclass={"build_py": BuildWithHook})
