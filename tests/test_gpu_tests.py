"""`make gpu-test` where there is no GPU: said in one sentence, and the tests left out elsewhere say why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SMI = """#!/bin/sh
case "$*" in *name,memory*) echo "NVIDIA H200, {used}, 143771";; *memory.used*) echo {used};; esac
"""


def pytest_of(tmp_path, *, used: int | None = None, **env: str) -> subprocess.CompletedProcess:
    """The GPU's tests, with an nvidia-smi that says how much of an H200 is in use, or none."""
    if used is not None:
        (tmp_path / "nvidia-smi").write_text(SMI.format(used=used))
        (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"  # so that sh is found, and a GPU of this machine is not
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAXDRAFT_")}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment | {"PATH": path} | env, capture_output=True, text=True, timeout=300
    )


def test_they_are_left_out_with_the_reason(tmp_path):
    done = pytest_of(tmp_path)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "NVIDIA GPU: `make gpu-test` runs it there" in done.stdout
    assert "passed" not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("used", "python", "sentence"),
    [
        (20_000, None, "needs a GPU of its own, and 20000 of the 143771 MiB of NVIDIA H200 are in use"),
        (4, "/nowhere/python", "cannot run BRIDGE_PYTHON=/nowhere/python (No such file or directory)"),
        (4, "/bin/false", "needs torch and sglang in BRIDGE_PYTHON=/bin/false, and there is no Python"),
        (4, None, "needs JAX on the GPU, and in GPU_PYTHON="),
    ],
)
def test_what_is_missing_is_one_sentence(tmp_path, used, python, sentence):
    env = {} if python is None else {"JAXDRAFT_BRIDGE_PYTHON": python}
    done = pytest_of(tmp_path, used=used, JAXDRAFT_GPU_TEST="gpu", **env)
    assert done.returncode == 2
    assert sentence in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout


def test_no_gpu_is_one_sentence(tmp_path):
    if Path("/usr/bin/nvidia-smi").exists():
        pytest.skip("this machine has an NVIDIA GPU's driver")
    done = pytest_of(tmp_path, JAXDRAFT_GPU_TEST="gpu")
    assert done.returncode == 2
    assert "make gpu-test needs an NVIDIA GPU, and nvidia-smi lists none here" in done.stderr + done.stdout
