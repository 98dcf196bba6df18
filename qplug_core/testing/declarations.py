"""Checks of what a plugin declares."""

from __future__ import annotations

import os
import subprocess
import sys

from ..decl import API, FormatDecl, KernelDecl, QuantizerDecl
from ..format import CheckpointFormat
from ..kernel import Kernel
from ..quantizer import Quantizer
from ..samples import schemes_of
from .base import Conformance, device_for, load

_SCRIPT = """
import importlib, sys
from qplug_core.registry import _declared
module = importlib.import_module(sys.argv[1])
_declared(module)
print(module.API, *sorted({"torch", "triton", "transformers"} & set(sys.modules)))
"""


class DeclarationConformance(Conformance):
    """The module imports without torch, and everything that it names is there."""

    def test_declarations_import_no_torch(self) -> None:
        """Discovery costs milliseconds: torch, triton and transformers stay outside of ``plugin.py``."""
        command = [sys.executable, "-c", _SCRIPT, self.module_name()]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        result = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
        assert result.returncode == 0, f"importing {self.module_name()} in a fresh interpreter failed:\n{result.stderr}"
        api, *heavy = result.stdout.split()
        assert not heavy, f"{self.module_name()} imports {', '.join(heavy)}; move that import into the implementation"
        assert api.split(".")[0] == API.split(".")[0], f"API is {api}; this core has {API}"

    def test_something_is_declared(self) -> None:
        """A plugin without declarations is a mistake in its hooks."""
        declared = self.declarations()
        found = [*declared.formats, *declared.kernels, *declared.quantizers, *declared.configs]
        assert found, f"{self.module_name()} declares nothing; mark its functions with @hookimpl"

    def test_declared_schemes_exist(self) -> None:
        """Every pattern means at least one scheme that can be written down."""
        declared = self.declarations()
        decls: list[FormatDecl | KernelDecl | QuantizerDecl] = [*declared.formats, *declared.kernels, *declared.quantizers]
        for decl in decls:
            for pattern in decl.schemes:
                assert schemes_of((pattern,)), f"{decl.name}: no scheme was found in the pattern {pattern!r}"

    def test_implementations_are_what_they_are_declared_as(self) -> None:
        """Each dotted string leads to a class of the contract; kernels carry their declared name."""
        declared = self.declarations()
        for decls, base in (
            (declared.formats, CheckpointFormat),
            (declared.kernels, Kernel),
            (declared.quantizers, Quantizer),
        ):
            for decl in decls:
                found = load(decl.impl)
                assert isinstance(found, base), f"{decl.impl} is no {base.__name__}"
                name = getattr(found, "name", decl.name)
                assert name == decl.name, f"{decl.impl} calls itself {name!r}; it is declared as {decl.name!r}"

    def test_kernel_devices_parse(self) -> None:
        """Each kernel is declared for a device that can be named."""
        for decl in self.declarations().kernels:
            assert device_for(decl)[0].matches_any(decl.devices), f"{decl.name}: no device was found for {decl.devices}"
