"""Versions of distributions, as both sides write them down; standard library only."""

from __future__ import annotations

import sys
from importlib import metadata

UNKNOWN = "unknown"


def version_of(distribution: str) -> str:
    """The version of a distribution as it is installed, else the `__version__` of its module, if that is imported.

    A package may run without being installed: from a source tree on PYTHONPATH, or from a folder of files that somebody
    has copied. What is then not known is "unknown": a version is something to write down, and no reason to end a run.
    """
    try:
        found = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        found = None
    found = found or getattr(sys.modules.get(distribution.replace("-", "_")), "__version__", None)
    return str(found) if found else UNKNOWN
