"""`make gpu-test`: what it needs, looked for before anything long starts, and what it prints at its end."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import gpu_runs
import pytest

MODE = os.environ.get("JAXDRAFT_GPU_TEST", "")
MOST_IN_USE = 0.05  # of the GPU's memory, before the tests: their shares of it add up to all of it
PATIENCE_S = 10.0  # after the last process's end, for the driver to give its memory back
SLACK_MIB = 64
LONGEST_REPORT = 6000  # characters of a failure that are shown at once
BRIDGE_VERSIONS = """
from importlib.metadata import version
from feature_bridge.targets.sglang_versions import installed_version
print(f"torch {version('torch')}, transformers {version('transformers')}, SGLang {installed_version()}")
"""

sys.path.append(str(Path(__file__).resolve().parent.parent / "jaxdraft"))  # the cases of the kernels' tests

if MODE == "gpu":
    os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # the older name; JAX refuses both together
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.02")  # of this process, which reads checkpoints

_before: int | None = None
_terminal: Any = None  # of the process that reports
_reports: list[pytest.TestReport] = []


@pytest.fixture
def note(request):
    """Says something in the summary at the end, whether the test passes or not."""

    def say(text: str) -> None:
        request.node.user_properties.append(("note", text))

    return say


def missing() -> str | None:
    """What is not there for these tests, in one sentence."""
    gpu = gpu_runs.smi("--query-gpu=name,memory.used,memory.total", "--id=0")
    if not gpu:
        return "needs an NVIDIA GPU, and nvidia-smi lists none here"
    name, used, total = (part.strip() for part in gpu[0].rsplit(",", 2))
    if int(used) > MOST_IN_USE * int(total):
        return f"needs a GPU of its own, and {used} of the {total} MiB of {name} are in use: end what runs there"
    # Both start JAX or Python with large libraries at hand: seconds, so beside each other.
    try:
        bridge, trainer = (
            ask(python, code) for python, code in ((gpu_runs.BRIDGE_PYTHON, LACKS), (sys.executable, RUNS_ON))
        )
    except OSError as error:
        return (
            f"cannot run BRIDGE_PYTHON={gpu_runs.BRIDGE_PYTHON} ({error.strerror}): give a Python with torch and SGLang"
        )
    lacks, runs_on = (process.communicate(timeout=120)[0].strip() for process in (bridge, trainer))
    if lacks or bridge.returncode:
        return f"needs torch and sglang in BRIDGE_PYTHON={gpu_runs.BRIDGE_PYTHON}, and there is no {lacks or 'Python'}"
    if runs_on != "gpu":
        return (
            f"needs JAX on the GPU, and in GPU_PYTHON={sys.executable} it runs on {runs_on or 'nothing'}: "
            "install jaxdraft[cuda13], or give another Python"
        )
    return None


LACKS = "import importlib.util as u; print(*(n for n in ('torch', 'sglang') if not u.find_spec(n)))"
RUNS_ON = "import jax; print(jax.default_backend())"


def ask(python: str, code: str) -> subprocess.Popen:
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return subprocess.Popen([python, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def pytest_sessionstart(session):
    global _before, _terminal
    if MODE and not hasattr(session.config, "workerinput"):
        _terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if MODE != "gpu" or hasattr(session.config, "workerinput"):
        return
    if sentence := missing():
        pytest.exit(f"make gpu-test {sentence}", returncode=2)
    _before = gpu_runs.gpu_in_use()


def pytest_runtest_logreport(report):
    """A line a test when it has ended, and why it failed: whoever ends the tests early has seen what there was."""
    _reports.append(report)
    if _terminal is None:
        return
    if report.failed:
        _terminal.write_line(f"\nFAILED in its {report.when}: {report.nodeid}")
        _terminal.write_line(str(report.longrepr)[-LONGEST_REPORT:])
    elif report.when == "call":
        _terminal.write_line(f"\n{report.outcome} {report.nodeid} ({report.duration:.0f} s)")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """After all workers have ended. Whatever was killed on the way, nothing may be left on the GPU."""
    if _before is None or hasattr(session.config, "workerinput"):
        return
    deadline = time.monotonic() + PATIENCE_S
    while gpu_runs.gpu_in_use() > _before + SLACK_MIB and time.monotonic() < deadline:
        time.sleep(0.2)
    if gpu_runs.gpu_in_use() > _before + SLACK_MIB and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if not MODE:
        return
    write = terminalreporter.write_line
    terminalreporter.section(f"GPU tests, {time.strftime('%Y-%m-%d')}")
    write(versions())
    cases: dict[str, list[pytest.TestReport]] = {}
    for report in _reports:
        cases.setdefault(report.nodeid, []).append(report)
    for name, reports in cases.items():
        outcome = next((r.outcome for r in reports if r.outcome != "passed"), "passed")
        setup, call = (sum(r.duration for r in reports if r.when == when) for when in ("setup", "call"))
        write(f"{outcome:8}{setup:6.1f} + {call:5.1f} s  {name.removeprefix('tests/')}")
        for key, text in reports[-1].user_properties:
            if key == "note":
                for line in text.splitlines():
                    write(f"          {line}")
    if _before is not None:
        after = gpu_runs.gpu_in_use()
        verdict = "given back" if after <= _before + SLACK_MIB else "NOT ALL GIVEN BACK, which is a failure"
        write(f"MiB of the GPU in use before the tests {_before}, after them {after}: {verdict}")


def versions() -> str:
    gpu = gpu_runs.smi("--query-gpu=name,driver_version", "--id=0") or ["none"]
    bridge = subprocess.run([gpu_runs.BRIDGE_PYTHON, "-c", BRIDGE_VERSIONS], capture_output=True, text=True)
    own = []
    for name in ("jax", "jaxlib", "flax"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            own.append(f"{name} {metadata.version(name)}")
    return f"GPU {gpu[0]}; Python {sys.version.split()[0]}, {', '.join(own)}; bridge: {bridge.stdout.strip()}"
