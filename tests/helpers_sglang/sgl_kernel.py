"""A stand-in for SGLang's CUDA kernels, whose library does not load without CUDA: names, none of which a CPU calls."""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__path__: list[str] = []


class Kernel:
    """Whatever is imported from here; an error where it is called."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, name: str) -> "Kernel":
        return _named(f"{self.name}.{name}")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{self.name} is a kernel for GPUs")


def _named(name: str) -> Kernel:
    if name.rpartition(".")[2].startswith("__"):
        raise AttributeError(name)
    return Kernel(name)


def __getattr__(name: str) -> Kernel:
    return _named(name)


class Part(ModuleType):
    """A module within this one."""

    def __getattr__(self, name: str) -> Kernel:
        return _named(f"{self.__name__}.{name}")


class Finder(MetaPathFinder, Loader):
    """Finds a part for every name."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith("sgl_kernel.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Part(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.append(Finder())
