"""The conformance kit for plugin authors: subclass, name the plugin, run pytest.

::

    from qplug_core.testing import PluginConformance

    class TestConformance(PluginConformance):
        plugin = "int8"

``plugin`` is the name of an entry point of the group ``qplug.plugins``, or a module ``package.plugin``. Everything that it
declares is tested, over every scheme that a declaration names; what it does not declare makes no test. A kernel for
hardware that this machine lacks is planned and not run: its test ids end in ``declared-only``.
"""

from .base import Conformance
from .declarations import DeclarationConformance
from .formats import FormatConformance
from .kernels import KernelConformance
from .quantizers import QuantizerConformance
from .weights import random_weight


class PluginConformance(DeclarationConformance, FormatConformance, KernelConformance, QuantizerConformance):
    """Every check of the kit."""


__all__ = [
    "Conformance",
    "DeclarationConformance",
    "FormatConformance",
    "KernelConformance",
    "PluginConformance",
    "QuantizerConformance",
    "random_weight",
]
