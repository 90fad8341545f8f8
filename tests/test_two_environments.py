"""Trainer and bridge in two virtual environments that cannot import each other's libraries."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
import runs
import two_environments

from jaxdraft.checkpoint import load_params


@pytest.fixture(scope="module")
def pythons():
    return two_environments.trainer_python(), two_environments.bridge_python()


def importable(python, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], env=clean_environment()).returncode == 0


def clean_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return kept | {"PYTHONPATH": str(two_environments.REPOSITORY), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def test_neither_has_the_others_libraries(pythons):
    trainer, bridge = pythons
    assert [importable(trainer, name) for name in ("jax", "torch", "transformers", "sglang")] == [True] + [False] * 3
    assert [importable(bridge, name) for name in ("torch", "jax", "flax", "sglang")] == [True] + [False] * 3


def test_a_run_across_two_environments(pythons, tmp_path):
    trainer, bridge = pythons
    config = runs.write_config(runs.write_data(tmp_path, train=12))
    command = [trainer, "-m", "jaxdraft.train", "--config", config, "--bridge.python", bridge, "--max-steps", "4"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    metrics = runs.metrics(tmp_path / "runs" / "small")
    assert list(metrics) == [1, 2, 3, 4]
    assert metrics[4]["loss"] < metrics[1]["loss"]
    assert "huggingface transformers" in done.stdout
    assert load_params(tmp_path / "runs" / "small")[1]["step"] == 4


def test_the_hopper_kernels_in_the_newest_jax(pythons):
    """Interpreted; JAX's interpreter for Python 3.11 lacks what they need, so that there they are skipped."""
    trainer, _ = pythons
    version = "import jax, sys; sys.exit(jax.__version_info__ < (0, 11))"
    if subprocess.run([trainer, "-c", version], env=clean_environment()).returncode:
        pytest.skip("no Python 3.12 at hand, for which there is a JAX of version 0.11")
    # More devices than cores: XLA has as many threads, and the warpgroups, a thread each, wait for each other.
    environment = clean_environment() | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    file = two_environments.REPOSITORY / "tests" / "jaxdraft" / "test_mosaic_kernels.py"
    options = ["--noconftest", "-p", "no:cacheprovider", "-k", "attention or softmax_weights or head"]
    done = subprocess.run(
        [trainer, "-m", "pytest", file, *options], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert re.search(r"^13 passed, \d+ deselected", done.stdout, re.MULTILINE), done.stdout[-3000:]


def test_an_interpreter_that_is_not_there(tmp_path):
    config = runs.write_config(runs.write_data(tmp_path, train=2))
    code, output = runs.run(config, "--bridge.python", str(tmp_path / "bin" / "python"))
    assert code == 2
    assert "bridge.python=" in output
    assert "give the path of a Python interpreter" in output
    assert "Traceback" not in output
