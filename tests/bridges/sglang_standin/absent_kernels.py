"""Lets SGLang import on a machine without the GPU builds that it depends on; nothing here computes anything.

``sgl_kernel``, whose CPU build is on no package index: a module with every name, where calling any of them is an error.
``torchvision::nms``: the operator's name, which torchvision's Python code wants of its own GPU build.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
import types


class _Absent(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012
    __version__ = "0.4.10"

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*_, **__):
            raise RuntimeError(f"{self.__name__}.{name} was called, and {self.__name__} is not installed")

        return absent


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and not importlib.metadata.version("torchvision").endswith("+cpu"):
            self._define_operators()
        if name == "sgl_kernel" and importlib.machinery.PathFinder.find_spec(name) is None:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Absent(spec.name)

    def exec_module(self, module):
        pass

    def _define_operators(self):
        import torch

        if not hasattr(self, "library") and torch.__version__.endswith("+cpu"):
            self.library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                self.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


if importlib.machinery.PathFinder.find_spec("sglang"):
    sys.meta_path.insert(0, _Finder())
