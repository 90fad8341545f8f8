"""Two real virtual environments: the trainer's, with JAX and without torch; the bridge's, the other way round.

Built once into .cache/test-envs, keyed by what is installed. `python tests/two_environments.py` builds them alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / ".cache" / "test-envs"
REQUIREMENTS = REPOSITORY / "feature_bridge" / "requirements"


def trainer_python() -> Path:
    """Python 3.12 with the newest JAX, flax and pytest where there is one; else this Python with the pinned ones."""
    wanted = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    newer = _python312()
    pins = [] if newer else ["-c", str(REQUIREMENTS / "constraints-py311.txt")]
    return _environment("trainer", newer or sys.executable, [[*pins, *wanted, "pytest", "hypothesis"]])


def bridge_python() -> Path:
    """This Python with torch and transformers, and without JAX and SGLang."""
    pins = ["-c", str(REQUIREMENTS / "constraints-py311.txt")]
    index = os.environ.get("TORCH_INDEX")
    torch = [*(["--index-url", index] if index else []), "torch==2.13.0"]
    wanted = ["transformers==5.12.1", "numpy", "pillow", "safetensors", "msgspec", "jaxtyping", "huggingface_hub"]
    return _environment("bridge", sys.executable, [torch, [*pins, *wanted], ["--no-deps", "torchvision==0.28.0"]])


def _environment(name: str, python: str, installs: list[list[str]]) -> Path:
    """The interpreter of a virtual environment that `pip install` was run in with each of `installs`."""
    key = hashlib.sha256(repr((python, installs)).encode()).hexdigest()[:12]
    directory = CACHE / f"{name}-{key}"
    interpreter = directory / "bin" / "python"
    if not (directory / "ready").is_file():
        shutil.rmtree(directory, ignore_errors=True)
        environment = _without_pythonpath()
        subprocess.run([python, "-m", "venv", directory], check=True, env=environment)
        for arguments in installs:
            command = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
            subprocess.run([*command, *arguments], check=True, env=environment)
        (directory / "ready").touch()
    return interpreter


def _python312() -> str | None:
    versions = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    for candidate in (shutil.which("python3.12"), *map(str, sorted(versions.glob("3.12*/bin/python3.12")))):
        if candidate:  # a shim may be there without what it stands for
            tried = subprocess.run([candidate, "-c", "import venv, ensurepip"], capture_output=True)
            if tried.returncode == 0:
                return candidate
    return None


def _without_pythonpath() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


if __name__ == "__main__":
    print(trainer_python(), bridge_python())
