"""Without triton (CPU): let SGLang define its triton kernels, which a CPU never runs.

SGLang ships the mock itself, for Apple machines, in `sglang/_platform_stubs.py`; this module loads that file and asks
for its triton part alone. It is read by path, because importing `sglang` first would already need triton.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from pathlib import Path
from unittest import mock

import torch


def ensure() -> str | None:
    """Make `import triton` work. Returns a description of the stand-in, or None where triton is installed."""
    if "triton" not in sys.modules:
        if importlib.util.find_spec("triton") is not None:
            return None
        _install_sglangs_own_mock()
    return "triton (SGLang's own mock: kernels are defined, never run)"


def _install_sglangs_own_mock() -> None:
    sglang = importlib.util.find_spec("sglang")
    assert sglang is not None
    assert sglang.origin is not None
    file = Path(sglang.origin).with_name("_platform_stubs.py")
    if not file.is_file():
        raise ValueError(f"this SGLang has no {file.name}, which a CPU without triton needs; use SGLang 0.5.20")
    spec = importlib.util.spec_from_file_location("_sglang_platform_stubs", file)
    assert spec is not None
    assert spec.loader is not None
    stubs = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = stubs
    spec.loader.exec_module(stubs)
    # It acts only on an Apple machine with a GPU, and would there also change how torch copies: ask for triton alone.
    stubs._patch_non_blocking = lambda: None
    with (
        mock.patch.object(sys, "platform", "darwin"),
        mock.patch.object(platform, "machine", return_value="arm64"),
        mock.patch.object(torch.backends.mps, "is_available", return_value=True),
    ):
        stubs.install_platform_stubs()
    assert "triton" in sys.modules
