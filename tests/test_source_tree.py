"""Both packages from a source tree on PYTHONPATH, without installed metadata; and versions in general."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import runs

import jaxdraft
from feature_bridge.installed import version_of
from feature_bridge.targets import sglang_versions
from jaxdraft.checkpoint import Checkpoints, check_resume

ROOT = Path(__file__).resolve().parent.parent
# Python runs this file at its start: distributions of these names are not there.
HIDE = """
import importlib.metadata as metadata
real = metadata.Distribution.from_name.__func__

def from_name(cls, name):
    if name.lower() in ("jaxdraft", "feature-bridge", "feature_bridge", "optax"):
        raise metadata.PackageNotFoundError(name)
    return real(cls, name)

metadata.Distribution.from_name = classmethod(from_name)
"""
FEW = "config = dataclasses.replace(config, max_steps=2, save_interval=1, eval_interval=2, num_decode=1)"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Environment of a process that finds a copy of the sources, and no metadata of theirs."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("jaxdraft", "feature_bridge", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "pictures", "*.jsonl"))
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "sitecustomize.py").write_text(HIDE)
    return {"PYTHONPATH": f"{hidden}:{tree}", "PYTHONSAFEPATH": "1"}


@pytest.fixture(scope="module")
def trained(tree, tmp_path_factory):
    directory = runs.write_data(tmp_path_factory.mktemp("run"))
    code, output = runs.run(runs.write_config(directory, FEW), **tree)
    assert code == 0, output
    return directory / "runs" / "small"


def test_a_training_to_its_end(trained):
    with Checkpoints(trained, keep=9, read_only=True) as checkpoints:
        versions = checkpoints.meta(2)["versions"]
    assert versions["jaxdraft"] == jaxdraft.__version__
    assert versions["jax"] == importlib.metadata.version("jax")
    assert versions["optax"] == importlib.metadata.version("optax")  # by its module
    assert json.loads((trained / "export" / "export.json").read_text())["jaxdraft"] == jaxdraft.__version__
    assert "## Training" in (trained / "export" / "README.md").read_text()


def python(tree, tmp_path, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments],
        env={"PATH": "", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)} | tree,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_other_commands(tree, trained, tmp_path):
    where = python(tree, tmp_path, "-c", "import jaxdraft, feature_bridge as f; print(jaxdraft.__file__, f.__file__)")
    assert all(file.startswith(tree["PYTHONPATH"].rpartition(":")[2]) for file in where.split())  # the copy's
    commands = {
        "train": ["--help"],
        "plan": ["--config", str(trained)],
        "export": ["--checkpoint", str(trained), "--output", str(tmp_path / "draft")],
        "convert": ["--help"],
        "regenerate": ["--help"],
    }
    for name, arguments in commands.items():
        python(tree, tmp_path, "-m", f"jaxdraft.{name}", *arguments)
    assert "## Training" in (tmp_path / "draft" / "README.md").read_text()


def test_a_distribution_that_is_only_on_the_path(monkeypatch):
    assert version_of("numpy") == importlib.metadata.version("numpy")
    assert version_of("no-such-distribution") == "unknown"
    monkeypatch.setitem(sys.modules, "no_such_distribution", types.SimpleNamespace(__version__="3.1"))
    assert version_of("no-such-distribution") == "3.1"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: None)  # metadata without a version
    assert version_of("numpy") == sys.modules["numpy"].__version__


def test_an_sglang_that_is_only_on_the_path(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(sglang_versions, "version_of", lambda name: "unknown")
    assert sglang_versions.installed_version() == "unknown"
    with pytest.warns(UserWarning, match="SGLang unknown is not one of the versions"):
        assert sglang_versions.release_of("unknown").deepstack_capture is None


def test_another_version_may_resume():
    """What is installed is written down in a checkpoint and compared with nothing."""
    saved = {"config": {"seed": 0}, "versions": {"jaxdraft": "0.0.9", "jax": "0.10.2"}}
    check_resume(saved, saved | {"versions": {"jaxdraft": "unknown"}})


def test_the_version_has_one_place():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "jaxdraft.__version__"}
