"""Runs at the start of every interpreter of an environment that has the qplug-core wheel, as ``qplug_transformers_hook.pth`` says.

It puts one finder on ``sys.meta_path``, which waits for ``transformers.quantizers.auto``, tells qplug of it, and is gone. Nothing of
qplug is imported before. ``QPLUG_TRANSFORMERS=0`` leaves it out. docs/decisions/0005-transformers-discovery.md has the reasons and costs.
"""

import os
import sys

# typing takes longer to import than all of this, and __future__ a quarter of it: so annotations are strings.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType

HOOK = "qplug_transformers_hook"
"""The name of this file in a wheel, beside the packages; here it only lends :func:`when_imported`."""


class Finder:
    """Waits for one module, and calls ``call`` when that was executed."""

    def __init__(self, name: str, call: "Callable[[], object]") -> None:
        self.name = name
        self.call = call

    def find_spec(self, name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        """The spec of the module that is waited for; None for everything else."""
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: "ModuleType") -> None:
                execute(module)
                self.call()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def when_imported(name: str, call: "Callable[[], object]") -> None:
    """Call ``call`` once: now, if ``name`` is imported already, or right after it is."""
    if name in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, Finder(name, call))


def tell_qplug() -> None:
    """qplug takes its place in transformers, which has to import without qplug too."""
    try:
        from qplug_core.bridges.transformers import autoload

        autoload()
    except Exception as error:
        import warnings

        warnings.warn(f"qplug stays out of transformers ({type(error).__name__}: {error}); see qplug doctor", stacklevel=2)


if __name__ == HOOK and os.environ.get("QPLUG_TRANSFORMERS") != "0":
    when_imported("transformers.quantizers.auto", tell_qplug)
