"""Lets torchvision import where its compiled ops do not load (its PyPI wheel beside a CPU-only torch).

torchvision describes two of its ops to torch at import time and fails if they are not registered. Image processors
never call them, so their schemas are enough; calling one still fails, as it should.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

_declared: list[object] = []  # torch drops the schemas together with the Library object that defined them


def ensure() -> str | None:
    """Imports torchvision; declares its missing ops if that is what the import fails on.

    Returns: a description of the stand-in, or None where torchvision works by itself or is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    if not _declared:
        try:
            importlib.import_module("torchvision")
            return None
        except RuntimeError as error:
            if "torchvision::nms" not in str(error):
                raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # the failed import left some submodules behind
        _declare()
        importlib.import_module("torchvision")
    return "torchvision::nms, qnms: schemas only (torchvision's compiled ops do not load here)"


def _declare() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
