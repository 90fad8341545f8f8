"""Without sgl_kernel (SGLang's compiled kernels have no CPU wheel): a package whose names import and whose calls raise.

So SGLang's import chain runs, its plain-torch paths run, and a path that would need a kernel fails loudly by name. The
exceptions are the operators of `gdn_ops`, which have plain-torch versions.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

PACKAGE = "sgl_kernel"
_REALLY_ABSENT = f"{PACKAGE}.scalar_type"  # SGLang catches its ImportError and takes its own definition


def ensure() -> str | None:
    """Make `import sgl_kernel` work. Returns a description of the stand-in, or None where the real one is installed."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        if importlib.util.find_spec(PACKAGE) is not None:
            return None
        sys.meta_path.append(_Finder())
        from feature_bridge.cpu_stand_ins import gdn_ops

        gdn_ops.register()
    return "sgl_kernel (importable only; the gated delta net in plain torch, whole prompts only)"


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers `import sgl_kernel` and `import sgl_kernel.anything`."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        ours = fullname == PACKAGE or (fullname.startswith(PACKAGE + ".") and fullname != _REALLY_ABSENT)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == f"{PACKAGE}.mamba":
            from feature_bridge.cpu_stand_ins import gdn_ops

            vars(module).update(gdn_ops.MAMBA_FUNCTIONS)


class _StandIn(ModuleType):
    __version__ = "0.0.0+cpu.stand.in"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def kernel(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"{self.__name__}.{name} needs sgl_kernel, which is not installed")

        kernel.__name__ = name
        return kernel
