"""The README's commands as processes, for the tests on a GPU.

In a rehearsal (JAXDRAFT_GPU_TEST=rehearsal) the same tests run on a CPU: slots in host memory, fewer steps, the target
in transformers, or in JAXDRAFT_REHEARSED_BACKEND. It shows that the tests themselves are right, and nothing of a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import processes
import psutil
import runs

ROOT = Path(__file__).resolve().parents[2]
REHEARSAL = os.environ.get("JAXDRAFT_GPU_TEST") == "rehearsal"
BRIDGE_PYTHON = os.environ.get("JAXDRAFT_BRIDGE_PYTHON", sys.executable)
BACKEND = os.environ.get("JAXDRAFT_REHEARSED_BACKEND", "huggingface") if REHEARSAL else "sglang"
TRANSPORT = "shared_memory" if REHEARSAL else "cuda_ipc"
LIMIT_S = 900 if REHEARSAL else 240
# Several trainers and bridges share the GPU. JAX takes its fraction at once; a bridge's is only a limit, and a wide
# one, because SGLang mistakes what others allocate while it loads the target for its own.
TRAINER_FRACTION, BRIDGE_FRACTION = "0.02", "0.2"
# Config's own defaults, which the embedded target's config replaces by those of its demo on a CPU.
PRECISION = ("--compute-dtype", "bfloat16", "--target.dtype", "bfloat16")


class Command:
    """`python -m jaxdraft.NAME ...`, its output read as it comes: a full pipe would hold it up."""

    def __init__(self, name: str, *args: object, out: Path, log: Path | None = None):
        """
        Args:
          out: of the module's runs. Its own compilation cache makes all of them run the same programs: compiled again
            beside other work, a product may be chosen otherwise, and sums then differ in their last bits.
          log: its bridge's, shown where it ends badly.
        """
        # A script's own folder is all that Python would find it beside, where the packages are not installed.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {"COLUMNS": "200", "PYTHONPATH": path}
        if REHEARSAL:
            environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "OMP_NUM_THREADS": "1"}
        else:  # of commands that take no --trainer.memory-fraction
            environment |= {"XLA_CLIENT_MEM_FRACTION": TRAINER_FRACTION, "JAX_COMPILATION_CACHE_DIR": str(out / "xla")}
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        self.name, self._log = name, log
        command = [sys.executable, name] if name.endswith(".py") else [sys.executable, "-m", f"jaxdraft.{name}"]
        self._process = processes.popen([*command, *args], environment)
        self.pid, self.poll = self._process.pid, self._process.poll
        self._lines: list[str] = []
        self._reader = threading.Thread(target=lambda: self._lines.extend(self._process.stdout), daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def communicate(self, timeout: float = LIMIT_S) -> tuple[str, None]:
        """As a `Popen`'s, so that `runs` takes a command for one."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(self._described("has not ended")) from None
        self._reader.join(10)
        return self.output, None

    def end(self) -> str:
        """Its output; it must end well."""
        output, _ = self.communicate()
        if self.poll() != 0:
            raise AssertionError(self._described(f"ended with exit code {self.poll()}"))
        return output

    def _described(self, how: str) -> str:
        log = self._log.read_text(errors="replace") if self._log and self._log.is_file() else ""
        return f"{self.name} {how}:\n{self.output[-4000:]}\n{log[-4000:]}"


def train(out: Path, name: str, *args: object) -> Command:
    """The main job on the embedded target with its pictures; OUT/NAME is its directory. Later options win."""
    command = ["--config", "tiny_qwen35vl.py", *PRECISION, "--output-dir", out, "--name", name, "--log-interval", "1"]
    command += ["--bridge.python", BRIDGE_PYTHON, "--bridge.transport", TRANSPORT, "--target.backend", BACKEND]
    command += ["--data.eval-rows", "4", "--num-decode", "0"]
    # Dozens of processes start at once: their imports would take all cores.
    command += ["--data.num-workers", "1", "--bridge.reader-processes", "1"]
    if REHEARSAL:
        command += ["--draft.num-layers", "1", "--data.eval-rows", "2"]
    else:
        command += ["--trainer.memory-fraction", TRAINER_FRACTION, "--bridge.memory-fraction", BRIDGE_FRACTION]
    return Command("train", *command, *args, out=out, log=out / name / "bridge.log")


def losses(run_dir: Path, split: str = "train") -> dict[int, float]:
    """By step; a loss that is not a finite number is an error here."""
    found = {step: line["loss"] for step, line in runs.metrics(run_dir, split).items()}
    assert all(loss is not None and abs(loss) < float("inf") for loss in found.values()), found
    return found


def assert_learns(run_dir: Path, steps: int) -> None:
    """All steps were logged, and the last tenth has smaller losses than the first."""
    found = losses(run_dir)
    assert list(found) == list(range(1, steps + 1))
    tenth = max(1, steps // 10)
    values = list(found.values())
    assert sum(values[-tenth:]) < sum(values[:tenth]), values


def family(pid: int) -> list[psutil.Process]:
    """A trainer, its bridge, and the processes of that."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def wait_until_gone(family: list[psutil.Process], timeout_s: float = 10) -> None:
    runs.wait_until(lambda: all(runs.is_zombie(one.pid) or not one.is_running() for one in family), timeout_s)


def smi(*query: str) -> list[str]:
    """Lines of nvidia-smi; none where there is no GPU."""
    command = ["nvidia-smi", *query, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def gpu_owners() -> dict[int, str]:
    """MiB by process id, as far as nvidia-smi can see the processes from here."""
    pairs = (line.split(",") for line in smi("--query-compute-apps=pid,used_memory"))
    return {int(pid): used.strip() for pid, used in pairs}


def gpu_in_use() -> int | None:
    """MiB of the first GPU that are in use by anybody."""
    lines = smi("--query-gpu=memory.used", "--id=0")
    return int(lines[0]) if lines else None
